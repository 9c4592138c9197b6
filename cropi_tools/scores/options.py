"""What cropi-score was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from cropi_tools.options import CommandOptions, DryRun, Option, Output, named, refuse
from cropi_tools.selection.options import RATIO, ratio

PREDICTED = "predicted"
"""The status of a prompt whose score was not measured."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(CommandOptions):
    """The options of cropi-score."""

    renamed: ClassVar[Mapping[str, str]] = {"--train": "the argument STORE"}

    stores: Annotated[tuple[str, ...], Option("STORE", "Stores of the pool's gradients (shards together).")]
    valid: Annotated[
        tuple[tuple[str, str], ...],
        Option(
            "--valid",
            "A validation set's store; the same name again adds a shard.",
            metavar="NAME=STORE",
            read=named,
        ),
    ] = ()
    norms: Annotated[
        tuple[str, ...],
        Option(
            "--norms",
            "Divide by the gradient norms in this store of the same prompts (an earlier stage's, say), for stores of "
            "forward mode; may be repeated.",
            metavar="STORE",
        ),
    ] = ()
    output: Output = "-"
    similarity: Annotated[
        Literal["cosine", "dot"] | None,
        Option("--similarity", "Cosine, or inner product, which keeps the norms.", "Scores", shown="cosine"),
    ] = None
    each: Annotated[
        bool, Option("--each", "Make every prompt of the validation stores a set of its own, NAME/ID.", "Scores")
    ] = False
    predict: Annotated[
        tuple[str, ...],
        Option(
            "--predict",
            "The whole pool, of which STORE is a part: predict the scores of the rest; may be repeated.",
            "Prediction",
            "FILE",
        ),
    ] = ()
    features: Annotated[
        tuple[str, ...],
        Option(
            "--features", "With --predict: the pool's features (cropi-embed); may be repeated.", "Prediction", "FILE"
        ),
    ] = ()
    old: Annotated[
        tuple[str, ...],
        Option(
            "--old",
            "With --predict: scores of an earlier stage, or its policy's influence.jsonl (cropi-train --against), which count as far as they "
            "help; may be repeated, the newest first.",
            "Prediction",
            "SCORES",
        ),
    ] = ()
    if_weak: Annotated[
        Literal["refuse", "warn"],
        Option(
            "--if-weak",
            "With --predict: where the prediction is no better than chance or than the mean of a prompt's source, refuse or go on.",
            "Prediction",
        ),
    ] = "refuse"
    reliability: Annotated[
        bool,
        Option("--reliability", "Print how well one half of the rollouts predicts the other's ranking.", "Reliability"),
    ] = False
    ratio: Annotated[
        str | None,
        Option(
            "--ratio",
            "With --reliability: the share of all prompts that will be selected; its precision is printed.",
            "Reliability",
            "SHARE",
            read=ratio,
            shown=RATIO,
        ),
    ] = None
    as_json: Annotated[bool, Option("--json", "With --reliability or --dry-run: print it as JSON.", "Reliability")] = (
        False
    )
    suspects: Annotated[
        tuple[str, ...],
        Option(
            "--suspects",
            "In place of scores: list the prompts that pull away from a target by more than noise, as those with wrong reference answers do, "
            "with the answers in these rollouts of the pool; may be repeated.",
            "Reliability",
            "ROLLOUTS",
        ),
    ] = ()
    dry_run: DryRun = False

    def check(self) -> None:
        of_halves, of_scores = self.reliability, not self.reliability
        mistakes = [
            (
                self.suspects and (of_halves or self.valid or self.norms or self.each or self.predict),
                "--suspects looks at the halves in the stores; leave --reliability, --valid, --norms, --each and --predict out",
            ),
            (self.suspects and self.dry_run, "--suspects takes seconds; leave --dry-run out"),
            (
                of_halves and (self.valid or self.norms or self.output != "-" or self.force),
                "--reliability compares the halves in the stores and prints on stdout; leave --valid, --norms, -o and --force out",
            ),
            (of_scores and self.ratio is not None, "--ratio is of --reliability; cropi-select has one of its own"),
            (of_halves and self.dry_run, "--reliability writes nothing; leave --dry-run out"),
            (
                of_scores and self.as_json and not self.dry_run,
                "--json is of --reliability and --dry-run; scores are JSON lines already",
            ),
            (
                of_scores and self.each and not self.valid,
                "--each takes the prompts of validation stores; name them with --valid",
            ),
            (
                of_scores and self.norms and (self.valid or self.similarity == "dot"),
                "--norms is for cosines of exact inner products; leave it out with --valid and --similarity dot",
            ),
            (
                self.predict and (self.reliability or self.each),
                "--predict makes a scores file by validation set; leave --reliability and --each out",
            ),
            (self.predict and not self.features, "--predict needs the pool's features: --features FILE (cropi-embed)"),
            (
                not self.predict and (self.features or self.old or self.if_weak != "refuse"),
                "--features, --old and --if-weak are of --predict FILE",
            ),
        ]
        refuse(mistakes)

    @property
    def measure(self) -> Literal["cosine", "dot"]:
        """The similarity of scores."""
        return self.similarity or "cosine"

    @property
    def targets(self) -> dict[str, list[str]]:
        """The stores of each validation set."""
        found: dict[str, list[str]] = {}
        for name, path in self.valid:
            found.setdefault(name, []).append(path)
        return found

    def decisive(self) -> dict[str, Any]:
        """What decides the scores, or the suspects, besides the inputs."""
        if self.suspects:
            return {"suspects": True, "similarity": self.similarity}
        found = {"sets": sorted(self.targets), "each": self.each, "similarity": self.measure}
        if self.predict:
            found["predict"] = True
        return found
