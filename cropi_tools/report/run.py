"""From run folders to a comparison, and what of them it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cropi_tools.data.manifest import Input, file_digest, folder_digest
from cropi_tools.report.comparison import compare
from cropi_tools.report.reading import read_run
from cropi_tools.report.structures import Comparison
from cropi_tools.runtime.errors import InputError

_READ = ("manifest.json", "metrics.jsonl", "evaluations.jsonl", "timings.jsonl", "selected.jsonl", "scores.jsonl")


def compare_runs(
    folders: Sequence[Path],
    baseline: str = "random",
    reference: str = "full",
    targets: Sequence[str] = (),
    threshold: float | None = None,
) -> Comparison:
    """Compare the arms of all runs: differences to the arm `baseline`, speeds to the arm `reference`, means over the sets `targets`
    (by default every set all arms have); `threshold` as `compare` takes it.

    InputError: a folder that is no run, a broken file, two runs of one name.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: two run folders of this name; rename one, since arms are shown as RUN/ARM")
    return compare(runs, baseline=baseline, reference=reference, targets=targets, threshold=threshold)


def run_input(folder: Path) -> Input:
    """A run as an input: the logs and manifests in it, not its weights and stores."""
    files = sorted(path for path in folder.rglob("*.json*") if path.is_file() and path.name.endswith(_READ))
    return Input(str(folder), folder_digest({str(path.relative_to(folder)): file_digest(path) for path in files}))
