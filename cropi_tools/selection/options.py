"""What cropi-select was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cropi_tools.options import CommandOptions, Option, Output, Seed, at_least, between, ordered_pair
from cropi_tools.runtime.errors import UsageError

RATIO = "0.1"
"""The share of the pool where neither --ratio nor -n is given."""


def ratio(text: str) -> str:
    """A share above 0 and at most 1, as it was written: its decimal digits decide how many prompts it is."""
    from cropi_tools.selection.rules import selection_size

    selection_size(text, 1)
    return text


@dataclass(frozen=True, kw_only=True)
class SelectOptions(CommandOptions):
    """The options of cropi-select."""

    scores: Annotated[tuple[str, ...], Option("SCORES", "Scores of cropi-score (shards together).")] = ()
    prompts: Annotated[
        tuple[str, ...],
        Option("--prompts", "The pool the scores belong to; may be repeated.", metavar="FILE"),
    ]
    rollouts: Annotated[
        tuple[str, ...],
        Option(
            "--rollouts",
            "In place of scores, for a rule by pass rates: rollouts of the pool; may be repeated.",
            metavar="FILE",
        ),
    ] = ()
    output: Output = "-"
    format: Annotated[
        Literal["jsonl", "verl", "trl"],
        Option("--format", "Rows of ours, verl's or TRL's; the last two as parquet where -o ends in .parquet."),
    ] = "jsonl"
    by: Annotated[
        Literal["influence", "shuffled", "random", "learnability", "hardest", "pass-rate", "full"],
        Option(
            "--by",
            "The rule; shuffled, the control, is influence with the pool permuted (one --seed for all stages).",
            "Selection",
        ),
    ] = "influence"
    ratio: Annotated[
        str | None,
        Option("--ratio", "Share of the pool to select, rounded down.", "Selection", "SHARE", read=ratio, shown=RATIO),
    ] = None
    number: Annotated[
        int | None,
        Option("-n --number", "How many prompts to select, in place of --ratio.", "Selection", "N", at_least(1)),
    ] = None
    among: Annotated[
        Literal["measured", "predicted", "all"],
        Option(
            "--among",
            "With scores of cropi-score --predict: which prompts may be selected by influence; predicted makes a shortlist to measure.",
            "Selection",
        ),
    ] = "measured"
    per_source: Annotated[
        bool,
        Option("--per-source", "With --by random: the same number from every source, or all that it has.", "Selection"),
    ] = False
    band: Annotated[
        tuple[float, float] | None,
        Option(
            "--band",
            "Pass rates that --by pass-rate accepts.",
            "Selection",
            "LO,HI",
            between(0, 1),
            ordered_pair,
            shown="0.2,0.8",
        ),
    ] = None
    seed: Seed = 0

    def check(self) -> None:
        from cropi_tools.selection.rules import RULES_BY_PASS_RATE

        if self.rollouts and self.by not in RULES_BY_PASS_RATE:
            raise UsageError(
                f"--rollouts tell pass rates, and --by {self.by} reads none; leave them out or select by "
                f"{', '.join(sorted(RULES_BY_PASS_RATE))}"
            )
        if self.rollouts and self.scores:
            raise UsageError(f"{self.scores[0]} and --rollouts {self.rollouts[0]}: both tell pass rates; give one")
        if self.number is not None and self.ratio is not None:
            raise UsageError(
                f"-n {self.number} and --ratio {self.ratio}: each says how many prompts to select; give one"
            )
        if self.number is not None and self.by == "full":
            raise UsageError(f"-n {self.number}: --by full selects the whole pool; leave -n out")
        if self.among != "measured" and not self.by_influence:
            raise UsageError(f"--among {self.among}: chooses among scores, and --by {self.by} reads none; leave it out")
        if self.per_source and self.by != "random":
            raise UsageError(f"--per-source is for --by random, not --by {self.by}; leave it out")
        if self.as_table and self.format == "jsonl":
            raise UsageError(f"-o {self.output}: parquet is written with --format verl or trl")

    @property
    def share(self) -> str:
        """The share of the pool, where no number is asked for."""
        return self.ratio or RATIO

    @property
    def by_influence(self) -> bool:
        """Whether influence ranks the prompts, of themselves or of those they stand for."""
        return self.by in ("influence", "shuffled")

    @property
    def as_table(self) -> bool:
        """Whether the output is a parquet file."""
        return self.output.endswith(".parquet")

    def decisive(self) -> dict[str, Any]:
        """What decides the selection, besides the inputs."""
        found = {"by": self.by, "ratio": self.share, "band": self.band, "seed": self.seed, "format": self.format}
        if self.number is not None:
            del found["ratio"]
            found["number"] = self.number
        if self.by_influence:
            found["fields"] = 2  # before, `score` was the merged reciprocal rank
        if self.by == "shuffled":
            found["permuted"] = "pool"  # before, only the prompts with a score were
        if self.among != "measured":
            found["among"] = self.among
        if self.per_source:
            found["per_source"] = "even"  # before, each gave its share of the pool
        return found
