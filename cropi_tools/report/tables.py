"""The figures as a table for the terminal, and as one JSON object."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cropi_tools.report.costs import UNITS, Ledger
from cropi_tools.report.formatting import (
    NOTHING,
    UNSPLIT,
    arm_name,
    count,
    difference,
    difference_reason,
    duration,
    figure,
    limits,
    null_median,
    null_range,
    p_value,
    percent,
    seed_outcome,
    speed,
    speed_interval,
    speed_range,
    summary,
    threshold_words,
)
from cropi_tools.report.points import seed_points
from cropi_tools.report.speeds import Null, Speed
from cropi_tools.report.structures import ArmFigures, Comparison, SetFigure
from cropi_tools.runtime.errors import printable


@dataclass(frozen=True)
class Section:
    """One table of the report: the same on the terminal and in the page."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    caption: str


def sections(comparison: Comparison) -> list[Section]:
    """Accuracy at the end, speed to the reference's accuracy, and cost. Columns without figures are left out."""
    found = [_accuracy(comparison), _speed(comparison), _cost(comparison)]
    return [_without_empty_columns(section) for section in found if section.rows]


def _accuracy(comparison: Comparison) -> Section:
    start = [percent(item.mean) if (item := comparison.start.get(name)) else NOTHING for name in comparison.sets]
    first = percent(comparison.start_target.mean) if comparison.start_target else NOTHING
    rows = [["start", "0", "", *start, first, "", ""]]
    for arm in comparison.arms:
        at = f" at {arm.difference.step}" if arm.difference and arm.difference.step != arm.step else ""
        rows.append(
            [
                arm_name(arm) + ("*" if arm.unfinished else ""),
                NOTHING if arm.step is None else str(arm.step),
                str(len(arm.counted)),
                *(percent(arm.sets[name].mean) if name in arm.sets else NOTHING for name in comparison.sets),
                figure(arm.target),
                difference(arm.difference) + at,
                p_value(arm.difference.adjusted_p if arm.difference else None),
            ]
        )
    gap = f"vs {comparison.baseline} [95 %]"
    spreads = any(arm.target and arm.target.spread is not None for arm in comparison.arms)
    caption = f"mean: over {', '.join(comparison.targets)}; "
    caption += (
        "± is the standard deviation over seeds"
        if spreads
        else "[ ] is the 95 % interval of the evaluations (one seed)"
    )
    caption += "; * not finished" if any(arm.unfinished for arm in comparison.arms) else ""
    headings = ["arm", "steps", "seeds", *comparison.sets, "mean", gap, "p (Holm)"]
    return Section("Accuracy at the end, %", headings, rows, caption)


def _speed(comparison: Comparison) -> Section:
    """The speed-ups, and after them what the same rule gives for each reference against itself."""
    rows, nulls, words = [], {}, ""
    for arm in comparison.arms:
        if arm.speed:
            steps = arm.speed["steps"]
            needed = NOTHING if steps.needed is None else f"{steps.needed:.0f}"
            costs = [cell for unit in UNITS for cell in _cost_cells(arm.speed.get(unit))]
            rows.append([arm_name(arm), needed, speed(steps), speed_interval(steps), speed_range(steps), *costs])
            nulls[steps.reference] = {unit: item.null for unit, item in arm.speed.items()}
            words = threshold_words(steps)
    for reference, found in nulls.items():
        steps_null = found["steps"]
        costs = [cell for unit in UNITS for cell in _null_cells(found[unit])] if len(found) > 1 else [NOTHING] * 4
        row = [f"null: {reference}, seed against seed", "", null_median(steps_null), "", null_range(steps_null)]
        rows.append([*row, *costs])
    headings = [
        "arm",
        "steps needed",
        "steps",
        "interval",
        "seed by seed",
        "device time",
        "interval",
        "tokens",
        "interval",
    ]
    caption = f"times less than {comparison.reference} needs up to {words}; time and tokens count selection, below 1 means more; "
    caption += "null: two equal arms, by each two seeds of the same one"
    return Section("Speed-up to a mean accuracy", headings, rows, caption)


def _cost_cells(value: Speed | None) -> list[str]:
    return [speed(value), speed_interval(value)]


def _null_cells(value: Null | None) -> list[str]:
    return [null_median(value), NOTHING if value is None else null_range(value)]


def _cost(comparison: Comparison) -> Section:
    """Device seconds by what they went into, then tokens by what was done with them."""
    rows = []
    for arm in comparison.arms:
        ledger, total = arm.ledger, arm.ledger.total
        rows.append(
            [
                arm_name(arm),
                *(duration(cost.seconds) for cost in (ledger.sampling, ledger.scoring, ledger.training)),
                duration(ledger.evaluation),
                duration(total.seconds),
                duration(total.start),
                *(count(value) for value in (total.generated, total.trained, total.scored)),
            ]
        )
    headings = [
        "arm",
        "pool",
        "selecting",
        "training",
        "evaluating",
        "total",
        "start",
        "generated",
        "trained on",
        "scored",
    ]
    caption = "device time of work, then tokens, of one seed on average; evaluating and start (imports, loading, compiling) are not in total"
    if any(arm.ledger.unsplit for arm in comparison.arms):
        caption += ". " + UNSPLIT.rstrip(".")
    return Section("Cost of one seed", headings, rows, caption)


def _without_empty_columns(section: Section) -> Section:
    kept = [
        index for index in range(len(section.headings)) if any(row[index] not in ("", NOTHING) for row in section.rows)
    ]
    headings = [section.headings[index] for index in kept]
    return Section(section.title, headings, [[row[index] for index in kept] for row in section.rows], section.caption)


def print_tables(comparison: Comparison, stream: TextIO) -> None:
    """The summary, the tables and the notes as text; not cut to a width when the stream is no terminal.

    Names in them stand as they are, without what is no visible character, and are no markup.
    """
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 250)
    console.print(_literal(" ".join(summary(comparison))), soft_wrap=not stream.isatty())
    for section in sections(comparison):
        table = Table(
            title=section.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False
        )
        table.pad_edge, table.collapse_padding = False, True
        table.caption, table.caption_justify = _literal(section.caption, "table.caption"), "left"
        for index, heading in enumerate(section.headings):
            table.add_column(
                _literal(heading), justify="right" if index else "left", overflow="fold", no_wrap=index == 0
            )
        for row in section.rows:
            table.add_row(*(_literal(cell) for cell in row))
        console.print()
        console.print(table)
    for note in comparison.notes:
        console.print(_literal(f"* {note}"), soft_wrap=not stream.isatty())


def _literal(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The same figures as plain values: accuracies 0..1, seconds, tokens; null where there is none."""
    return {
        "runs": [str(run.folder) for run in comparison.runs],
        "sets": list(comparison.sets),
        "targets": list(comparison.targets),
        "baseline": comparison.baseline,
        "reference": comparison.reference,
        "threshold": comparison.threshold,
        "summary": " ".join(summary(comparison)),
        "start": {
            "sets": {name: item.mean for name, item in comparison.start.items()},
            "mean": comparison.start_target.mean if comparison.start_target else None,
        },
        "arms": {arm.label: _arm_json(arm) for arm in comparison.arms},
        "notes": list(comparison.notes),
        "limits": limits(comparison),
    }


def _figure_json(value: SetFigure | None) -> dict[str, Any] | None:
    if value is None:
        return None
    figures = {"mean": value.mean, "spread": value.spread, "error_at_least": value.error, "seeds": value.seeds}
    return {**figures, "interval": value.interval and list(value.interval)}


def _ledger_json(ledger: Ledger) -> dict[str, Any]:
    return {**asdict(ledger), "total": {**asdict(ledger.total), "tokens": ledger.total.tokens}}


def _arm_json(arm: ArmFigures) -> dict[str, Any]:
    gap, interval = arm.difference, arm.difference.interval if arm.difference else None
    return {
        "step": arm.step,
        "seeds": [seed.name for seed in arm.counted],
        "unfinished_seeds": [seed.name for seed in arm.unfinished],
        "sets": {name: _figure_json(item) for name, item in arm.sets.items()},
        "target": _figure_json(arm.target),
        "curve": [[step, value] for step, value in arm.curve],
        "points": seed_points(arm),
        "difference": gap
        and {
            "baseline": gap.baseline,
            "step": gap.step,
            "mean": gap.mean,
            "by_seed": dict(gap.by_seed),
            "interval": [interval.low, interval.high] if interval else None,
            "no_interval": None if interval else difference_reason(gap),
            "seeds_left_out": list(gap.alone),
            "p": interval.p if interval else None,
            "p_holm": gap.adjusted_p,
        },
        "speed": {unit: _speed_json(item) for unit, item in (arm.speed or {}).items()},
        "cost": {
            "charged_for_start": arm.charged,
            "mean_of_one_seed": _ledger_json(arm.ledger),
            "by_seed": {name: _ledger_json(ledger) for name, ledger in arm.ledgers.items()},
        },
    }


def _speed_json(item: Speed) -> dict[str, Any]:
    """Open ends of intervals are null, and `open` names them."""
    low, high = item.interval or (0.0, math.inf)
    return {
        "threshold": item.threshold,
        "threshold_chosen": "beforehand" if item.beforehand else "after the fact",
        "needed": item.needed,
        "reference_needed": item.reference_needed,
        "ratio": item.ratio,
        "in_words": speed(item),
        "interval": item.interval and [low or None, None if math.isinf(high) else high],
        "open": [name for name, end in (("low", low == 0), ("high", math.isinf(high))) if end]
        if item.interval
        else None,
        "confidence": item.confidence if item.interval else None,
        "by_seed": {name: factor.exact for name, factor in item.by_seed.items()},
        "seeds": {name: seed_outcome(factor) for name, factor in item.by_seed.items()},
        "null": item.null and asdict(item.null),
    }
