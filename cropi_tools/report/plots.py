"""Pictures of a comparison: learning curves, and what each stage selected. No display; same data, same bytes.

One color an arm everywhere, and a dash pattern a run when there are several. Thin lines are seeds, thick lines their
mean, rings the ends of stages.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from cropi_tools.report.comparison import unit_curve
from cropi_tools.report.costs import UNITS
from cropi_tools.report.formatting import arm_name
from cropi_tools.report.pool import Selection
from cropi_tools.report.reading import Run
from cropi_tools.report.structures import ArmFigures, Comparison, CurvePoint
from cropi_tools.runtime.errors import printable

DOTS_PER_INCH = 160
_COLOURS = {
    "cropi": "#d55e00",
    "random": "#8a8a8a",
    "full": "#0072b2",
    "static": "#009e73",
    "learnability": "#cc79a7",
    "hardest": "#a05a2c",
    "pass-rate": "#d4a017",
    "shuffled": "#56b4e9",
    "oracle": "#7b5ea7",
}
_SPARE_COLOURS = ("#8c564b", "#17a2a2", "#b03060", "#6b8e23", "#4060c0", "#a0522d")
Dashes = tuple[float, tuple[float, ...]]
_DASHES: tuple[Dashes, ...] = ((0, ()), (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
_SOURCE_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#dd8452", "#937860")
_LONGEST_NAME = 28  # letters of a name in a picture
_OTHER_COLOUR = "#b8b8b8"
_RATE_COLOURS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#b5de2b", "#fde725")
_AXIS = {"steps": "training steps", "seconds": "device time, {}", "tokens": "tokens through the model, {}"}
_SCALES = {
    "seconds": ((3600.0, 7200.0, "hours"), (60.0, 600.0, "minutes"), (1.0, 0.0, "seconds")),
    "tokens": ((1e9, 2e9, "billions"), (1e6, 2e6, "millions"), (1e3, 2e3, "thousands"), (1.0, 0.0, "number")),
}


@dataclass(frozen=True)
class Theme:
    """Colours of everything that is not data."""

    background: str
    text: str
    grid: str


LIGHT = Theme("#ffffff", "#222222", "#dddddd")
DARK = Theme("#1b1d21", "#dddddd", "#3a3d44")


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    settings: dict[Any, Any] = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.labelsize": 10.5,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "figure.constrained_layout.h_pad": 0.08,
        "text.parse_math": False,  # names are no formulas
    }
    with matplotlib.style.context("default"), matplotlib.rc_context(settings):
        yield


def _png(figure: Figure) -> bytes:
    """The picture without software names or dates, so that the bytes depend on the data alone."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn in its place
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _label(name: str) -> str:
    """A name as a picture shows it: on one line, and not longer than there is room for."""
    shown = printable(name)
    return shown if len(shown) <= _LONGEST_NAME else shown[: _LONGEST_NAME - 1] + "…"


def _legend(place: Figure | Axes, entries: Sequence[tuple[Artist, str]], **options: Any) -> None:
    """A legend of (handle, name). The names are put in afterwards: matplotlib leaves out those that begin with `_`."""
    legend = place.legend([handle for handle, _ in entries], [str(i) for i in range(len(entries))], **options)
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(_label(name))


def arm_styles(comparison: Comparison) -> dict[str, tuple[str, Dashes]]:
    """(color, dashes) of each arm by its label."""
    unknown = sorted({arm.kind for arm in comparison.arms if arm.kind not in _COLOURS})
    colors = {**_COLOURS, **{kind: _SPARE_COLOURS[index % len(_SPARE_COLOURS)] for index, kind in enumerate(unknown)}}
    runs = [id(run) for run in comparison.runs]
    return {arm.label: (colors[arm.kind], _DASHES[runs.index(id(arm.run)) % len(_DASHES)]) for arm in comparison.arms}


def cost_unit(comparison: Comparison) -> str | None:
    """Seconds where every arm with a curve logged them, else tokens, else None."""
    drawn = [arm for arm in comparison.arms if arm.curve]
    for unit in UNITS:
        if drawn and all(unit_curve(arm, arm.counted, comparison.targets, unit) for arm in drawn):
            return unit
    return None


def curves(comparison: Comparison, units: Sequence[str] | None = None, theme: Theme = LIGHT) -> bytes:
    """Learning curves as a PNG: mean target accuracy against training steps and against cost, selection included.

    `units` chooses the panels (`steps`, `seconds`, `tokens`); by default steps and `cost_unit`.
    """
    cost = cost_unit(comparison)
    panels = list(units or (["steps", cost] if cost else ["steps"]))
    styles = arm_styles(comparison)
    with _style(theme):
        figure = Figure(figsize=(4.8 * len(panels), 3.9), dpi=DOTS_PER_INCH, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, unit in zip(axes, panels, strict=True):
            _curve_panel(axis, comparison, unit, styles)
        axes[0].set_ylabel("mean target accuracy, %")
        entries = [
            (
                Line2D([], [], color=styles[arm.label][0], linestyle=styles[arm.label][1], linewidth=2.4),
                arm_name(arm),
            )
            for arm in comparison.arms
            if any(arm.seed_curves.values())
        ]
        if entries:
            fitting = 4 if max(len(_label(arm_name(arm))) for arm in comparison.arms) < 14 else 2
            columns = min(len(entries), fitting * len(panels))
            _legend(figure, entries, loc="outside upper center", ncols=columns, handlelength=1.8, columnspacing=1.4)
        return _png(figure)


def _curve_panel(axis: Axes, comparison: Comparison, unit: str, styles: Mapping[str, tuple[str, Dashes]]) -> None:
    lines: list[tuple[ArmFigures, list[CurvePoint], bool]] = []
    for arm in comparison.arms:
        for seed in arm.arm.seeds:
            if curve := unit_curve(arm, [seed], comparison.targets, unit):
                lines.append((arm, curve, False))
        if arm.counted and (curve := unit_curve(arm, arm.counted, comparison.targets, unit)):
            lines.append((arm, curve, True))
    divisor, name = _scale(unit, max((point.cost for _, curve, _ in lines for point in curve), default=1.0))
    boundaries = {arm.label: _boundaries(arm) for arm in comparison.arms}
    for arm, curve, whole in lines:
        color, dashes = styles[arm.label]
        xs, ys = [point.cost / divisor for point in curve], [100 * point.value for point in curve]
        if not whole:
            axis.plot(xs, ys, color=color, linestyle=dashes, linewidth=0.8, alpha=0.4, zorder=2)
            continue
        axis.plot(xs, ys, color=color, linestyle=dashes, linewidth=2.2, zorder=3, marker="o" if len(xs) == 1 else None)
        arrivals = {point.step: index for index, point in reversed(list(enumerate(curve)))}
        ends = [index for step, index in arrivals.items() if step in boundaries[arm.label]]
        axis.plot(
            [xs[index] for index in ends],
            [ys[index] for index in ends],
            linestyle="none",
            marker="o",
            markersize=5,
            markerfacecolor=axis.get_facecolor(),
            markeredgecolor=color,
            markeredgewidth=1.4,
            zorder=4,
        )
    if unit == "steps":
        for step in sorted(set().union(*boundaries.values())):
            axis.axvline(step, color=matplotlib.rcParams["grid.color"], linestyle=(0, (3, 3)), linewidth=1, zorder=1)
    axis.grid(axis="y", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_xlim(left=0)
    axis.set_xlabel(_AXIS[unit].format(name) + ("" if unit == "steps" else ", selection included"))


def _boundaries(arm: ArmFigures) -> set[int]:
    """The global steps at which a stage ends and another follows."""
    return {stage.end for seed in arm.arm.seeds for stage in seed.stages[:-1]}


def _scale(unit: str, largest: float) -> tuple[float, str]:
    """(divisor, name) of the unit on an axis."""
    for divisor, threshold, name in _SCALES.get(unit, ()):
        if largest >= threshold:
            return divisor, name
    return 1.0, ""


@dataclass(frozen=True)
class StageShares:
    """What a stage of an arm (or of all, when alike: `stages 1–4`) selected, averaged over seeds, or a pool. Shares add to 1."""

    stages: str
    prompts: float
    sources: Mapping[str, float]
    rates: Mapping[str, float]


RATE_BINS = ("0", "up to ¼", "up to ½", "up to ¾", "below 1", "1", "unknown")


def rate_bin(rate: float | None) -> str:
    """The bin of a pass rate: exactly 0, exactly 1, quarters between (upper ends belong to the lower bin), unknown."""
    if rate is None:
        return "unknown"
    if rate <= 0:
        return "0"
    if rate >= 1:
        return "1"
    return RATE_BINS[1 + sum(rate > edge for edge in (0.25, 0.5, 0.75))]


def stage_shares(arm: ArmFigures) -> list[StageShares]:
    """The selections of an arm by stage, all seeds that have the stage weighed alike; empty selections left out."""
    by_number: dict[int, list[Selection]] = {}
    for seed in arm.arm.seeds:
        for stage in seed.stages:
            if stage.selection and stage.selection.pass_rates:
                by_number.setdefault(stage.number, []).append(stage.selection)
    found = [_mean_shares(str(number), selections) for number, selections in sorted(by_number.items())]
    if len(found) > 1 and all(replace(share, stages="") == replace(found[0], stages="") for share in found):
        return [replace(found[0], stages=f"stages {found[0].stages}–{found[-1].stages}")]
    return found


def pool_shares(run: Run) -> StageShares | None:
    """What the run selects from; None where that is not known."""
    known = run.pool is not None and run.pool.everything.pass_rates
    return _mean_shares("", [run.pool.everything]) if run.pool and known else None


def _mean_shares(name: str, selections: Sequence[Selection]) -> StageShares:
    sources: dict[str, float] = {}
    rates: dict[str, float] = {}
    for selection in selections:
        weight = 1 / len(selection.pass_rates) / len(selections)
        for source, amount in selection.sources.items():
            sources[source] = sources.get(source, 0.0) + amount * weight
        for rate in selection.pass_rates:
            rates[rate_bin(rate)] = rates.get(rate_bin(rate), 0.0) + weight
    prompts = sum(len(selection.pass_rates) for selection in selections)
    return StageShares(name, prompts / len(selections), sources, rates)


def shown_shares(comparison: Comparison) -> list[tuple[str, Sequence[StageShares]]]:
    """Names of pools and arms with their shares: each run's pool, then the arms with selections."""
    several = len(comparison.runs) > 1
    pools = [(f"{run.name}: pool" if several else "pool", pool_shares(run)) for run in comparison.runs]
    found: list[tuple[str, Sequence[StageShares]]] = [(name, [shares]) for name, shares in pools if shares]
    return found + [(arm_name(arm), shares) for arm in comparison.arms if (shares := stage_shares(arm))]


def has_selections(comparison: Comparison) -> bool:
    return any(stage_shares(arm) for arm in comparison.arms)


def selections(comparison: Comparison, theme: Theme = LIGHT) -> bytes:
    """The pool and what each stage of each arm trained on, as a PNG: one bar a stage, stacked by source and by pass rate."""
    shown = shown_shares(comparison)
    sources = _leading_sources([share for _, shares in shown for share in shares])
    source_colors = {name: _SOURCE_COLOURS[index] for index, name in enumerate(sources)} | {"other": _OTHER_COLOUR}
    rate_colors = dict(zip(RATE_BINS, (*_RATE_COLOURS, _OTHER_COLOUR), strict=True))
    bars = sum(len(shares) for _, shares in shown) + 0.8 * len(shown)
    with _style(theme):
        figure = Figure(figsize=(max(6.4, min(14.0, 2.6 + 0.42 * bars)), 5.4), dpi=DOTS_PER_INCH, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        by_source = [[_folded(share.sources, sources) for share in shares] for _, shares in shown]
        by_rate = [[share.rates for share in shares] for _, shares in shown]
        _stacked(top, shown, by_source, source_colors, "by source, a bar a stage", "source")
        _stacked(bottom, shown, by_rate, rate_colors, "by pass rate in the stored rollouts", "pass rate")
        _name_bars(bottom, shown)
        return _png(figure)


def _leading_sources(shares: Sequence[StageShares]) -> list[str]:
    """At most eight sources, the largest on the whole, in alphabetical order; the rest is `other`."""
    total: dict[str, float] = {}
    for share in shares:
        for source, part in share.sources.items():
            total[source] = total.get(source, 0.0) + part
    largest = sorted(total, key=lambda source: (-round(total[source], 9), source))[: len(_SOURCE_COLOURS)]
    return sorted(largest)


def _folded(parts: Mapping[str, float], kept: Sequence[str]) -> dict[str, float]:
    folded = {name: parts[name] for name in kept if name in parts}
    rest = sum(part for name, part in parts.items() if name not in kept)
    return folded | ({"other": rest} if rest > 0 else {})


_Shown = Sequence[tuple[str, Sequence[StageShares]]]


def _positions(shown: _Shown) -> list[list[float]]:
    """Where the bars stand: stages of an arm side by side, a gap between arms."""
    found, at = [], 0.0
    for _, shares in shown:
        found.append([at + index for index in range(len(shares))])
        at += len(shares) + 0.8
    return found


def _stacked(
    axis: Axes,
    shown: _Shown,
    parts: Sequence[Sequence[Mapping[str, float]]],
    colors: Mapping[str, str],
    title: str,
    legend: str,
) -> None:
    used: set[str] = set()
    for places, stages in zip(_positions(shown), parts, strict=True):
        for place, shares in zip(places, stages, strict=True):
            height = 0.0
            for name, color in colors.items():
                if share := shares.get(name, 0.0):
                    axis.bar(
                        place, share, 0.86, bottom=height, color=color, edgecolor=axis.get_facecolor(), linewidth=0.6
                    )
                    height += share
                    used.add(name)
    axis.set_title(title, loc="left")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="x", length=0)
    entries = [(Patch(facecolor=color), name) for name, color in colors.items() if name in used]
    _legend(
        axis,
        entries[::-1],
        title=legend,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        handlelength=1,
        alignment="left",
    )


def _name_bars(axis: Axes, shown: _Shown) -> None:
    """Stage numbers under the bars, the arm under its stages."""
    places = _positions(shown)
    axis.set_xticks([place for group in places for place in group])
    axis.set_xticklabels([share.stages for _, shares in shown for share in shares])
    slanted = any(len(_label(name)) > 4 + 5 * len(shares) for name, shares in shown)
    for (name, _), group in zip(shown, places, strict=True):
        axis.annotate(
            _label(name),
            ((group[0] + group[-1]) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -20),
            textcoords="offset points",
            ha="right" if slanted else "center",
            va="top",
            rotation=30 if slanted else 0,
            rotation_mode="anchor" if slanted else "default",
            fontsize=10,
            annotation_clip=False,
        )
    axis.set_xlim(-0.7, places[-1][-1] + 0.7)
