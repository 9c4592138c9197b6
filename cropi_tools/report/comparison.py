"""Compares the arms of one or several runs: what each ended with, by how much it differs, how soon it got there, what
it took.

Rules, so that no figure is picked: an arm counts its finished seeds that reach its last step (all seeds while none is
finished); it ends at the last step where all of them were evaluated; a difference pairs equal seeds at the last step
both arms were evaluated at. The mean target accuracy is over the evaluation sets that every arm has, or those asked
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cropi_tools.report.accuracy import mean_curve, seed_curve, set_figure
from cropi_tools.report.costs import UNITS, cumulative, looks_at_pool, mean_ledger, seed_ledger
from cropi_tools.report.notes import notes_on
from cropi_tools.report.reading import Arm, Run, Seed
from cropi_tools.report.speeds import Curves, Speed, late_accuracy, null_of, speed
from cropi_tools.report.statistics import holm, paired_interval
from cropi_tools.report.structures import SUBJECT, ArmFigures, Comparison, CurvePoint, Difference
from cropi_tools.runtime.errors import UsageError

LEADING = ("random", "full")


def compare(
    runs: Sequence[Run],
    *,
    baseline: str = "random",
    reference: str = "full",
    targets: Sequence[str] = (),
    threshold: float | None = None,
) -> Comparison:
    """All figures of the runs. Differences are to the arm named `baseline`, speeds to the arm named `reference`, up to the mean target
    accuracy `threshold` (0..1), or to the late accuracy of the reference.

    UsageError: an evaluation set was asked for that no arm has. Arms of several runs are named RUN/ARM.
    """
    pairs = sorted(((run, arm) for run in runs for arm in run.arms), key=lambda pair: _rank(pair[1].name, pair[0].name))
    arm_sets = [frozenset().union(*(seed.sets for seed in arm.seeds)) for _, arm in pairs]
    measured = [sets for sets in arm_sets if sets]
    sets = sorted(frozenset().union(*measured))
    unknown = [name for name in targets if name not in sets]
    if unknown:
        raise UsageError(f"{unknown[0]}: no such evaluation set in the runs; they have {', '.join(sets) or 'none'}")
    chosen = tuple(targets) or tuple(name for name in sets if all(name in found for found in measured))
    labels = _labels(pairs)
    arms = [_figures(run, arm, label, sets, chosen) for (run, arm), label in zip(pairs, labels, strict=True)]
    arms = [
        replace(
            arm,
            difference=_difference(arm, _partner(arm, arms, baseline), chosen),
            speed=_speeds(arm, arms, reference, chosen, threshold),
        )
        for arm in arms
    ]
    arms = _adjust(arms)
    firsts = [seed for arm in arms for seed in arm.counted]
    return Comparison(
        runs=tuple(runs),
        sets=tuple(sets),
        targets=chosen,
        start={name: figure for name in sets if (figure := set_figure(firsts, 0, (name,)))},
        start_target=set_figure(firsts, 0, chosen),
        arms=tuple(arms),
        baseline=baseline,
        reference=reference,
        threshold=threshold,
        notes=tuple(notes_on(arms, sets, chosen, bool(targets), reference)),
    )


def _rank(arm: str, run: str) -> tuple[int, str, str]:
    place = LEADING.index(arm) if arm in LEADING else len(LEADING) + (arm == SUBJECT)
    return place, arm, run


def _labels(pairs: Sequence[tuple[Run, Arm]]) -> list[str]:
    if len({id(run) for run, _ in pairs}) == 1:
        return [arm.name for _, arm in pairs]
    return [f"{run.name}/{arm.name}" for run, arm in pairs]


def _counted(arm: Arm, sets: Sequence[str]) -> tuple[Seed, ...]:
    last = {seed.name: max(seed_curve(seed, sets), default=-1) for seed in arm.seeds}
    finished = [seed for seed in arm.seeds if seed.finished and last[seed.name] >= 0]
    if not finished:
        return tuple(seed for seed in arm.seeds if last[seed.name] >= 0)
    top = max(last[seed.name] for seed in finished)
    return tuple(seed for seed in finished if last[seed.name] == top)


def _figures(run: Run, arm: Arm, label: str, sets: Sequence[str], chosen: Sequence[str]) -> ArmFigures:
    counted = _counted(arm, chosen)
    curve = mean_curve([seed_curve(seed, chosen) for seed in counted])
    step = curve[-1][0] if curve else None
    at_end = {} if step is None else {name: set_figure(counted, step, (name,)) for name in sets}
    ledgers = {seed.name: seed_ledger(arm, seed) for seed in arm.seeds}
    return ArmFigures(
        label=label,
        kind=arm.name,
        run=run,
        arm=arm,
        counted=counted,
        step=step,
        sets={name: figure for name, figure in at_end.items() if figure},
        target=None if step is None else set_figure(counted, step, chosen),
        curve=curve,
        seed_curves={seed.name: tuple(seed_curve(seed, chosen).items()) for seed in arm.seeds},
        ledgers=ledgers,
        ledger=mean_ledger([ledgers[seed.name] for seed in counted or arm.seeds]),
        charged=looks_at_pool(arm),
    )


def _partner(arm: ArmFigures, arms: Sequence[ArmFigures], kind: str) -> ArmFigures | None:
    """The arm of that name in the same run, else the only one of that name in any run; None for the arm itself."""
    found = [other for other in arms if other.kind == kind]
    own = [other for other in found if other.run is arm.run]
    partner = own[0] if own else found[0] if len(found) == 1 else None
    return None if partner is arm else partner


def _difference(arm: ArmFigures, baseline: ArmFigures | None, sets: Sequence[str]) -> Difference | None:
    if baseline is None:
        return None
    theirs = {seed.name: seed_curve(seed, sets) for seed in baseline.counted}
    ours = {seed.name: seed_curve(seed, sets) for seed in arm.counted if seed.name in theirs}
    alone = {seed.name for seed in arm.counted} ^ set(theirs)
    if not ours:
        return None
    common = set.intersection(*(set(ours[name]) & set(theirs[name]) for name in ours))
    if not common or (step := max(common)) == 0:
        return None
    by_seed = {name: ours[name][step] - theirs[name][step] for name in ours}
    interval = paired_interval(list(by_seed.values()))
    return Difference(baseline.label, step, by_seed, interval, alone=tuple(sorted(alone)))


def _adjust(arms: Sequence[ArmFigures]) -> list[ArmFigures]:
    """Holm over the arms compared in this report."""
    tested = [arm for arm in arms if arm.difference and arm.difference.interval]
    p_values = holm([arm.difference.interval.p for arm in tested if arm.difference and arm.difference.interval])
    adjusted = {arm.label: p for arm, p in zip(tested, p_values, strict=True)}
    return [
        replace(arm, difference=replace(arm.difference, adjusted_p=adjusted[arm.label]))
        if arm.difference and arm.label in adjusted
        else arm
        for arm in arms
    ]


def unit_curve(arm: ArmFigures, seeds: Sequence[Seed], sets: Sequence[str], unit: str) -> list[CurvePoint] | None:
    """The mean curve of the given seeds against `steps`, `seconds` or `tokens`; None if the cost is unknown.

    Against cost, a step at which the next stage is selected has two points: before and after paying for it, at one
    accuracy.
    """
    found = _curves(arm, seeds, sets, unit)
    if found is None:
        return None if unit != "steps" else []
    steps, curves = found
    points = []
    for step, value, arrived, ready in zip(steps, *(array.mean(0) for array in curves), strict=True):
        points.append(CurvePoint(step, float(arrived), float(value)))
        if ready > arrived:
            points.append(CurvePoint(step, float(ready), float(value)))
    return points


def _curves(
    arm: ArmFigures, seeds: Sequence[Seed], sets: Sequence[str], unit: str
) -> tuple[tuple[int, ...], Curves] | None:
    """The steps that all the seeds were evaluated at, and what each had reached and spent there; None where that is not known."""
    each = [seed_curve(seed, sets) for seed in seeds]
    steps = tuple(sorted(set(each[0]).intersection(*each[1:]))) if each else ()
    if not steps:
        return None
    values = np.array([[curve[step] for step in steps] for curve in each])
    if unit == "steps":
        at = np.broadcast_to(np.array(steps, dtype=np.float64), values.shape)
        return steps, Curves(values, at, at)
    costs = [cumulative(arm.arm, seed, unit) for seed in seeds]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or any(step not in cost for cost in known for step in steps):
        return None
    arrived, ready = (np.array([[cost[step][side] for step in steps] for cost in known]) for side in (0, 1))
    return steps, Curves(values, arrived, ready)


def _speeds(
    arm: ArmFigures, arms: Sequence[ArmFigures], kind: str, sets: Sequence[str], threshold: float | None
) -> Mapping[str, Speed] | None:
    """None without a reference, or when the reference did not rise above its own start, so there is nothing to reach.

    The mean curves are of the seeds both arms have, where there are such, so that luck of the seed falls on both alike.
    """
    reference = _partner(arm, arms, kind)
    if reference is None or not reference.curve or not arm.curve:
        return None
    theirs = {seed.name: seed for seed in reference.counted}
    names = [seed.name for seed in arm.counted if seed.name in theirs]
    ours = [seed for seed in arm.counted if not names or seed.name in theirs]
    others = [theirs[name] for name in names] or list(reference.counted)
    speeds = {}
    for unit in ("steps", *UNITS):
        mine, other = _curves(arm, ours, sets, unit), _curves(reference, others, sets, unit)
        whole = _curves(reference, reference.counted, sets, unit)
        if mine is None or other is None:
            continue
        if threshold is None and not rises(other[1]):
            return None
        null = None if whole is None else null_of(whole[1], threshold)
        speeds[unit] = speed(mine[1], other[1], names, reference.label, threshold, null)
    return speeds or None


def rises(curves: Curves) -> bool:
    """Whether the late accuracy is above the start, on the mean over seeds."""
    return bool(late_accuracy(curves.values).mean() > curves.values[:, 0].mean())
