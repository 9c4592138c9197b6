"""What cropi-prompts was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cropi_tools.options import CommandOptions, Option, Output, Seed, as_text, at_least, named
from cropi_tools.runtime.errors import UsageError

HUB, FAMILY, RECIPE = "hf:", "reasoning-gym:", "recipe:"


def kind_of_source(source: str) -> str:
    """`reasoning-gym:`, `recipe:`, or `data` for anything else."""
    return next((kind for kind in (FAMILY, RECIPE) if source.startswith(kind)), "data")


def has_splits(name: str) -> bool:
    """Whether a source is of a kind that can have several splits: a folder, or a data set by name."""
    return name.startswith(HUB) or Path(name).is_dir()


def not_empty(text: str) -> str:
    """Text with something in it, as UTF-8."""
    if not text.strip():
        raise UsageError("is empty; leave it out")
    return as_text(text)


@dataclass(frozen=True, kw_only=True)
class PromptsOptions(CommandOptions):
    """The options of cropi-prompts."""

    sources: Annotated[
        tuple[str, ...],
        Option(
            "SOURCE",
            "reasoning-gym:FAMILY, recipe:FILE (a family a line), hf:NAME[:CONFIG], or data: a file (JSONL, JSON, CSV, TSV, "
            "parquet, Arrow) or folder in our, verl's, TRL's or the authors' form, or any with --map.",
        ),
    ]
    output: Output = "-"
    split: Annotated[
        str | None,
        Option("--split", "Split of a folder or of hf:NAME (there train, unless given).", metavar="NAME"),
    ] = None
    mapping: Annotated[
        tuple[str, ...],
        Option(
            "--map",
            "Columns of data: prompt=question,answer=reward.gold,source=...,id=...,verifier=...; may be repeated.",
            metavar="NAME=COLUMN,...",
        ),
    ] = ()
    size: Annotated[
        int | None,
        Option(
            "--size",
            "Prompts to take: of data a random sample by --seed, in its order; for a recipe, from each of its lines.",
            "Prompts",
            "N",
            at_least(1),
        ),
    ] = None
    settings: Annotated[
        tuple[tuple[str, str], ...],
        Option("--set", "A difficulty setting of the family; may be repeated.", "Prompts", "KEY=VALUE", read=named),
    ] = ()
    only: Annotated[
        tuple[str, ...], Option("--only", "Only these sources of a recipe; may be repeated.", "Prompts", "SOURCE")
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        Option("--exclude", "Leave out questions that are in this file; may be repeated.", "Prompts", "FILE"),
    ] = ()
    check_overlap: Annotated[
        tuple[str, ...],
        Option("--check-overlap", "Say how many questions are in this file too; may be repeated.", "Prompts", "FILE"),
    ] = ()
    source: Annotated[
        str | None,
        Option("--source", "Name of the source in the records, and of ids that data lacks.", "Prompts", "NAME"),
    ] = None
    template: Annotated[
        str | None,
        Option(
            "--template",
            "Shapes the question: {question} or the task's fields, as in 'G{numbers}='; of data {prompt} or its columns.",
            "Templates",
            "TEXT",
            read=not_empty,
        ),
    ] = None
    answer_template: Annotated[
        str | None,
        Option(
            "--answer-template",
            "Shapes the answer: '{answer:nospace,lower}'.",
            "Templates",
            "TEXT",
            read=not_empty,
        ),
    ] = None
    system: Annotated[
        str | None,
        Option("--system", "A system message before every prompt.", "Templates", "TEXT", read=not_empty),
    ] = None
    messages: Annotated[
        str | None,
        Option(
            "--messages",
            "Worked examples before every question: a JSON list of messages with role and content, the user's and the assistant's "
            "in turn.",
            "Templates",
            "FILE",
        ),
    ] = None
    template_kwargs: Annotated[
        tuple[str, ...],
        Option(
            "--chat-template-kwargs",
            "For the policy's chat template, such as enable_thinking=false; may be repeated.",
            "Templates",
            "KEY=VALUE",
            read=as_text,
        ),
    ] = ()
    last_assistant: Annotated[
        Literal["refuse", "drop", "continue"],
        Option(
            "--last-assistant",
            "What to do with a last message of the assistant: it can be a solution (drop), or the beginning of the response "
            "(continue).",
            "Templates",
        ),
    ] = "refuse"
    seed: Seed = 0

    def check(self) -> None:
        if FAMILY in self.kinds and self.size is None:
            raise UsageError("reasoning-gym makes as many prompts as asked for: give --size")
        for option, given, used, what in (
            ("--set", self.settings, FAMILY in self.kinds, "reasoning-gym:FAMILY"),
            ("--only", self.only, RECIPE in self.kinds, "recipe:FILE"),
            ("--map", self.mapping, self.data, "data"),
            ("--split", self.split, any(map(has_splits, self.data)), "a folder or hf:NAME"),
        ):
            if given and not used:
                raise UsageError(f"{option} is for {what}, which is not among the sources")

    @property
    def kinds(self) -> list[str]:
        """The kind of each source."""
        return [kind_of_source(text) for text in self.sources]

    @property
    def data(self) -> list[str]:
        """The sources that are data."""
        return [text for text in self.sources if kind_of_source(text) == "data"]

    @property
    def recipes(self) -> list[str]:
        """The files of the recipes among the sources."""
        return [text.removeprefix(RECIPE) for text in self.sources if text.startswith(RECIPE)]

    def decisive(self, columns: Mapping[str, str], kwargs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """What decides the prompts, besides the inputs. names: of the data, which ids and sources that it lacks are named after."""
        found = {
            "sources": [text if kind_of_source(text) == FAMILY else kind_of_source(text) for text in self.sources],
            "size": self.size,
            "seed": self.seed,
            "set": dict(self.settings),
            "split": self.split,
            "map": columns,
            "template": self.template,
            "answer_template": self.answer_template,
            "system": self.system,
            "chat_template_kwargs": dict(kwargs),
            "last_assistant": self.last_assistant,
            "source": self.source,
            "names": None if self.source else list(names),
            "only": list(self.only) or None,
        }
        # the first outputs held the first rows
        return {**found, "sample": "by seed and id"} if self.data and self.size is not None else found
