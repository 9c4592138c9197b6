"""All the sources of one `cropi-prompts` together: each read, put into its template, and let through once."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.digest_set import Seen, hash64
from cropi_tools.data.jsonl import Record
from cropi_tools.data.questions import Prompt, without_examples
from cropi_tools.prompts.datasets import Dataset
from cropi_tools.prompts.duplicates import Exclusion
from cropi_tools.prompts.options import RECIPE, kind_of_source
from cropi_tools.prompts.recipes import reasoning_gym_prompts, recipe_prompts
from cropi_tools.prompts.row_formats import dataset_prompts
from cropi_tools.prompts.templates import PromptTemplate
from cropi_tools.runtime.errors import InputError


@dataclass
class SourceReader:
    """How sources are read. `settings` and `only` are for generated prompts, `columns` (see `row_formats.parse_mapping`) for data;
    `size` is the most of each source, drawn by `seed` from data, and of each line of a recipe; `datasets` holds what was opened, by source."""

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
        self.shaped = 0
        """Generated prompts of another form than reasoning-gym's scorer knows, which `exact` verifies."""

    def prompts(self, source: str) -> Iterator[Record]:
        """The prompts of one source that no earlier one had. InputError: also an id that comes twice."""
        kind = kind_of_source(source)
        if kind == "data" and self.size is not None:
            yield from self._drawn(source, self.size)
            return
        for where, record in self._admitted(source) if kind == "data" else self._generated(kind, source):
            self._refuse_repeated_id(record, where)
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
            self.shaped += record["verifier"] == "exact"
            yield source, shaping.of_prompt(record, source)

    def _admitted(self, source: str) -> Iterator[tuple[str, Record]]:
        for where, record, asked in self._data(source):
            if self.exclusion.admits(record, asked):
                yield where, record

    def _drawn(self, source: str, size: int) -> Iterator[Record]:
        """A sample of a data source, in its order: those whose ids have the smallest numbers by the seed. So a larger sample holds a smaller
        one of the same seed, and what other rows there are moves none. Memory holds `size` prompts."""
        drawn: list[tuple[int, int, Record, Prompt]] = []  # a heap, the largest number first
        offered = Seen(notes=True)
        count = 0
        for where, record, asked in self._data(source):
            runtime.stop_if_requested()
            if not self.exclusion.offers(record, asked, offered):
                continue
            self._refuse_repeated_id(record, where)
            entry = (-hash64(f"sample:{self.seed}:{record['id']}"), -count, record, asked)
            count += 1
            if len(drawn) < size:
                heapq.heappush(drawn, entry)
            elif entry[0] > drawn[0][0]:
                heapq.heapreplace(drawn, entry)
        self.exclusion.leave(count - len(drawn))
        for _, _, record, asked in sorted(drawn, key=lambda one: -one[1]):
            self.exclusion.take(record, asked)
            yield record

    def _data(self, source: str) -> Iterator[tuple[str, Record, Prompt]]:
        """Every row's place, its prompt in final form, and the question before a template shaped it."""
        for where, row, record in dataset_prompts(self.datasets[source], self.columns, self.source):
            yield where, self.prompt_template.of_row(record, row, where), without_examples(record)

    def _refuse_repeated_id(self, record: Record, where: str) -> None:
        if not self._ids.add(record["id"]):
            raise InputError(
                f"{where}: id '{record['id']}' comes twice; read the file on its own with a --source of its own, or map another "
                "column to id"
            )
