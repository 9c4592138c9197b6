"""How many times less an arm needs than the reference until its mean accuracy reaches a threshold: factor, interval, null.

A factor read off noisy curves is no constant even for two identical arms, and whoever takes the reference's last point as the
threshold favors the reference: it is there by definition, the other arm only as luck has it. Hence

* one threshold for all arms and seeds: given beforehand, or `late_accuracy` of the reference, which is chosen after the fact and
  is said to be;
* a bootstrap over seeds, in pairs, that draws the threshold again where it is chosen after the fact. With few seeds percentiles
  are too narrow; they are widened as the t distribution widens the normal one (T. C. Hesterberg, The American Statistician 69,
  2015, section 4: expanded percentiles). A curve that does not reach the threshold is censored: its factor is known to lie below
  (or above) a bound, and a limit of the interval that only censored draws decide is open;
* the null: the same factor for each two seeds of the reference, which differ by nothing but luck.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations
from statistics import NormalDist, median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cropi_tools.report.statistics import CONFIDENCE, t_quantile

SMOOTH_FROM = 12  # evaluations from which a curve is smoothed before a threshold is read off it
LATE = 3  # evaluations whose mean is the reference's late accuracy
_EXACT = 7  # seeds up to which every resample is counted, by its probability; more are drawn
_DRAWS = 4000

Floats = NDArray[np.float64]


class Curves(NamedTuple):
    """What the seeds of an arm reached, and at what cost: arrays [seeds, points], points in the order of their steps.

    arrived: cost on coming to a point; ready: when the selection that begins there is paid for as well.
    """

    values: Floats
    arrived: Floats
    ready: Floats

    def of(self, weights: Floats) -> Curves:
        """The weighted means over seeds; weights [draws, seeds], each row of sum 1. Values are smoothed, costs are not."""
        return Curves(_smoothed(weights @ self.values), weights @ self.arrived, weights @ self.ready)


class Factor(NamedTuple):
    """Where a factor lies: a number where low = high; [0, high] where the arm never got there; [low, infinity] where the reference
    did not; at_start: both were there before the first step, which leaves nothing to compare."""

    low: float
    high: float
    arm_reached: bool
    reference_reached: bool
    at_start: bool = False

    @property
    def both_reached(self) -> bool:
        return self.arm_reached and self.reference_reached

    @property
    def exact(self) -> float | None:
        """The factor as a finite number; None where it is censored, infinite, or of two at the start."""
        return self.low if self.low == self.high and math.isfinite(self.low) and not self.at_start else None


@dataclass(frozen=True)
class Null:
    """The factor between seeds of one arm, in all ordered pairs: median and range of those where both got there, and how many
    pairs there are in which one or both did not.
    """

    pairs: int
    missed: int
    median: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Speed:
    """How many times less of a unit (steps, seconds, tokens) an arm needs than the reference up to `threshold`.

    needed: by the mean curve, 0 where it starts there, None where it never gets there. ratio: None where it is no finite number.
    by_seed: each pair of seeds. interval: None with fewer than two pairs, or where the arm starts there; 0 and infinity are open.
    confidence: of the interval. Five seeds are the fewest with which 95 % can be had: n pairs of equal arms are all on one side with
    probability 2^(1 - n).
    """

    reference: str
    threshold: float
    beforehand: bool
    late: int
    needed: float | None
    reference_needed: float | None
    ratio: float | None
    by_seed: Mapping[str, Factor]
    interval: tuple[float, float] | None
    confidence: float
    null: Null | None


def late_points(points: int) -> int:
    """How many of so many evaluations, the start among them, the late accuracy is the mean of."""
    return max(1, min(LATE, (points - 1) // 2))


def late_accuracy(values: Floats) -> Floats:
    """The mean of the last three evaluations, or of the last half where there are fewer than six after the start. values: [..., points]."""
    found: Floats = values[..., -late_points(values.shape[-1]) :].mean(-1)
    return found


def speed(
    ours: Curves, theirs: Curves, names: Sequence[str], reference: str, threshold: float | None, null: Null | None
) -> Speed:
    """The figures of one unit. The seeds are pairs where `names` has them, in order; else the arms have no seed in common."""
    chosen = float(late_accuracy(theirs.values).mean()) if threshold is None else threshold
    goal = np.array([chosen])
    arm, other = (crossing(curves.of(_mean(len(curves.values))), goal)[0] for curves in (ours, theirs))
    by_seed = {}
    for place, name in enumerate(names):
        one = np.zeros((1, len(names)))
        one[0, place] = 1.0
        by_seed[name] = factors(ours.of(one), theirs.of(one), goal)[0]
    needed, reference_needed = (None if math.isnan(found) else float(found) for found in (arm, other))
    ratio = reference_needed / needed if needed and reference_needed is not None else None
    interval = None
    if len(names) > 1 and not needed == reference_needed == 0:
        limits = paired_bootstrap(ours, theirs, threshold)
        interval = limits if math.isfinite(limits[0]) else None
    late = late_points(theirs.values.shape[1])
    confidence = min(CONFIDENCE, 1 - 2.0 ** (1 - max(len(names), 1)))
    return Speed(
        reference,
        chosen,
        threshold is not None,
        late,
        needed,
        reference_needed,
        ratio,
        by_seed,
        interval,
        confidence,
        null,
    )


def null_of(curves: Curves, threshold: float | None) -> Null | None:
    """The null of a reference; None with one seed."""
    seeds = len(curves.values)
    if seeds < 2:
        return None
    goal = np.array([float(late_accuracy(curves.values).mean()) if threshold is None else threshold])
    single = [curves.of(np.eye(seeds)[[place]]) for place in range(seeds)]
    found = [factors(one, other, goal)[0] for one, other in permutations(single, 2)]
    known = sorted(factor.exact for factor in found if factor.exact is not None)
    return Null(
        len(found),
        sum(not factor.both_reached for factor in found),
        median(known) if known else None,
        min(known, default=None),
        max(known, default=None),
    )


def paired_bootstrap(ours: Curves, theirs: Curves, threshold: float | None) -> tuple[float, float]:
    """The 95 % interval of the factor over paired seeds, two or more. threshold: None to draw it again with the seeds."""
    seeds = len(ours.values)
    weights, chances = _resamples(seeds)
    goals = weights @ late_accuracy(theirs.values) if threshold is None else np.full(len(weights), threshold)
    drawn, others = ours.of(weights), theirs.of(weights)
    least, greatest = _bounds(drawn, others, crossing(drawn, goals), crossing(others, goals))
    tail = NormalDist().cdf(-math.sqrt(seeds / (seeds - 1)) * t_quantile(CONFIDENCE, seeds - 1))
    return _quantile(least, chances, tail), -_quantile(-greatest, chances, tail)


def factors(ours: Curves, theirs: Curves, goals: Floats) -> list[Factor]:
    """The factor of each draw, from mean curves of `Curves.of`."""
    mine, other = crossing(ours, goals), crossing(theirs, goals)
    low, high = _bounds(ours, theirs, mine, other)
    rows = zip(low, high, ~np.isnan(mine), ~np.isnan(other), (mine == 0) & (other == 0), strict=True)
    return [Factor(float(a), float(b), bool(got), bool(they), bool(start)) for a, b, got, they, start in rows]


def _bounds(ours: Curves, theirs: Curves, mine: Floats, other: Floats) -> tuple[Floats, Floats]:
    """The least and the greatest value of each factor, given where the curves cross; NaN: nowhere before their end."""
    least = _divided(np.where(np.isnan(other), theirs.ready[:, -1], other), mine)
    greatest = _divided(other, np.where(np.isnan(mine), ours.ready[:, -1], mine))
    return np.where(np.isnan(mine), 0.0, least), np.where(np.isnan(other), np.inf, greatest)


def _divided(theirs: Floats, ours: Floats) -> Floats:
    """Two that need nothing need equally little."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((ours == 0) & (theirs == 0), 1.0, theirs / ours)


def crossing(curves: Curves, goals: Floats) -> Floats:
    """The cost at which each mean curve first comes to its goal, interpolated between evaluations; 0 at the start, NaN for never."""
    there = curves.values >= goals[:, None] - 1e-12
    first = there.argmax(1)
    rows, before = np.arange(len(goals)), np.maximum(first - 1, 0)
    low, high = curves.values[rows, before], curves.values[rows, first]
    rise = np.where(high > low, high - low, 1.0)
    share = np.clip((goals - low) / rise, 0.0, 1.0)
    paid = curves.ready[rows, before]
    cost = np.where(first == 0, 0.0, paid + share * (curves.arrived[rows, first] - paid))
    return np.where(there.any(1), cost, np.nan)


def _smoothed(values: Floats) -> Floats:
    """A running mean of three where there are many evaluations (`SMOOTH_FROM`); the ends average what they have."""
    if values.shape[1] < SMOOTH_FROM:
        return values
    padded = np.pad(values, ((0, 0), (1, 1)))
    counts = np.full(values.shape[1], 3.0)
    counts[[0, -1]] = 2.0
    return (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / counts


def _mean(seeds: int) -> Floats:
    return np.full((1, seeds), 1 / seeds)


def _resamples(seeds: int) -> tuple[Floats, Floats]:
    """(weights [draws, seeds], probabilities [draws]) of drawing as many seeds as there are, with replacement."""
    if seeds > _EXACT:
        drawn = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=_DRAWS)
        return drawn / seeds, np.full(_DRAWS, 1 / _DRAWS)
    counts = [Counter(drawn) for drawn in combinations_with_replacement(range(seeds), seeds)]
    ways = [math.factorial(seeds) / math.prod(map(math.factorial, count.values())) for count in counts]
    weights = np.array([[count[seed] for seed in range(seeds)] for count in counts]) / seeds
    return weights, np.array(ways) / seeds**seeds


def _quantile(values: Floats, chances: Floats, tail: float) -> float:
    """The least value with at least so much probability up to it."""
    order = np.argsort(values, kind="stable")
    place = int(np.searchsorted(np.cumsum(chances[order]), tail))
    return float(values[order[min(place, len(order) - 1)]])
