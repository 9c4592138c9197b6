"""All the sources of one `cropi-prompts` together: each read, put into its template, and let through once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from cropi_tools.data.digest_set import Seen
from cropi_tools.data.jsonl import Record
from cropi_tools.prompts.datasets import Dataset
from cropi_tools.prompts.duplicates import Exclusion
from cropi_tools.prompts.options import RECIPE, kind_of_source
from cropi_tools.prompts.recipes import reasoning_gym_prompts, recipe_prompts
from cropi_tools.prompts.row_formats import dataset_prompts
from cropi_tools.prompts.templates import PromptTemplate
from cropi_tools.runtime.errors import InputError


@dataclass
class SourceReader:
    """How sources are read. `settings`, `seed` and `only` are for generated prompts, `columns` (see `row_formats.parse_mapping`) for data;
    `size` is the most of each source, and of each line of a recipe; `datasets` holds what was opened, by source."""

    prompt_template: PromptTemplate
    datasets: Mapping[str, Dataset] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    seed: int = 0
    source: str | None = None
    only: Collection[str] = ()
    exclusion: Exclusion = field(default_factory=Exclusion)

    def __post_init__(self) -> None:
        self._ids = Seen()

    def prompts(self, source: str) -> Iterator[Record]:
        """The prompts of one source that no earlier one had. InputError: also an id that comes twice."""
        kind = kind_of_source(source)
        made = self._data(source) if kind == "data" else self._generated(kind, source)
        for where, record in islice(made, None if kind == RECIPE else self.size):
            if not self._ids.add(record["id"]):
                raise InputError(
                    f"{where}: id '{record['id']}' comes twice; read the file on its own with a --source of its own, or map another "
                    "column to id"
                )
            yield record

    def _generated(self, kind: str, source: str) -> Iterator[tuple[str, Record]]:
        name, shaping = source.removeprefix(kind), self.prompt_template
        if kind == RECIPE:
            made = recipe_prompts(name, self.seed, self.size, self.only, self.exclusion)
        else:
            assert self.size is not None, "a family has no size of its own"
            made = reasoning_gym_prompts(
                name,
                self.size,
                self.seed,
                self.settings,
                shaping.template,
                shaping.answer_template,
                self.source,
                exclusion=self.exclusion,
            )
        for record in made:
            yield source, shaping.of_prompt(record, source)

    def _data(self, source: str) -> Iterator[tuple[str, Record]]:
        for where, row, record in dataset_prompts(self.datasets[source], self.columns, self.source):
            shaped = self.prompt_template.of_row(record, row, where)
            if self.exclusion.admits(shaped, record["prompt"]):
                yield where, shaped
