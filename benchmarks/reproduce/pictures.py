"""The pictures of the comparison: learning curves of a bed, and how many times less than the full pool the arms need on every bed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tables import NAMES

from cropi_tools.report.statistics import t_quantile

if TYPE_CHECKING:
    from analyze import Bench
    from matplotlib.axes import Axes

COLORS = {
    "cropi": "#d55e00",
    "complete": "#e69f00",
    "static": "#009e73",
    "random": "#8a8a8a",
    "full": "#0072b2",
    "dapo": "#004c78",
    "learnability": "#cc79a7",
    "pass-rate": "#b8860b",
    "hardest": "#a05a2c",
    "shuffled": "#56b4e9",
    "families": "#7b5ea7",
    "oracle": "#333333",
}
BOLD = ("cropi", "full", "random")
METADATA = {"Software": None}


def draw_curves(bench: Bench, path: Path) -> None:
    """Accuracy on the targets and on other families over steps: means over seeds, bands of their t intervals for three arms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    targets, others = figure.subplots(1, 2, width_ratios=(1.4, 1))
    curves(bench, targets, bench.bed.targets, bands=True)
    targets.axhline(100 * bench.threshold, color="#777777", linewidth=0.8, linestyle=":")
    targets.annotate(
        "threshold",
        (0, 100 * bench.threshold),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
        color="#555555",
    )
    targets.set_title(f"targets: {', '.join(bench.bed.targets)}", fontsize=10.5)
    curves(bench, others, bench.bed.untargeted, bands=False)
    others.set_title("other families, which no arm aims at", fontsize=10.5)
    for axes in (targets, others):
        axes.set_xlabel("training steps")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    targets.set_ylabel("accuracy, %")
    handles, names = targets.get_legend_handles_labels()
    order = np.argsort([-bench.finals[name].mean for name in bench.arms])
    figure.legend(
        [handles[i] for i in order], [names[i] for i in order], loc="outside right center", frameon=False, fontsize=9
    )
    means = [100 * arm.on(bench.bed.targets).mean(0) for arm in bench.arms.values()]
    targets.set_ylim(min(map(np.min, means)) - 4, max(map(np.max, means)) + 6)
    figure.suptitle(f"{bench.bed.title} ({len(bench.seeds)} seeds)", fontsize=11.5)
    figure.savefig(path, dpi=130, metadata=METADATA)


def curves(bench: Bench, axes: Axes, sets: Sequence[str], bands: bool) -> None:
    for name, arm in bench.arms.items():
        values = 100 * arm.on(sets)
        center = values.mean(0)
        bold = name in BOLD
        axes.plot(
            arm.steps,
            center,
            color=COLORS.get(name),
            linewidth=2.2 if bold else 1.1,
            label=NAMES.get(name, name),
            zorder=3 if bold else 2,
        )
        if bands and bold and len(values) > 1:
            reach = t_quantile(0.95, len(values) - 1) * values.std(0, ddof=1) / math.sqrt(len(values))
            axes.fill_between(
                arm.steps, center - reach, center + reach, color=COLORS.get(name), alpha=0.15, linewidth=0
            )


def draw_main(benches: Sequence[Bench], path: Path) -> None:
    """How many times fewer steps and seconds than the full pool every arm needs, with intervals; one that never gets there says so."""
    from matplotlib.figure import Figure

    units = {"steps": "fewer training steps than the full pool", "work_seconds": "fewer seconds, selection included"}
    rows = max(len(bench.arms) for bench in benches)
    figure = Figure(figsize=(4.6 * len(units) + 1, 0.36 * rows * len(benches) + 1.6), layout="constrained")
    grid = figure.subplots(len(benches), len(units), squeeze=False, sharex="col")
    for row, bench in zip(grid, benches, strict=True):
        names = sorted((name for name in bench.arms if name != "full"), key=lambda name: bench.finals[name].mean)
        for axes, (unit, words) in zip(row, units.items(), strict=True):
            forest(bench, axes, names, unit)
            axes.set_title(words if bench is benches[0] else "", fontsize=10)
        row[0].set_ylabel(f"{bench.bed.title.split(':')[0]}, {len(bench.seeds)} seeds", fontsize=9.5)
        row[1].set_yticklabels([])
    for axes in grid[-1]:
        axes.set_xlabel("times less (log scale)")
    figure.savefig(path, dpi=130, metadata=METADATA)


def forest(bench: Bench, axes: Axes, names: Sequence[str], unit: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.08, 16)
    null = sorted(factor.exact for factor in bench.null(unit) if factor.exact is not None)
    if null:
        axes.axvspan(null[0], null[-1], color="#eeeeee", zorder=0)
    axes.axvline(1, color="#0072b2", linewidth=1)
    for place, name in enumerate(names):
        found = bench.speed(name, unit)
        color = COLORS.get(name)
        least = bench.at_least(name, unit)
        point = found.ratio if least is None else least
        if point is None:
            axes.text(
                0.085,
                place,
                "never there",
                va="center",
                fontsize=8,
                color="#777777",
            )
            continue
        low, high = found.interval or (point, point)
        axes.plot([max(low, 0.08), min(high, 16)], [place, place], color=color, linewidth=1.8)
        # full never gets there: a bound, which points to where the figure lies
        axes.plot([point], [place], "o" if least is None else ">", color=color, markersize=6)
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names], fontsize=9)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xticks([0.1, 0.25, 0.5, 1, 2, 4, 8], ["0.1", "0.25", "0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
