"""The tables of the comparison in Markdown, and where they stand in docs/results.md."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from plan import ROOT

from cropi_tools.report.statistics import mean

if TYPE_CHECKING:
    from analyze import Bench, Contrast, Final

PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
MAIN = ("full", "dapo", "random", "learnability", "complete", "cropi", "families")
NOTHING = "–"
UNITS_IN_WORDS = {
    "steps": "times fewer steps",
    "tokens": "times fewer tokens",
    "work_seconds": "times fewer seconds",
    "all_seconds": "starting included",
}
NAMES = {
    "full": "full pool (GRPO)",
    "dapo": "full pool (dynamic sampling)",
    "random": "random tenth",
    "hardest": "hardest tenth",
    "learnability": "learnability tenth",
    "pass-rate": "pass-rate tenth",
    "complete": "CROPI as published",
    "cropi": "CROPI, probing",
    "static": "static influence",
    "shuffled": "CROPI shuffled",
    "families": "random, targets' families",
    "oracle": "oracle",
}


def tables(bench: Bench) -> str:
    """Everything the page says of a bed in figures."""
    goals = "; ".join(goals_of(bench))
    return "\n\n".join(
        [arms_table(bench), differences_table(bench), f"Goals: {goals}.", null_words(bench), unplanned_table(bench)]
    )


def arms_table(bench: Bench) -> str:
    wrong = bool(bench.bed.wrong_references)
    head = [
        "arm",
        "targets, %",
        "other families, %",
        f"steps to {percent(bench.threshold)} %",
        UNITS_IN_WORDS["steps"],
    ]
    units = [unit for unit in UNITS_IN_WORDS if unit in bench.units and unit != "steps"]
    head += ["seeds there", *(UNITS_IN_WORDS[unit] for unit in units), "of the targets' families"]
    head += ["wrong references"] * wrong
    start = [bench.start(sets) for sets in (bench.bed.targets, bench.bed.untargeted)]
    rows = [["the start", *map(percent, start), *[""] * (len(head) - 3)]]
    for name, arm in bench.arms.items():
        over = name != "full"
        row = [NAMES.get(name, name), interval(bench.finals[name]), percent(bench.untargeted[name].mean)]
        steps = bench.speed(name, "steps")
        row.append("not reached" if steps.needed is None else f"{steps.needed:.0f}")
        row += [speedup(bench, name, "steps") if over else "1"]
        row += [f"{sum(factor.arm_reached for factor in steps.by_seed.values())} of {len(bench.seeds)}"]
        row += [speedup(bench, name, unit) if over else "1" for unit in units]
        row += [share(arm.selected, "targets")] + [share(arm.selected, "wrong")] * wrong
        rows.append(row)
    return table(head, rows)


def main_table(benches: Sequence[Bench]) -> str:
    """The arms that a reader asks for first, over all beds, in the unit that a bed's goal is in, or in steps."""
    units = [next((unit for unit in UNITS_IN_WORDS if unit in bench.bed.goals), "steps") for bench in benches]
    head = ["trained on"]
    for bench, unit in zip(benches, units, strict=True):
        title = bench.bed.title.split(":")[0]
        head += [f"{title}: accuracy, %", UNITS_IN_WORDS[unit]]
    rows = [
        ["nothing (the start)", *(text for bench in benches for text in (percent(bench.start(bench.bed.targets)), ""))]
    ]
    for name in MAIN:
        row = [NAMES.get(name, name)]
        for bench, unit in zip(benches, units, strict=True):
            if name not in bench.arms:
                row += ["", ""]
                continue
            row += [interval(bench.finals[name]), "1" if name == "full" else speedup(bench, name, unit)]
        rows.append(row)
    return table(head, rows)


def differences_table(bench: Bench) -> str:
    subject = NAMES.get(bench.bed.subject, bench.bed.subject)
    head = [
        f"{subject}, less",
        "points",
        "95 %",
        f"corrected for {len(bench.bed.controls)}",
        "p (Holm)",
        "by starting policy",
    ]
    rows = []
    for contrast in bench.contrasts:
        corrected, p = contrast.corrected, contrast.p
        name, points, usual, policies = contrast_row(contrast)
        rows.append(
            [name, points, usual, f"[{signed(corrected.low)}, {signed(corrected.high)}]" if corrected else NOTHING]
        )
        rows[-1] += [NOTHING if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0"), policies]
    return table(head, rows)


def unplanned_table(bench: Bench) -> str:
    """Differences that the plan does not name."""
    head = ["not planned, not corrected", "points", "95 %", "by starting policy"]
    rows = []
    for contrast in bench.unplanned:
        name, *figures = contrast_row(contrast)
        rows.append([f"{NAMES.get(contrast.arm, contrast.arm)}, less {name}", *figures])
    return table(head, rows)


def contrast_row(contrast: Contrast) -> list[str]:
    """The control, the difference, its interval, and the difference by starting policy."""
    found = contrast.interval
    return [
        NAMES.get(contrast.control, contrast.control),
        signed(mean(contrast.by_seed)),
        f"[{signed(found.low)}, {signed(found.high)}]" if found else NOTHING,
        ", ".join(signed(value) for value in contrast.by_policy),
    ]


def null_words(bench: Bench) -> str:
    """What two equal arms come to."""
    if not bench.null("steps"):
        return "Null: no two seeds have one starting policy."
    said = []
    for unit, word in (("steps", "steps"), ("work_seconds", "seconds")):
        found = bench.null(unit)
        known = sorted(factor.exact for factor in found if factor.exact is not None)
        text = f"{known[0]:.2f} to {known[-1]:.2f} in {word}" if known else f"nothing in {word}"
        said.append(text)
        missed = len(found) - len(known)
    return (
        f"Null: two seeds of the full pool with one starting policy differ by a factor of {' and '.join(said)}; in {missed} of "
        f"{len(found)} pairs one or both never get there."
    )


def goals_of(bench: Bench) -> list[str]:
    """The goals of the plan, met or missed, a line each."""
    lines = []
    for unit in ("steps", "work_seconds"):
        if unit not in bench.bed.goals:
            continue
        found = bench.speed(bench.bed.subject, unit)
        low = found.interval[0] if found.interval else 0.0
        for what, value, goal in (
            (f"fewer {unit}", found.ratio or bench.at_least(bench.bed.subject, unit) or 0.0, bench.bed.goals[unit]),
            (f"fewer {unit}, lower bound", low, bench.bed.goals["low"]),
        ):
            lines.append(f"{what}: {value:.2f}, goal {goal:g}, {'met' if value >= goal else 'MISSED'}")
    for contrast in bench.contrasts:
        low = contrast.corrected.low if contrast.corrected else -math.inf
        lines.append(
            f"above {contrast.control}: corrected from {100 * low:+.1f} points, {'met' if low > 0 else 'MISSED'}"
        )
    return lines


def speedup(bench: Bench, name: str, unit: str) -> str:
    found = bench.speed(name, unit)
    least = bench.at_least(name, unit)
    if found.ratio is None and least is None:
        return "not reached" if found.needed is None else NOTHING
    text = f"{found.ratio:.2f}" if least is None else f"at least {least:.2f}"
    if found.interval is None:
        return text
    low, high = found.interval
    ends = ("0" if low == 0 else f"{low:.2f}", "∞" if math.isinf(high) else f"{high:.2f}")
    return f"{text} [{', '.join(ends)}]"


def share(stages: tuple[object, ...], kind: str) -> str:
    """Of the prompts chosen over all seeds and stages, the share of a kind."""
    each = [stage for seed in stages for stage in seed]  # type: ignore[attr-defined]
    return (
        f"{sum(stage[kind] for stage in each) / max(1, sum(stage['prompts'] for stage in each)):.2f}".lstrip("0") or "0"
    )


def interval(value: Final) -> str:
    return f"{percent(value.mean)} [{percent(value.low)}, {percent(value.high)}]"


def percent(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:.1f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill_page(found: Mapping[str, str]) -> None:
    """Put the tables where the pages have their marks, `<!-- table NAME -->` to `<!-- end -->`."""
    for page in PAGES:
        text = page.read_text()
        for name, tables in found.items():
            text = re.sub(
                rf"(<!-- table {name} -->\n).*?(<!-- end -->)",
                lambda mark, tables=tables: f"{mark[1]}\n{tables}\n\n{mark[2]}",  # type: ignore[misc]
                text,
                flags=re.S,
            )
        page.write_text(text)
