"""Writes a report: tables or JSON on a stream, and the page and the picture beside, each whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from cropi_tools.data.errors import InputError
from cropi_tools.report.comparison import Comparison, compare
from cropi_tools.report.reading import read_run
from cropi_tools.report.tables import as_json, print_tables


def write_report(
    folders: Sequence[Path],
    output: Path | None = None,
    *,
    png: Path | None = None,
    json_figures: bool = False,
    baseline: str = "random",
    reference: str = "full",
    targets: Sequence[str] = (),
    stream: TextIO | None = None,
) -> Comparison:
    """Compare the runs: tables (or one JSON object) on `stream`, the page in `output`, the learning curves in `png`.

    Differences are to the arm `baseline`, speeds to the arm `reference`; `targets` are the sets of the mean, by default
    every set all arms have. InputError: a folder that is no run, a broken file, two runs of one name, or no folder to
    write into.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: two run folders of this name; rename one, since arms are shown as RUN/ARM")
    for path in (output, png):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder; make it first")
    comparison = compare(runs, baseline=baseline, reference=reference, targets=targets)
    if png is not None:
        from cropi_tools.report.plots import curves

        _replace(png, curves(comparison))
    if output is not None:
        from cropi_tools.report.page import page

        _replace(output, page(comparison).encode())
    stream = stream or sys.stdout
    if json_figures:
        stream.write(json.dumps(as_json(comparison), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        print_tables(comparison, stream)
    return comparison


def _replace(path: Path, content: bytes) -> None:
    """Write beside the name, then take it: a reader sees the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
