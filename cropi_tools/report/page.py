"""The report as one HTML page that needs nothing else: pictures inside, light and dark, readable on a phone.

No date and no path of this machine is added, so the same data gives the same bytes.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from cropi_tools.report import plots
from cropi_tools.report.formatting import NOTHING, arm_name, limits, percent, summary
from cropi_tools.report.pool import Ranked, Selection, Suspect
from cropi_tools.report.reading import Manifest
from cropi_tools.report.structures import ArmFigures, Comparison
from cropi_tools.report.tables import sections
from cropi_tools.runtime.errors import printable

Texts = Mapping[str, Mapping[str, str]]

_LARGEST = 6  # sources that a row names
_LONGEST = 300  # characters of a prompt
_ANSWER = 60  # characters of an answer
_SUSPECTS = 20  # prompts that pull away from a target

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --back: #ffffff; --text: #222222; --soft: #666666; --line: #dddddd; --mark: #f5f3ee; }
@media (prefers-color-scheme: dark) {
  :root { --back: #1b1d21; --text: #dddddd; --soft: #9a9a9a; --line: #3a3d44; --mark: #26282e; }
}
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width:
68rem;
  padding: 1rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
.summary { font-size: 1.08rem; max-width: 46rem; }
.notes { background: var(--mark); border-left: 3px solid #d55e00; margin: 1rem 0; padding: .5rem 1rem .5rem 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.subject td { font-weight: 600; }
.caption { color: var(--soft); font-size: .88rem; margin: .3rem 0 0; max-width: 46rem; }
.panels { display: flex; flex-wrap: wrap; gap: .5rem; }
.panels > figure { flex: 1 1 20rem; }
figure { margin: .5rem 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; }
.wide img { max-width: none; width: max(100%, 44rem); }
ul { padding-left: 1.2rem; max-width: 46rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
.prompts td:last-child { text-align: left; white-space: normal; min-width: 20rem; overflow-wrap: anywhere; }
code { font-size: .82rem; overflow-wrap: anywhere; }
.hash { color: var(--soft); }
</style>
</head>
<body>
<h1>$title</h1>
<p class="summary">$summary</p>
$notes
$tables
$curves
$selection
<h2>Limits</h2>
<ul>$limits</ul>
<h2>Provenance</h2>
$provenance
</body>
</html>
"""
)


def page(comparison: Comparison, texts: Texts | None = None) -> str:
    """The whole page. texts: of the prompts at the ends of the pools' scores, by run and id."""
    found = sections(comparison)
    before, after = found[:-1], found[-1:]
    return _PAGE.substitute(
        title=_text("Report: " + ", ".join(run.name for run in comparison.runs)),
        summary=_text(" ".join(summary(comparison))),
        notes=_list(comparison.notes, "notes") if comparison.notes else "",
        tables="\n".join(
            f"<h2>{_text(item.title)}</h2>\n{_table(item.headings, item.rows, comparison)}\n{_caption(item.caption)}"
            for item in before
        ),
        curves=_curves(comparison),
        selection=_selection(comparison)
        + _extremes(comparison, texts or {})
        + _suspects(comparison)
        + "\n".join(
            f"<h2>{_text(item.title)}</h2>\n{_table(item.headings, item.rows, comparison)}\n{_caption(item.caption)}"
            for item in after
        ),
        limits="".join(f"<li>{_text(text)}</li>" for text in limits(comparison)),
        provenance="\n".join(_provenance(comparison)),
    )


def _list(texts: Iterable[str], name: str) -> str:
    return f'<ul class="{name}">' + "".join(f"<li>{_text(text)}</li>" for text in texts) + "</ul>"


def _caption(text: str) -> str:
    return f'<p class="caption">{_text(text[:1].upper() + text[1:])}.</p>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], comparison: Comparison) -> str:
    """The row of the arm the summary is about stands out."""
    subject = comparison.subject
    name = arm_name(subject) if subject else None
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = []
    for row in rows:
        mark = ' class="subject"' if row[0].rstrip("*") == name else ""
        body.append(f"<tr{mark}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _picture(light: bytes, dark: bytes, description: str) -> str:
    """A picture for each color scheme, inside the page."""
    sources = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (light, dark)]
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{_text(description)}"></picture></figure>'
    )


def _curves(comparison: Comparison) -> str:
    if not any(arm.curve for arm in comparison.arms):
        return ""
    cost = plots.cost_unit(comparison)
    units = ["steps", cost] if cost else ["steps"]
    pictures = [
        _picture(
            plots.curves(comparison, [unit], plots.LIGHT),
            plots.curves(comparison, [unit], plots.DARK),
            f"Mean target accuracy of each arm against {unit}",
        )
        for unit in units
    ]
    caption = "thick: mean over the counted seeds; thin: each seed; rings: ends of stages"
    if cost:
        caption += ". Flat stretches are selection: pool rollouts, gradients and scores are paid for before the "
        caption += "steps that use them"
        caption += "; evaluating and starting (imports, loading, compiling) are left out" if cost == "seconds" else ""
    return f'<h2>Learning curves</h2>\n<div class="panels">{"".join(pictures)}</div>\n{_caption(caption)}'


def _selection(comparison: Comparison) -> str:
    if not plots.has_selections(comparison):
        return ""
    picture = _picture(
        plots.selections(comparison, plots.LIGHT),
        plots.selections(comparison, plots.DARK),
        "Shares of sources and pass rates in what each stage selected",
    )
    rows = [*_pool_rows(comparison), *(row for arm in comparison.arms for row in _selection_rows(arm))]
    caption = "prompts and shares are means over seeds; kept: share of the prompts that the stage "
    caption += "before had selected too; sources: the largest first"
    headings = ["arm", "stage", "prompts", "mean pass rate", "kept", "sources"]
    return (
        f'<h2>What each stage selected</h2>\n<div class="scroll wide">{picture}</div>\n'
        f"<details><summary>As a table</summary>{_table(headings, rows, comparison)}{_caption(caption)}</details>\n"
    )


def _pool_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for run in comparison.runs:
        if run.pool:
            known = [rate for rate in run.pool.everything.pass_rates if rate is not None]
            rows.append(
                [
                    "pool" if len(comparison.runs) == 1 else f"{run.name}: pool",
                    "",
                    str(len(run.pool.everything.pass_rates)),
                    f"{sum(known) / len(known):.2f}" if known else NOTHING,
                    NOTHING,
                    _mixture([run.pool.everything]),
                ]
            )
    return rows


def _mixture(selections: Sequence[Selection]) -> str:
    """`gcd 40.0 %, reverse 35.0 %, other 25.0 %`: the largest sources by their mean share."""
    shares: dict[str, float] = {}
    for selection in selections:
        for source, amount in selection.sources.items():
            share = amount / len(selection.pass_rates) / len(selections)
            shares[source] = shares.get(source, 0.0) + share
    largest = sorted(shares.items(), key=lambda item: (-round(item[1], 9), item[0]))
    shown = [f"{source} {percent(share)} %" for source, share in largest[:_LARGEST]]
    rest = sum(share for _, share in largest[_LARGEST:])
    return ", ".join([*shown, f"other {percent(rest)} %"] if rest else shown)


def _extremes(comparison: Comparison, texts: Texts) -> str:
    """The prompts that the first scores put first and last, folded up by set."""
    several, parts = len(comparison.runs) > 1, []
    for run in comparison.runs:
        for name, ends in (run.pool.ends if run.pool else {}).items():
            own = texts.get(run.name, {})
            rows = [_prompt_row(rank, item, own) for rank, item in enumerate(ends.top, 1)]
            rows += [
                _prompt_row(ends.scored - place, item, own)
                for place, item in zip(range(len(ends.bottom) - 1, -1, -1), ends.bottom, strict=True)
            ]
            if rows:
                title = f"{run.name}: {name}" if several else name
                table = _table(["rank", "score", "source", "pass rate", "prompt"], rows, comparison)
                parts.append(f'<details class="prompts"><summary>{_text(title)}</summary>{table}</details>')
    if not parts:
        return ""
    caption = "scores of the first stage by the starting policy, on each validation set; texts are cut"
    caption += (
        ""
        if all(texts.get(run.name) for run in comparison.runs)
        else "; texts are shown where the pool's file is where the selections read it"
    )
    return "<h2>The highest and the lowest scores</h2>\n" + "\n".join([*parts, _caption(caption)]) + "\n"


def _suspects(comparison: Comparison) -> str:
    """The prompts that pull away from a target by more than noise, where that was looked at, folded up by run."""
    parts = []
    for run in comparison.runs:
        found = run.pool.suspects if run.pool else None
        if found is None:
            continue
        if not found:
            parts.append(f"<p>{_text(run.name)}: none by more than noise.</p>")
            continue
        sets = list(found[0].scores)
        headings = ["rank", *sets, "source", "pass rate", "reference", "usual answer", "prompt"]
        rows = [_suspect_row(rank, item, sets) for rank, item in enumerate(found[:_SUSPECTS], 1)]
        title = f"{run.name}: {len(found)} prompts" + (f", the first {len(rows)}" if len(rows) < len(found) else "")
        table = _table(headings, rows, comparison)
        parts.append(f'<details class="prompts"><summary>{_text(title)}</summary>{table}</details>')
    if not parts:
        return ""
    caption = "scores by the starting policy with the deviation that noise gives them, most suspicious first; usual answer: what the policy "
    caption += "answers most often. Wrong reference answers are one cause: look at them"
    return "<h2>Prompts that pull away from a target</h2>\n" + "\n".join([*parts, _caption(caption)]) + "\n"


def _suspect_row(rank: int, item: Suspect, sets: Sequence[str]) -> list[str]:
    scores = [
        f"{item.scores[name]:.3g} ± {item.deviations[name]:.2g}"
        if name in item.scores.keys() & item.deviations.keys()
        else NOTHING
        for name in sets
    ]
    rate = NOTHING if item.pass_rate is None else f"{item.pass_rate:.2f}"
    answers = [_cut(item.answer, _ANSWER), _cut(item.usual_answer, _ANSWER)]
    return [str(rank), *scores, item.source, rate, *answers, _cut(item.text, _LONGEST)]


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _prompt_row(rank: int, item: Ranked, texts: Mapping[str, str]) -> list[str]:
    text = texts.get(item.id)
    shown = f"({item.id})" if text is None else _cut(text, _LONGEST)
    rate = NOTHING if item.pass_rate is None else f"{item.pass_rate:.2f}"
    return [str(rank), f"{item.score:.3g}", item.source, rate, shown]


def _selection_rows(arm: ArmFigures) -> list[list[str]]:
    numbers = sorted({stage.number for seed in arm.arm.seeds for stage in seed.stages if stage.selection})
    rows = []
    for number in numbers:
        sizes, rates, kept, selections = [], [], [], []
        for seed in arm.arm.seeds:
            by_number = {stage.number: stage.selection for stage in seed.stages if stage.selection}
            if number not in by_number:
                continue
            selection = by_number[number]
            selections.append(selection)
            sizes.append(len(selection.pass_rates))
            rates += [rate for rate in selection.pass_rates if rate is not None]
            if number - 1 in by_number and selection.ids:
                kept.append(len(selection.ids & by_number[number - 1].ids) / len(selection.ids))
        rows.append(
            [
                arm_name(arm),
                str(number),
                f"{sum(sizes) / len(sizes):.0f}",
                f"{sum(rates) / len(rates):.2f}" if rates else NOTHING,
                f"{percent(sum(kept) / len(kept))} %" if kept else NOTHING,
                _mixture([selection for selection in selections if selection.pass_rates]),
            ]
        )
    return rows


def _provenance(comparison: Comparison) -> Iterable[str]:
    """Versions, then every command with the short hashes of what it wrote, folded up by arm."""
    everything = [manifest for run in comparison.runs for manifest in run.start]
    everything += [manifest for arm in comparison.arms for manifest in _manifests(arm)]
    versions: dict[str, set[str]] = {}
    for manifest in everything:
        for name, version in manifest.versions.items():
            versions.setdefault(name, set()).add(version)
    devices = sorted({str(device) for manifest in everything if (device := manifest.ledger.get("device"))})
    shown = [f"{name} {', '.join(sorted(found))}" for name, found in sorted(versions.items())]
    if shown:
        yield f"<p>Versions: {_text('; '.join(shown))}.</p>"
    if devices:
        yield f"<p>Devices: {_text(', '.join(devices))}.</p>"
    for run in comparison.runs:
        if run.start:
            yield _commands(f"{run.name}: shared first stage", run.start)
    for arm in comparison.arms:
        yield _commands(arm_name(arm), _manifests(arm))


def _manifests(arm: ArmFigures) -> list[Manifest]:
    """Each once: in a chain a file may have served several stages."""
    found = {
        manifest.path: manifest
        for seed in arm.arm.seeds
        for stage in seed.stages
        for manifest in (*stage.manifests, *([stage.policy] if stage.policy else []))
    }
    return list(found.values())


def _commands(title: str, manifests: Sequence[Manifest]) -> str:
    lines = []
    for manifest in manifests:
        hashes = ", ".join(digest[:12] for digest in manifest.digests[:3])
        hashes += ", …" if len(manifest.digests) > 3 else ""
        command = _text(shlex.join(manifest.argv) or manifest.command)
        written = _text(f"{manifest.path} {hashes}")
        lines.append(f'<li><code>{command}</code> <code class="hash">{written}</code></li>')
    return f"<details><summary>{_text(title)} ({len(manifests)} commands)</summary><ul>{''.join(lines)}</ul></details>"


def _text(text: str) -> str:
    """Text for the page: no markup, and no character that is not visible."""
    return escape(printable(text))
