"""Questions kept apart: each once, none of another file's, and the same question not with two answers.

`data/questions.py` says when two prompts ask the same. Memory holds digests alone, about 40 bytes for a table entry whatever the texts
(see `digest_set`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from cropi_tools.data.digest_set import Seen, short_digest
from cropi_tools.data.jsonl import Record, shown
from cropi_tools.data.questions import Prompt, bare_question, normalize_question, without_examples
from cropi_tools.runtime.errors import InputError


class Exclusion:
    """Lets each question through once, and none of the excluded files'; counts what it met.

    kept; excluded; exact and normalized: repetitions of a kept prompt to the letter, and of its normalized question alone; conflicting:
    repetitions whose answer differs from the first one's; not_drawn: those that no sample took. by_excluded and by_watched: for each such
    file the prompts that were found in it (in the first of several that hold one).
    """

    def __init__(self) -> None:
        self._forbidden, self._watched = Seen(notes=True), Seen(notes=True)
        self._questions = Seen(notes=True)
        self.kept = self.excluded = self.exact = self.normalized = self.conflicting = self.not_drawn = 0
        self.by_excluded: dict[str, int] = {}
        self.by_watched: dict[str, int] = {}

    @property
    def met(self) -> int:
        """Prompts asked about so far."""
        return self.kept + self.excluded + self.exact + self.normalized + self.not_drawn

    def forbid(self, name: str, prompts: Iterable[Prompt]) -> None:
        """Keep out the questions of a file."""
        _take(self._forbidden, self.by_excluded, name, prompts)

    def watch(self, name: str, prompts: Iterable[Prompt]) -> None:
        """Count, and let through, the questions of a file."""
        _take(self._watched, self.by_watched, name, prompts)

    def admits(self, record: Record, asked: Prompt | None = None) -> bool:
        """Whether the record's question is new and allowed; counts it. `asked`: the question before a template shaped it, which
        may stand in the excluded files too."""
        if not self._allows(record, asked) or self._repeats(self._questions, record):
            return False
        self.take(record, asked)
        return True

    def offers(self, record: Record, asked: Prompt | None, offered: Seen) -> bool:
        """As `admits`, for a record that `take` or `leave` will be told of: its question counts as kept only then.

        offered: the questions of those that wait so, with notes; this one is added.
        """
        if not self._allows(record, asked) or self._repeats(self._questions, record) or self._repeats(offered, record):
            return False
        offered.add(normalize_question(record["prompt"]), _note(record))
        return True

    def take(self, record: Record, asked: Prompt | None = None) -> None:
        """Count a record as kept."""
        self._questions.add(normalize_question(record["prompt"]), _note(record))
        _found(self._watched, self.by_watched, *_bare(record, asked))
        self.kept += 1

    def leave(self, count: int) -> None:
        """Count records that were not drawn."""
        self.not_drawn += count

    def _allows(self, record: Record, asked: Prompt | None) -> bool:
        found = _found(self._forbidden, self.by_excluded, *_bare(record, asked))
        self.excluded += found
        return not found

    def _repeats(self, among: Seen, record: Record) -> bool:
        first = among.note(normalize_question(record["prompt"]))
        if first is None:
            return False
        note = _note(record)
        exact = first >> 31 == note >> 31
        self.exact, self.normalized = self.exact + exact, self.normalized + (not exact)
        self.conflicting += (first ^ note) & (2**31 - 1) != 0
        return True

    def skipped(self) -> dict[str, int]:
        """What was left out, by reason, for the manifest."""
        return {
            "excluded": self.excluded,
            "exact repetitions": self.exact,
            "normalised repetitions": self.normalized,
            **({"not drawn": self.not_drawn} if self.not_drawn else {}),
        }

    def facts(self) -> dict[str, Any]:
        """The counts by file, and of repetitions with another answer, for the manifest."""
        return {
            "excluded": dict(self.by_excluded),
            "overlap": dict(self.by_watched),
            "conflicting_answers": self.conflicting,
        }

    def in_words(self) -> str:
        """What was left out: `3 excluded: 2 in a.jsonl, 1 in b.jsonl; 1 exact and 0 normalized repetitions dropped`."""
        where = ", ".join(f"{count} in {name}" for name, count in self.by_excluded.items())
        excluded = f"{self.excluded} excluded: {where}; " if where else ""
        drawn = f"drawn from {self.kept + self.not_drawn}; " if self.not_drawn else ""
        apart = "".join(f"; none in {name}" for name, count in self.by_watched.items() if not count)
        return f"{drawn}{excluded}{self.exact} exact and {self.normalized} normalized repetitions dropped{apart}"

    def warnings(self) -> Iterator[str]:
        """One sentence for each thing a user should know before training."""
        for name, count in self.by_watched.items():
            if count:
                yield f"{count} of the {self.kept} questions stand in {name} too; --exclude {name} leaves them out"
        if self.conflicting:
            yield f"repetitions dropped whose answer is not that of the one kept: {self.conflicting}"


def _take(into: Seen, counts: dict[str, int], name: str, prompts: Iterable[Prompt]) -> None:
    counts.setdefault(name, 0)
    place = list(counts).index(name)
    empty = True
    for prompt in prompts:
        empty = False
        into.add(bare_question(prompt), place)
    if empty:
        raise InputError(f"{shown(name)}: holds no record")


def _note(record: Record) -> int:
    """Both in one number: how a record's question is written, and what it is answered with."""
    prompt = record["prompt"]
    letters = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return short_digest(letters) << 31 | short_digest(" ".join(str(record.get("answer", "")).split()))


def _bare(record: Record, asked: Prompt | None) -> tuple[str, ...]:
    """The questions by which a record stands in another file: its own, and the one before a template shaped it."""
    bare = bare_question(without_examples(record))
    return (bare,) if asked is None or asked is record["prompt"] else (bare, bare_question(asked))


def _found(among: Seen, counts: dict[str, int], *questions: str) -> bool:
    """Whether one of the questions is among a file's; counts it for that file."""
    for question in questions if len(among) else ():
        place = among.note(question)
        if place is not None:
            counts[list(counts)[place]] += 1
            return True
    return False
