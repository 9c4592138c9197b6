"""Figures in words: the same phrasing on the terminal, in the page and in plots, and two sentences as a summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from cropi_tools.report.speeds import Factor, Null, Speed
from cropi_tools.report.statistics import CONFIDENCE
from cropi_tools.report.structures import ArmFigures, Comparison, Difference, SetFigure

NOTHING = "–"
MINUS = "−"
UNSPLIT = "Start is not recorded apart in ledgers of an earlier version: all their seconds count as work, those of training with evaluations."
_NAMES = {"random": "random", "full": "full data", "cropi": "CROPI"}


def arm_name(arm: ArmFigures) -> str:
    """The arm as people call it; with several runs, RUN/ARM."""
    return _NAMES.get(arm.kind, arm.kind) if arm.label == arm.kind else arm.label


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of accuracies in percentage points, signed."""
    text = f"{abs(100 * value):.1f}"
    return ("" if float(text) == 0 else "+" if value > 0 else MINUS) + text


def figure(value: SetFigure | None) -> str:
    """`61.2 ± 0.8` (standard deviation over seeds); with one seed the 95 % interval of its evaluations, `61.2 [58.9, 63.5]`."""
    if value is None:
        return NOTHING
    if value.spread is not None:
        equal = " (equal in all seeds)" if value.spread < 1e-12 else ""
        return f"{percent(value.mean)} ± {percent(value.spread)}{equal}"
    limits = f" [{percent(value.interval[0])}, {percent(value.interval[1])}]" if value.interval else " (1 seed)"
    return percent(value.mean) + limits


def count(value: float | None) -> str:
    """`950`, `12.3k`, `4.57M`, `1.2G`."""
    if value is None:
        return NOTHING
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """`9.5 s`, `142 s`, `12 min`, `3.4 h`."""
    if seconds is None:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def seeds_text(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def difference(value: Difference | None) -> str:
    """`+2.1 [+0.4, +3.8]` in points, or why there is no interval."""
    if value is None:
        return NOTHING
    if value.interval:
        return f"{points(value.mean)} [{points(value.interval.low)}, {points(value.interval.high)}]"
    return f"{points(value.mean)} ({difference_reason(value)})"


def difference_reason(value: Difference) -> str:
    """Why a difference has no interval."""
    return "1 seed: no interval" if len(value.by_seed) == 1 else "equal in all seeds: no interval"


def p_value(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def speed(value: Speed | None) -> str:
    """`2.03x`; `at the start` where the arm needs nothing, `not reached` where it never gets there."""
    if value is None:
        return NOTHING
    if value.ratio is not None:
        return f"{value.ratio:.2f}x"
    if value.needed is None:
        return "not reached"
    return "at the start" if value.needed == 0 else f"{value.reference} not reached"


def speed_interval(value: Speed | None) -> str:
    """`[1.90, 2.20]`; open ends in words, and the confidence where it is not the usual one."""
    if value is None:
        return NOTHING
    if value.interval is None and value.needed == 0:
        return "no step: no interval"
    if value.interval is None:
        return f"{seeds_text(len(value.by_seed)) if value.by_seed else 'no common seed'}: no interval"
    (low, high), level = value.interval, value.confidence
    if low == 0 and math.isinf(high):
        text = "anything"
    elif low == 0:
        text = f"at most {high:.2f}"
    else:
        text = f"at least {low:.2f}" if math.isinf(high) else f"[{low:.2f}, {high:.2f}]"
    return text if level >= CONFIDENCE else f"{text} ({100 * level:.0f} %)"


def speed_range(value: Speed | None) -> str:
    """The same ratio seed by seed, `1.95 to 2.13`, and how many seeds have none and why."""
    if value is None or len(value.by_seed) < 2:
        return NOTHING
    ratios = [factor.exact for factor in value.by_seed.values() if factor.exact is not None]
    text = []
    if ratios:
        text.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}")
    for outcome, count in Counter(seed_outcome(factor) for factor in value.by_seed.values()).items():
        if outcome != "reached":
            text.append(f"{outcome} in {count} of {len(value.by_seed)}")
    return ", ".join(text)


def seed_outcome(factor: Factor) -> str:
    """What became of one seed: `reached`, `at the start`, `both at the start`, `not reached`, `reference not reached`, `neither reached`."""
    if factor.at_start:
        return "both at the start"
    if factor.both_reached:
        return "at the start" if math.isinf(factor.low) else "reached"
    if factor.arm_reached:
        return "reference not reached"
    return "not reached" if factor.reference_reached else "neither reached"


def null_range(value: Null | None) -> str:
    """`0.91 to 1.10, not reached in 4 of 20` of the pairs of seeds of one arm; `1 seed: no null`."""
    if value is None:
        return "1 seed: no null"
    text = NOTHING if value.low is None or value.high is None else f"{value.low:.2f} to {value.high:.2f}"
    return text + (f", not reached in {value.missed} of {value.pairs}" if value.missed else "")


def null_median(value: Null | None) -> str:
    return NOTHING if value is None or value.median is None else f"{value.median:.2f}x"


def threshold_words(value: Speed) -> str:
    """Where the threshold comes from."""
    if value.beforehand:
        return f"{percent(value.threshold)} %, set by --threshold"
    return f"{percent(value.threshold)} %, the mean of {_evaluations(value)} over its seeds: chosen after the fact"


def _evaluations(value: Speed) -> str:
    return f"{value.reference}'s " + ("last evaluation" if value.late == 1 else f"last {value.late} evaluations")


def summary(comparison: Comparison) -> tuple[str, str]:
    """Two sentences: how the arm in question compares with the baseline, and how soon it got to the reference."""
    arm = comparison.subject
    if arm is None or arm.target is None or arm.step is None:
        return "There is no arm with evaluations to compare with a baseline yet.", "The figures so far are below."
    first = f"After {arm.step} steps {arm_name(arm)} reaches {percent(arm.target.mean)} % mean target accuracy"
    first += f" ({seeds_text(len(arm.counted))})" + _versus(arm, comparison)
    return first, _sooner(arm, comparison)


def _versus(arm: ArmFigures, comparison: Comparison) -> str:
    gap = arm.difference
    if gap is None:
        return f"; there is no {comparison.baseline} arm with the same seeds to set it against."
    way = "above" if gap.mean >= 0 else "below"
    text = f", {abs(100 * gap.mean):.1f} points {way} {gap.baseline}"
    if gap.step != arm.step:
        text += f" at step {gap.step}"
    if gap.interval is None:
        seeds = len(gap.by_seed)
        return text + (
            ", with one seed and so no interval: this shows no difference."
            if seeds == 1
            else ", equally in every seed."
        )
    low, high = points(gap.interval.low), points(gap.interval.high)
    text += f"; the paired {100 * CONFIDENCE:.0f} % interval over {len(gap.by_seed)} seeds is {low} to {high}"
    if gap.interval.includes_zero:
        return text + " and includes zero, so no difference is shown."
    tests = sum(1 for other in comparison.arms if other.difference and other.difference.interval)
    if gap.adjusted_p is not None and gap.adjusted_p >= 1 - CONFIDENCE:
        text += f" and excludes zero, but not after allowing for {tests} comparisons"
        return text + f" (Holm p = {p_value(gap.adjusted_p)})."
    return text + " and excludes zero."


def _sooner(arm: ArmFigures, comparison: Comparison) -> str:
    speeds = arm.speed
    if speeds is None:
        others = [other for other in comparison.arms if other.kind == comparison.reference and other.curve]
        if others and comparison.threshold is None:
            return f"{comparison.reference} does not rise above its start, so steps to its accuracy cannot be compared."
        return f"There is no {comparison.reference} arm with evaluations, so steps to an accuracy cannot be compared."
    steps = speeds["steps"]
    goal = f"{percent(steps.threshold)} %" + ("" if steps.beforehand else f" (the mean of {_evaluations(steps)})")
    interval = (
        f" (interval {speed_interval(steps)}, seeds of {steps.reference} among themselves {null_range(steps.null)})"
    )
    if steps.needed is None:
        return f"It does not reach {goal} within its {arm.step} steps{interval}."
    if steps.needed == 0:
        return f"It starts at or above {goal}, so no step is needed."
    if steps.ratio is None:
        return f"It reaches {goal} after {steps.needed:.0f} steps, which {steps.reference} does not{interval}."
    text = f"It reaches {goal} {_times(steps.ratio, 'steps')}{interval}"
    cost = _cost_words(speeds)
    return text + (f"; counting what selection costs, {cost}." if cost else "; what selection costs is not recorded.")


def _cost_words(speeds: Mapping[str, Speed]) -> str:
    parts = []
    for unit, what in (("seconds", "device time"), ("tokens", "tokens")):
        if unit in speeds and speeds[unit].ratio is not None:
            parts.append(f"it takes {_times(speeds[unit].ratio or 0.0, what)}")
    return " and ".join(parts).replace(" and it takes", " and")


def _times(ratio: float, what: str) -> str:
    """`in 2.03 times fewer steps`; below one, more of it."""
    less, verb = ("fewer", "in ") if what == "steps" else ("less" if what != "tokens" else "fewer", "")
    if ratio >= 1:
        return f"{verb}{ratio:.2f} times {less} {what}"
    return f"{verb}{1 / ratio:.2f} times more {what}"


def limits(comparison: Comparison) -> list[str]:
    """What the figures cannot carry: seeds, comparisons, evaluation noise, how the mean and the ratios were made."""
    found = []
    numbers = sorted({len(arm.counted) for arm in comparison.arms})
    if not numbers or numbers[-1] == 0:
        found.append("No seed has been evaluated yet.")
    elif numbers[-1] == 1:
        found.append("One seed: no interval can be given, and the order of the arms may change with another seed.")
    else:
        shown = " to ".join(str(number) for number in (numbers[:1] if len(numbers) == 1 else (numbers[0], numbers[-1])))
        found.append(
            f"{shown} seeds an arm. Differences are paired by seed; intervals are Student's t over seeds, "
            "one arm at a time; p-values are Holm's over all arms of this report."
        )
        if numbers[-1] < 5:
            found.append("Fewer than five seeds resolve only large differences: a wide interval shows little.")
    errors = [arm.target.error for arm in comparison.arms if arm.target and arm.target.error is not None]
    if errors:
        found.append(
            f"Evaluation noise: the standard error of an arm's mean accuracy is at least {percent(max(errors))} points "
            "from the number of responses alone (samples of one prompt are not independent, so it is larger)."
        )
    found.append(f"Mean target accuracy is the plain mean over: {', '.join(comparison.targets) or 'no set'}.")
    speeds = [arm.speed["steps"] for arm in comparison.arms if arm.speed and "steps" in arm.speed]
    if speeds:
        found.append(
            f"Speed-ups are to {threshold_words(speeds[0])}. They are read off the mean curves, by the same rule for both arms, "
            "interpolated between evaluations; intervals are a bootstrap over paired seeds. Two equal arms differ by chance as well: the row "
            f"of {speeds[0].reference} compares its seeds with each other. Fewer than five seeds have no 95 % interval of a speed-up."
        )
    found.append(
        "An arm is charged in full, for each seed, what its selection read of the shared first stage: everything for influence, the rollouts "
        "of validation and the features for stages that probe, the rollouts of the pool for learnability, hardest and pass-rate, nothing for "
        "random and full. Seconds are device seconds of work, shards and processes added up; starting (imports, loading, compiling) "
        "and evaluating are apart. They depend on the machine and what else ran on it."
    )
    if any(arm.ledger.unsplit for arm in comparison.arms):
        found.append(UNSPLIT)
    return found
