"""What a reader of a comparison must know: what is unfinished, missing, left out, or not as it should be."""

from __future__ import annotations

from collections.abc import Sequence

from cropi_tools.report.accuracy import evaluation_error, seed_curve, target_accuracy
from cropi_tools.report.structures import ArmFigures


def notes_on(
    arms: Sequence[ArmFigures], sets: Sequence[str], chosen: Sequence[str], asked: bool, reference: str
) -> list[str]:
    """All notes. chosen: the sets of the mean; asked: whether they were asked for; reference: the arm that speeds are to."""
    notes = []
    for arm in arms:
        for seed in arm.unfinished:
            stage = next(stage for stage in seed.stages if not stage.finished)
            counts = "counted" if seed in arm.counted else "not counted in the means"
            notes.append(
                f"{arm.label}, seed {seed.name}: stage {stage.number} is unfinished (step {stage.steps}); {counts}."
            )
        behind = [
            seed.name
            for seed in arm.arm.seeds
            if seed.finished and seed not in arm.counted and seed_curve(seed, chosen)
        ]
        if behind:
            notes.append(
                f"{arm.label}: seed {', '.join(behind)} ends before the others and is not counted in the means."
            )
        if not any(seed.evaluations for seed in arm.arm.seeds):
            notes.append(f"{arm.label}: no evaluation yet.")
        notes += _missing_evaluations(arm, chosen)
        notes += _unpaired(arm, arms)
    notes += _about_speeds(arms, reference)
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
            (value, evaluation_error([seed.evaluations[0, each] for each in sets]) or 0.0)
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


def _missing_evaluations(arm: ArmFigures, sets: Sequence[str]) -> list[str]:
    """What is left out of an arm's mean curve since not every seed has it."""
    notes = []
    none = [seed.name for seed in arm.arm.seeds if seed.finished and not seed_curve(seed, sets)]
    if none and any(seed.evaluations for seed in arm.arm.seeds):
        notes.append(
            f"{arm.label}: seed {', '.join(none)} was never evaluated on all sets of the mean and is not counted."
        )
    steps = [set(seed_curve(seed, sets)) for seed in arm.counted]
    partial = set().union(*steps) - set(step for step, _ in arm.curve)
    if partial:
        shown = ", ".join(str(step) for step in sorted(partial)[:5]) + (", ..." if len(partial) > 5 else "")
        notes.append(f"{arm.label}: not every counted seed was evaluated at step {shown}: left out of its mean curve.")
    return notes


def _about_speeds(arms: Sequence[ArmFigures], reference: str) -> list[str]:
    """Why there are no speed-ups, or not in every unit."""
    found = [arm for arm in arms if arm.kind == reference and arm.curve]
    others = [arm for arm in arms if arm.kind != reference and arm.curve]
    if found and others and not any(arm.speed for arm in others):
        return [
            f"{reference} does not rise above its start, so there is no accuracy of its own to reach; --threshold sets one."
        ]
    notes = []
    for unit, what in (("seconds", "time"), ("tokens", "tokens")):
        without = [arm.label for arm in others if arm.speed and unit not in arm.speed]
        if without and len(without) < len([arm for arm in others if arm.speed]):
            notes.append(f"{', '.join(without)}: the {what} of some steps is not logged: no speed-up in {what}.")
    return notes


def _unpaired(arm: ArmFigures, arms: Sequence[ArmFigures]) -> list[str]:
    """Seeds that one arm has and its baseline has not."""
    if arm.difference is None:
        return []
    baseline = next(other for other in arms if other.label == arm.difference.baseline)
    alone = {seed.name for seed in arm.arm.seeds} ^ {seed.name for seed in baseline.arm.seeds}
    if not alone:
        return []
    paired = len(arm.difference.by_seed)
    return [
        f"{arm.label}: seed {', '.join(sorted(alone))} is not in both this arm and {baseline.label}; the difference pairs "
        f"the {'one' if paired == 1 else paired} that {'is' if paired == 1 else 'are'}."
    ]
