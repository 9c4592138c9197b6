"""Compares the arms of one or several runs: what each ended with, by how much it differs, how soon it got there, what
it took.

Rules, so that no figure is picked: an arm counts its finished seeds that reach its last step (all seeds while none is
finished); it ends at the last step where all of them were evaluated; a difference pairs equal seeds at the last step
both arms were evaluated at. The mean target accuracy is over the evaluation sets that every arm has, or those asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cropi_tools.data.errors import UsageError
from cropi_tools.report.costs import UNITS, Ledger, cumulative, mean_ledger, seed_ledger, uses_scores
from cropi_tools.report.reading import Arm, Evaluation, Run, Seed
from cropi_tools.report.statistics import (
    SMOOTH_FROM,
    Interval,
    binomial_error,
    first_crossing,
    holm,
    mean,
    paired_interval,
    smoothed,
    spread,
)

LEADING = ("random", "full")
SUBJECT = "cropi"


@dataclass(frozen=True)
class SetFigure:
    """Accuracy (0..1) at one step: mean over seeds, spread over seeds, and the least evaluation noise of that mean."""

    mean: float
    spread: float | None
    error: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """An arm minus its baseline in mean target accuracy, paired by seed, at one step."""

    baseline: str
    step: int
    by_seed: Mapping[str, float]
    interval: Interval | None
    adjusted_p: float | None = None

    @property
    def mean(self) -> float:
        return mean(list(self.by_seed.values()))


@dataclass(frozen=True)
class Speed:
    """How many times less of a unit (steps, seconds, tokens) an arm needed than the reference for the reference's
    final accuracy.

    `ratio` is read off the mean curves, `by_seed` off each pair of seeds; None = not reached. Both curves are read by
    the same rule.
    """

    reference: str
    threshold: float
    smoothed: bool
    needed: float | None
    ratio: float | None
    by_seed: Mapping[str, float | None]


class CurvePoint(NamedTuple):
    """A point of a mean curve: the step, what was spent up to here, and the mean target accuracy."""

    step: int
    cost: float
    value: float


@dataclass(frozen=True)
class ArmFigures:
    """All figures of one arm. `curve` is (step, mean target accuracy) over the counted seeds; `seed_curves` those of
    every seed.
    """

    label: str
    kind: str
    run: Run
    arm: Arm
    counted: tuple[Seed, ...]
    step: int | None
    sets: Mapping[str, SetFigure]
    target: SetFigure | None
    curve: tuple[tuple[int, float], ...]
    seed_curves: Mapping[str, tuple[tuple[int, float], ...]]
    ledgers: Mapping[str, Ledger]
    ledger: Ledger
    charged: bool
    difference: Difference | None = None
    speed: Mapping[str, Speed] | None = None

    @property
    def unfinished(self) -> tuple[Seed, ...]:
        return tuple(seed for seed in self.arm.seeds if not seed.finished)


@dataclass(frozen=True)
class Comparison:
    """What a report shows. `targets` are the sets in the mean; `start` the figures at step 0; `notes` what a reader
    must know.
    """

    runs: tuple[Run, ...]
    sets: tuple[str, ...]
    targets: tuple[str, ...]
    start: Mapping[str, SetFigure]
    start_target: SetFigure | None
    arms: tuple[ArmFigures, ...]
    baseline: str
    reference: str
    notes: tuple[str, ...]

    @property
    def subject(self) -> ArmFigures | None:
        """The arm the summary is about: cropi, else the last that is neither baseline nor reference."""
        others = [arm for arm in self.arms if arm.kind not in (self.baseline, self.reference)]
        return next((arm for arm in others if arm.kind == SUBJECT), others[-1] if others else None)


def compare(
    runs: Sequence[Run], *, baseline: str = "random", reference: str = "full", targets: Sequence[str] = ()
) -> Comparison:
    """All figures of the runs. Differences are to the arm named `baseline`, speeds to the arm named `reference`.

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
            speed=_speeds(arm, arms, reference, chosen),
        )
        for arm in arms
    ]
    arms = _adjust(arms)
    firsts = [seed for arm in arms for seed in arm.counted]
    return Comparison(
        runs=tuple(runs),
        sets=tuple(sets),
        targets=chosen,
        start={name: figure for name in sets if (figure := _set_figure(firsts, 0, (name,)))},
        start_target=_set_figure(firsts, 0, chosen),
        arms=tuple(arms),
        baseline=baseline,
        reference=reference,
        notes=tuple(_notes(arms, sets, chosen, bool(targets))),
    )


def _rank(arm: str, run: str) -> tuple[int, str, str]:
    place = LEADING.index(arm) if arm in LEADING else len(LEADING) + (arm == SUBJECT)
    return place, arm, run


def _labels(pairs: Sequence[tuple[Run, Arm]]) -> list[str]:
    if len({id(run) for run, _ in pairs}) == 1:
        return [arm.name for _, arm in pairs]
    return [f"{run.name}/{arm.name}" for run, arm in pairs]


def target_accuracy(seed: Seed, step: int, sets: Sequence[str]) -> float | None:
    """The mean accuracy over the sets at one step; None unless all were evaluated there."""
    found = [seed.evaluations.get((step, name)) for name in sets]
    if not sets or None in found:
        return None
    return mean([item.accuracy for item in found if item is not None])


def _seed_curve(seed: Seed, sets: Sequence[str]) -> dict[int, float]:
    steps = sorted({step for step, _ in seed.evaluations})
    return {step: value for step in steps if (value := target_accuracy(seed, step, sets)) is not None}


def _counted(arm: Arm, sets: Sequence[str]) -> tuple[Seed, ...]:
    last = {seed.name: max(_seed_curve(seed, sets), default=-1) for seed in arm.seeds}
    finished = [seed for seed in arm.seeds if seed.finished and last[seed.name] >= 0]
    if not finished:
        return tuple(seed for seed in arm.seeds if last[seed.name] >= 0)
    top = max(last[seed.name] for seed in finished)
    return tuple(seed for seed in finished if last[seed.name] == top)


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> tuple[tuple[int, float], ...]:
    """The mean over seeds at the steps all of them have."""
    if not curves:
        return ()
    common = set(curves[0]).intersection(*curves[1:])
    return tuple((step, mean([curve[step] for curve in curves])) for step in sorted(common))


def _error(found: Sequence[Evaluation]) -> float | None:
    """The least standard error of the mean of these independent evaluations."""
    if any(not item.prompts for item in found):
        return None
    errors = [binomial_error(item.accuracy, (item.prompts or 1) * (item.samples or 1)) for item in found]
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def _set_figure(seeds: Sequence[Seed], step: int, sets: Sequence[str]) -> SetFigure | None:
    having = [seed for seed in seeds if target_accuracy(seed, step, sets) is not None]
    if not having:
        return None
    found = [seed.evaluations[step, name] for seed in having for name in sets]
    by_seed = [mean([seed.evaluations[step, name].accuracy for name in sets]) for seed in having]
    return SetFigure(mean(by_seed), spread(by_seed), _error(found), len(having))


def _figures(run: Run, arm: Arm, label: str, sets: Sequence[str], chosen: Sequence[str]) -> ArmFigures:
    counted = _counted(arm, chosen)
    curve = _mean_curve([_seed_curve(seed, chosen) for seed in counted])
    step = curve[-1][0] if curve else None
    at_end = {} if step is None else {name: _set_figure(counted, step, (name,)) for name in sets}
    ledgers = {seed.name: seed_ledger(run, arm, seed) for seed in arm.seeds}
    return ArmFigures(
        label=label,
        kind=arm.name,
        run=run,
        arm=arm,
        counted=counted,
        step=step,
        sets={name: figure for name, figure in at_end.items() if figure},
        target=None if step is None else _set_figure(counted, step, chosen),
        curve=curve,
        seed_curves={seed.name: tuple(_seed_curve(seed, chosen).items()) for seed in arm.seeds},
        ledgers=ledgers,
        ledger=mean_ledger([ledgers[seed.name] for seed in counted or arm.seeds]),
        charged=uses_scores(arm),
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
    theirs = {seed.name: _seed_curve(seed, sets) for seed in baseline.counted}
    ours = {seed.name: _seed_curve(seed, sets) for seed in arm.counted if seed.name in theirs}
    if not ours:
        return None
    common = set.intersection(*(set(ours[name]) & set(theirs[name]) for name in ours))
    if not common or (step := max(common)) == 0:
        return None
    by_seed = {name: ours[name][step] - theirs[name][step] for name in ours}
    return Difference(baseline.label, step, by_seed, paired_interval(list(by_seed.values())))


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


def unit_curve(
    arm: ArmFigures, seeds: Sequence[Seed], sets: Sequence[str], unit: str, smooth: bool = False
) -> list[CurvePoint] | None:
    """The mean curve of the given seeds against `steps`, `seconds` or `tokens`; None if the cost is unknown.

    Against cost, a step at which the next stage is selected has two points: before and after paying for it, at one
    accuracy.
    """
    curve = _mean_curve([_seed_curve(seed, sets) for seed in seeds])
    values = smoothed([value for _, value in curve]) if smooth else [value for _, value in curve]
    heights = [(step, value) for (step, _), value in zip(curve, values, strict=True)]
    if unit == "steps":
        return [CurvePoint(step, float(step), value) for step, value in heights]
    costs = [cumulative(arm.run, arm.arm, seed, unit) for seed in seeds]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or any(step not in cost for cost in known for step, _ in heights):
        return None
    points = []
    for step, value in heights:
        arrived, ready = (mean([cost[step][side] for cost in known]) for side in (0, 1))
        points.append(CurvePoint(step, arrived, value))
        if ready > arrived:
            points.append(CurvePoint(step, ready, value))
    return points


def _speeds(arm: ArmFigures, arms: Sequence[ArmFigures], kind: str, sets: Sequence[str]) -> Mapping[str, Speed] | None:
    """None without a reference, or when the reference did not rise above its own start, so there is nothing to reach.

    The mean curves are of the seeds both arms have, where there are such, so that luck of the seed falls on both alike.
    """
    reference = _partner(arm, arms, kind)
    if reference is None or not reference.curve or not arm.curve:
        return None
    theirs = {seed.name: seed for seed in reference.counted}
    paired = [(seed, theirs[seed.name]) for seed in arm.counted if seed.name in theirs]
    ours, others = [seed for seed, _ in paired] or arm.counted, [seed for _, seed in paired] or reference.counted
    speeds = {}
    for unit in ("steps", *UNITS):
        their_curve = unit_curve(reference, others, sets, unit, smooth=True)
        our_curve = unit_curve(arm, ours, sets, unit, smooth=True)
        if not their_curve or not our_curve:
            continue
        if their_curve[-1].value <= their_curve[0].value:
            return None
        needed, ratio = _ratio(our_curve, their_curve)
        by_seed = {
            seed.name: _ratio(
                unit_curve(arm, [seed], sets, unit, smooth=True),
                unit_curve(reference, [other], sets, unit, smooth=True),
            )[1]
            for seed, other in paired
        }
        is_smooth = len({point.step for point in their_curve}) >= SMOOTH_FROM
        speeds[unit] = Speed(reference.label, their_curve[-1].value, is_smooth, needed, ratio, by_seed)
    return speeds


def _ratio(ours: list[CurvePoint] | None, theirs: list[CurvePoint] | None) -> tuple[float | None, float | None]:
    """(what we needed, theirs / ours) to the reference's final accuracy; None where it was not reached."""
    if not ours or not theirs:
        return None, None
    needed, baseline = (
        first_crossing([point.cost for point in curve], [point.value for point in curve], theirs[-1].value)
        for curve in (ours, theirs)
    )
    return needed, (baseline / needed if needed and baseline else None)


def _notes(arms: Sequence[ArmFigures], sets: Sequence[str], chosen: Sequence[str], asked: bool) -> list[str]:
    notes = []
    for arm in arms:
        for seed in arm.unfinished:
            stage = next(stage for stage in seed.stages if not stage.finished)
            counts = "counted" if seed in arm.counted else "not counted in the means"
            notes.append(
                f"{arm.label}, seed {seed.name}: stage {stage.number} is unfinished (step {stage.steps}); {counts}."
            )
        behind = [seed.name for seed in arm.arm.seeds if seed.finished and seed not in arm.counted and seed.evaluations]
        if behind:
            notes.append(
                f"{arm.label}: seed {', '.join(behind)} ends before the others and is not counted in the means."
            )
        if not any(seed.evaluations for seed in arm.arm.seeds):
            notes.append(f"{arm.label}: no evaluation yet.")
    left_out = [] if asked else [name for name in sets if name not in chosen]
    for name in left_out:
        missing = [arm.label for arm in arms if arm.curve and all(name not in seed.sets for seed in arm.arm.seeds)]
        notes.append(f"Set {name} was not evaluated in {', '.join(missing)}: it is left out of the mean.")
    notes += _start_notes(arms, chosen)
    return notes


def _start_notes(arms: Sequence[ArmFigures], sets: Sequence[str]) -> list[str]:
    """Equal seeds should start from equal weights: a difference beyond evaluation noise is said."""
    notes = []
    for name in sorted({seed.name for arm in arms for seed in arm.arm.seeds}):
        starts = [
            (value, _error([seed.evaluations[0, each] for each in sets]) or 0.0)
            for arm in arms
            for seed in arm.arm.seeds
            if seed.name == name and (value := target_accuracy(seed, 0, sets)) is not None
        ]
        if not starts:
            continue
        low, high = min(starts), max(starts)
        if high[0] - low[0] > 4 * max(low[1], high[1]):
            notes.append(
                f"Seed {name}: the arms start between {100 * low[0]:.1f} and {100 * high[0]:.1f} %, not from "
                "the same policy."
            )
    return notes
