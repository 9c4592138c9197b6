"""What cropi-project was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cropi_tools.options import SHARE, AsJson, CommandOptions, DryRun, Option, Seed, at_least, named, refuse

DEFAULT_KEEP = 0.1


@dataclass(frozen=True, kw_only=True)
class ProjectOptions(CommandOptions):
    """The options of cropi-project."""

    source: Annotated[
        str, Option("STORE|MEAN", "A store (raw, or a countsketch to fold), or a mean gradient.", metavar="STORE|MEAN")
    ]
    output: Annotated[
        str | None, Option("-o --output", "The store to write, of --dim dimensions.", metavar="STORE")
    ] = None
    dim: Annotated[
        int | None,
        Option(
            "--dim",
            "Sketch dimensions, a multiple of 64; for a fold, a divisor of the present ones.",
            "Sketch",
            "N",
            at_least(64),
        ),
    ] = None
    sketch: Annotated[
        Literal["countsketch", "sparse-jl", "sparse-gaussian", "sjlt"] | None,
        Option(
            "--sketch",
            "How rows are compressed: all coordinates, or a kept fraction (the paper).",
            "Sketch",
            shown="countsketch",
        ),
    ] = None
    keep: Annotated[
        float | None,
        Option("--keep", "Fraction of coordinates kept by the sparse ones.", "Sketch", range=SHARE, shown="0.1"),
    ] = None
    seed: Seed = 0
    fidelity: Annotated[
        tuple[tuple[str, str], ...],
        Option(
            "--fidelity",
            "Print how well the sketch ranks prompts, by the exact products with this mean in the store; may be repeated.",
            "Reliability",
            "NAME=MEAN",
            read=named,
        ),
    ] = ()
    store_check: Annotated[bool, Option("--check", "Print whether the store is whole.", "Reliability")] = False
    as_json: AsJson = False
    dry_run: DryRun = False

    def check(self) -> None:
        asks = bool(self.fidelity or self.store_check)
        mistakes = [
            (self.fidelity and self.store_check, "--fidelity and --check are two questions; ask one at a time"),
            (
                asks and (self.output or self.force),
                "--fidelity and --check print what they find and write nothing; leave -o and --force out",
            ),
            (
                asks and self.is_mean,
                f"{self.source}: is a mean gradient; --fidelity and --check are about a store",
            ),
            (
                self.store_check and (self.dim or self.sketch or self.keep is not None or self.seed),
                "--check reads a store as it is; leave --dim, --sketch, --keep and --seed out",
            ),
            (
                not asks and (self.dim is None or (self.output is None and not self.dry_run)),
                "a sketch needs --dim and -o STORE; without -o, ask for --fidelity or --check",
            ),
            (asks and self.dry_run, "--fidelity and --check write nothing; leave --dry-run out"),
            (
                not (asks or self.dry_run) and self.as_json,
                "--json is of --fidelity, --check and --dry-run; a sketch goes to -o",
            ),
        ]
        refuse(mistakes)

    @property
    def is_mean(self) -> bool:
        """Whether the source is a mean gradient."""
        return self.source.endswith(".safetensors")

    @property
    def method(self) -> Literal["countsketch", "sparse-jl", "sparse-gaussian", "sjlt"]:
        """The sketch that is made."""
        return self.sketch or "countsketch"

    @property
    def kept(self) -> float | None:
        """The fraction that the sketch keeps: --keep, or the default of the sparse ones."""
        return DEFAULT_KEEP if self.keep is None and self.method in ("sparse-jl", "sparse-gaussian") else self.keep

    def decisive(self) -> dict[str, Any]:
        """What decides the sketch, besides the source."""
        return {"sketch": self.method, "dim": self.dim, "keep": self.kept, "seed": self.seed}
