"""What cropi-report was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from cropi_tools.options import SHARE, AsJson, CommandOptions, Option


@dataclass(frozen=True, kw_only=True)
class ReportOptions(CommandOptions):
    """The options of cropi-report."""

    renamed: ClassVar[Mapping[str, str]] = {"--reference": "--speedup-over"}

    runs: Annotated[
        tuple[str, ...],
        Option(
            "RUN",
            "Run folders, RUN/ARM/SEED/STAGE as `make curriculum` lays them out; or the policies of one chain of cropi-train.",
        ),
    ]
    output: Annotated[
        str | None, Option("-o --output", "Write the page: one self-contained HTML file.", metavar="FILE")
    ] = None
    png: Annotated[str | None, Option("--png", "Write the learning curves as a picture.", metavar="FILE")] = None
    as_json: AsJson = False
    join: Annotated[
        bool,
        Option("--join", "Take the runs for one: arms of one name are one arm, with seeds RUN/SEED.", "Report"),
    ] = False
    baseline: Annotated[str, Option("--baseline", "Arm that differences in accuracy are to.", "Report", "ARM")] = (
        "random"
    )
    speedup_over: Annotated[str, Option("--speedup-over", "Arm that speed-ups are over.", "Report", "ARM")] = "full"
    threshold: Annotated[
        float | None,
        Option(
            "--threshold",
            "Mean accuracy up to which speeds are measured, 0.6 for 60 %: fix it before you look.",
            "Report",
            "ACCURACY",
            SHARE,
            shown="of the last evaluations of --speedup-over",
        ),
    ] = None
    target: Annotated[
        tuple[str, ...],
        Option("--target", "Evaluation sets of the mean; may be repeated.", "Report", "SET", shown="all"),
    ] = ()

    def decisive(self, kind: str) -> dict[str, Any]:
        """What decides a page or a picture, besides the runs. `reference` was the option's name when the first ones were made."""
        found: dict[str, Any] = {
            "baseline": self.baseline,
            "reference": self.speedup_over,
            "target": list(self.target),
        }
        if self.join:
            found["join"] = True
        if self.threshold is not None:
            found["threshold"] = self.threshold
        return {**found, "kind": kind}
