"""cropi-report: what came out of a run, as a table, a picture and a page."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cropi_tools.cli.common import AsJson, Force, Quiet, Version, command
from cropi_tools.runtime.console import show_json

EXAMPLE = """
cropi-report runs/tiny
cropi-report runs/tiny -o report.html --png curves.png
cropi-report runs/tiny --target gcd --threshold 0.6
cropi-report runs/a runs/b --json | jq '.arms[] | {arm, mean}'
"""


def report(
    runs: Annotated[
        list[str],
        typer.Argument(help="Run folders: RUN/ARM/SEED/STAGE, as `make curriculum` lays them out.", metavar="RUN"),
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the page: one self-contained HTML file.", metavar="FILE")
    ] = None,
    png: Annotated[
        str | None, typer.Option("--png", help="Write the learning curves as a picture.", metavar="FILE")
    ] = None,
    baseline: Annotated[str, typer.Option("--baseline", help="Arm that differences are to.")] = "random",
    reference: Annotated[str, typer.Option("--reference", help="Arm that speed-ups are to.")] = "full",
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Mean accuracy up to which speeds are measured, 0.6 for 60 %: fix it before you look. [default: of the reference's last "
            "evaluations]",
            metavar="ACC",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Evaluation sets of the mean; may be repeated. [default: all]", metavar="SET"),
    ] = None,
    as_json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Learning curves, differences with intervals, what each stage selected and what it cost, of one run or several.

    The table goes to stdout. Unfinished arms are shown as far as they are, and said to be unfinished.
    """
    import json
    import sys
    from pathlib import Path

    from cropi_tools import runtime
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.data.output import Output
    from cropi_tools.report.run import compare_runs, run_input
    from cropi_tools.report.tables import as_json as figures
    from cropi_tools.report.tables import print_tables
    from cropi_tools.runtime.errors import UsageError

    runtime.set_quiet(quiet)
    if threshold is not None and not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold:g}: expected an accuracy above 0 and up to 1, such as 0.6 for 60 %")
    comparison = compare_runs([Path(folder) for folder in runs], baseline, reference, target or [], threshold)
    inputs = {f"run {place}": run_input(Path(folder)) for place, folder in enumerate(runs, 1)}
    options: dict[str, Any] = {"baseline": baseline, "reference": reference, "target": target or []}
    if threshold is not None:
        options["threshold"] = threshold

    def write(path: str, kind: str) -> None:
        made = Output(path, Fingerprint.of("cropi-report", {**options, "kind": kind}, inputs), inputs, force=force)
        if not made.open():
            runtime.notify(f"{path}: up to date")
            return
        if kind == "page":
            from cropi_tools.report.page import page

            made.begin_work()
            content = page(comparison).encode()
        else:
            from cropi_tools.report.plots import curves

            made.begin_work()
            content = curves(comparison)
        made.part.write_bytes(content)
        made.finish(rows=len(comparison.arms))
        runtime.notify(f"{path}: written")

    if png is not None:
        write(png, "picture")
    if output is not None:
        write(output, "page")
    if as_json:
        show_json(json.dumps(figures(comparison), ensure_ascii=False, allow_nan=False))
    else:
        print_tables(comparison, sys.stdout)


main = command(report, name="cropi-report", example=EXAMPLE)
