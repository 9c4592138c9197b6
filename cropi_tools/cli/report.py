"""cropi-report: what came out of a run, as a table, a picture and a page."""

from __future__ import annotations

from cropi_tools.cli.entry import entry
from cropi_tools.report.options import ReportOptions
from cropi_tools.runtime.console import show_json

EXAMPLE = """
cropi-report runs/tiny
cropi-report runs/tiny -o report.html --png curves.png
cropi-report runs/tiny --target gcd --threshold 0.6
cropi-report P1 P2 P3
cropi-report runs/a runs/b --json | jq '.arms | map_values(.target.mean)'
cropi-report --join runs/seed-*
"""


def report(options: ReportOptions) -> None:
    """Learning curves, differences with intervals, what each stage selected and what it cost, of one run or several.

    The table goes to stdout. Unfinished arms are shown as far as they are, and said to be unfinished.
    """
    import json
    import sys
    from pathlib import Path

    from cropi_tools.report.run import compare_runs, run_input, write
    from cropi_tools.report.tables import as_json, print_tables

    runs = [Path(folder) for folder in options.runs]
    comparison = compare_runs(
        runs, options.baseline, options.speedup_over, options.target, options.threshold, options.join
    )
    inputs = {f"run {place}": run_input(folder) for place, folder in enumerate(runs, 1)}
    if options.png is not None:
        write(options.png, "picture", comparison, options, inputs)
    if options.output is not None:
        write(options.output, "page", comparison, options, inputs)
    if options.as_json:
        show_json(json.dumps(as_json(comparison), ensure_ascii=False, allow_nan=False))
    else:
        print_tables(comparison, sys.stdout)


main = entry(ReportOptions, report, name="cropi-report", example=EXAMPLE)
