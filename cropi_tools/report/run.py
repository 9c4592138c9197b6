"""cropi-report from run folders to a comparison, and to a page or a picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from cropi_tools import runtime
from cropi_tools.data.manifest import Fingerprint, Input, file_digest, folder_digest
from cropi_tools.data.output import Output
from cropi_tools.report.chain import is_policy, read_chain
from cropi_tools.report.comparison import compare
from cropi_tools.report.options import ReportOptions
from cropi_tools.report.pool import SUSPECTS, read_texts
from cropi_tools.report.reading import joined, read_run
from cropi_tools.report.structures import Comparison
from cropi_tools.runtime.errors import InputError

_READ = (
    "manifest.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "timings.jsonl",
    "selected.jsonl",
    "scores.jsonl",
    SUSPECTS,
)


def compare_runs(
    folders: Sequence[Path],
    baseline: str = "random",
    speedup_over: str = "full",
    targets: Sequence[str] = (),
    threshold: float | None = None,
    join: bool = False,
) -> Comparison:
    """Compare the arms of all runs: differences to the arm `baseline`, speed-ups over the arm `speedup_over`, means over the sets `targets`
    (by default every set all arms have); `threshold` as `compare` takes it; `join` makes the runs one.

    Policies of cropi-train among the folders are one run more, their chain. InputError: a folder that is neither, a broken file, policies of
    several chains, two runs of one name.
    """
    policies = [folder for folder in folders if is_policy(folder)]
    runs = [read_run(folder) for folder in folders if folder not in policies]
    runs += [read_chain(policies)] if policies else []
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: two run folders of this name; rename one, since arms are shown as RUN/ARM")
    return compare(
        [joined(runs)] if join else runs,
        baseline=baseline,
        reference=speedup_over,
        targets=targets,
        threshold=threshold,
    )


def run_input(folder: Path) -> Input:
    """A run or a policy as an input: the logs and manifests in it, not its weights and stores."""
    place = folder if folder.is_dir() else folder.with_name(folder.name + ".part")
    files = sorted(path for path in place.rglob("*.json*") if path.is_file() and path.name.endswith(_READ))
    return Input(str(folder), folder_digest({str(path.relative_to(place)): file_digest(path) for path in files}))


def _texts(comparison: Comparison) -> dict[str, dict[str, str]]:
    """The texts of the prompts that the page shows, by run and id, from the pools of the runs."""
    found: dict[str, dict[str, str]] = {}
    for run in comparison.runs:
        ends = run.pool.ends.values() if run.pool else ()
        ids = frozenset(item.id for each in ends for item in (*each.top, *each.bottom))
        found[run.name] = read_texts(run.pool_files, ids) if ids else {}
    return found


def write(
    path: str,
    kind: Literal["page", "picture"],
    comparison: Comparison,
    options: ReportOptions,
    runs: Mapping[str, Input],
) -> None:
    """Write the page or the picture, unless it is there and up to date."""
    made = Output(path, Fingerprint.of("cropi-report", options.decisive(kind), runs), runs, force=options.force)
    if not made.open():
        runtime.notify(f"{path}: up to date")
        return
    if kind == "page":
        from cropi_tools.report.page import page

        made.begin_work()
        content = page(comparison, _texts(comparison)).encode()
    else:
        from cropi_tools.report.plots import curves

        made.begin_work()
        content = curves(comparison)
    made.part.write_bytes(content)
    made.finish(rows=len(comparison.arms))
    runtime.notify(f"{path}: written")
