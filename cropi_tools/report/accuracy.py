"""Accuracy over the evaluation sets of a mean: at one step, over a seed's steps, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cropi_tools.intervals import wilson
from cropi_tools.report.reading import Evaluation, Seed
from cropi_tools.report.statistics import binomial_error, mean, spread
from cropi_tools.report.structures import SetFigure


def target_accuracy(seed: Seed, step: int, sets: Sequence[str]) -> float | None:
    """The mean accuracy over the sets at one step; None unless all were evaluated there."""
    found = [seed.evaluations.get((step, name)) for name in sets]
    if not sets or None in found:
        return None
    return mean([item.accuracy for item in found if item is not None])


def seed_curve(seed: Seed, sets: Sequence[str]) -> dict[int, float]:
    steps = sorted({step for step, _ in seed.evaluations})
    return {step: value for step in steps if (value := target_accuracy(seed, step, sets)) is not None}


def mean_curve(curves: Sequence[Mapping[int, float]]) -> tuple[tuple[int, float], ...]:
    """The mean over seeds at the steps all of them have."""
    if not curves:
        return ()
    common = set(curves[0]).intersection(*curves[1:])
    return tuple((step, mean([curve[step] for curve in curves])) for step in sorted(common))


def evaluation_error(found: Sequence[Evaluation]) -> float | None:
    """The least standard error of the mean of these independent evaluations; at 0 and 1, where counting responses would give none, that
    of Wilson's interval over the prompts.
    """
    if any(not item.prompts for item in found):
        return None
    errors = [
        binomial_error(item.accuracy, (item.prompts or 1) * (item.samples or 1))
        if 0 < item.accuracy < 1
        else _width(wilson(item.accuracy, item.prompts or 1)) / 4  # two errors to either side
        for item in found
    ]
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def evaluation_interval(found: Sequence[Evaluation]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of these independent evaluations, from that of each.

    Where an evaluation does not tell its own, its samples are taken to be as many as its prompts, which is the widest. The distances
    to the limits add up in squares (G. Y. Zou and A. Donner, Statistics in Medicine 27, 2008).
    """
    each = [_interval_of(item) for item in found]
    known = [limits for limits in each if limits is not None]
    if not found or len(known) < len(each):
        return None
    middle = mean([item.accuracy for item in found])
    below, above = (
        math.sqrt(math.fsum((item.accuracy - limits[side]) ** 2 for item, limits in zip(found, known, strict=True)))
        / len(found)
        for side in (0, 1)
    )
    return max(middle - below, 0.0), min(middle + above, 1.0)


def _interval_of(item: Evaluation) -> tuple[float, float] | None:
    if item.interval is not None or not item.prompts:
        return item.interval
    return wilson(item.accuracy, item.prompts)


def set_figure(seeds: Sequence[Seed], step: int, sets: Sequence[str]) -> SetFigure | None:
    having = [seed for seed in seeds if target_accuracy(seed, step, sets) is not None]
    if not having:
        return None
    found = [seed.evaluations[step, name] for seed in having for name in sets]
    by_seed = [mean([seed.evaluations[step, name].accuracy for name in sets]) for seed in having]
    interval = evaluation_interval(found) if len(having) == 1 else None
    return SetFigure(mean(by_seed), spread(by_seed), evaluation_error(found), len(having), interval)


def _width(limits: tuple[float, float]) -> float:
    return limits[1] - limits[0]
