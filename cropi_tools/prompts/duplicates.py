"""Questions kept apart: each once, none of another file's, and the same question not with two answers.

Two prompts ask the same when their texts agree up to case, white space and Unicode's compatible forms. Memory holds digests
alone, about 40 bytes for a table entry whatever the texts (see `seen`).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cropi_tools.data.digest_set import Seen, short_digest
from cropi_tools.data.jsonl import Record, shown
from cropi_tools.runtime.errors import InputError

Prompt = str | Sequence[Mapping[str, Any]]


def normalize_question(prompt: Prompt) -> str:
    """The text by which two prompts count as the same question: NFKC, case folded, white space collapsed; messages are
    joined."""
    text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def bare_question(prompt: Prompt) -> str:
    """The normalized question without system messages, by which sets are kept apart: instructions do not make it another."""
    if isinstance(prompt, str):
        return normalize_question(prompt)
    return normalize_question([message for message in prompt if message["role"] not in ("system", "developer")])


class Exclusion:
    """Lets each question through once, and none of the excluded files'; counts what it met.

    kept; excluded; exact and normalized: repetitions of a kept prompt to the letter, and of its normalized question alone; conflicting:
    repetitions whose answer differs from the first one's. by_excluded and by_watched: for each such file the prompts that
    were found in it (in the first of several that hold one).
    """

    def __init__(self) -> None:
        self._forbidden, self._watched = Seen(notes=True), Seen(notes=True)
        self._questions = Seen(notes=True)
        self.kept = self.excluded = self.exact = self.normalized = self.conflicting = 0
        self.by_excluded: dict[str, int] = {}
        self.by_watched: dict[str, int] = {}

    @property
    def met(self) -> int:
        """Prompts asked about so far."""
        return self.kept + self.excluded + self.exact + self.normalized

    def forbid(self, name: str, prompts: Iterable[Prompt]) -> None:
        """Keep out the questions of a file."""
        _take(self._forbidden, self.by_excluded, name, prompts)

    def watch(self, name: str, prompts: Iterable[Prompt]) -> None:
        """Count, and let through, the questions of a file."""
        _take(self._watched, self.by_watched, name, prompts)

    def admits(self, record: Record, asked: Prompt | None = None) -> bool:
        """Whether the record's question is new and allowed; counts it. `asked`: the question before a template shaped it, which
        may stand in the excluded files too."""
        prompt = record["prompt"]
        question = normalize_question(prompt)
        bare = question if isinstance(prompt, str) else bare_question(prompt)
        barest = bare if asked is None or asked is prompt else bare_question(asked)
        if _found(self._forbidden, self.by_excluded, bare, barest):
            self.excluded += 1
            return False
        letters = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
        # both in one number: how the first one was written, and what it was answered with
        note = short_digest(letters) << 31 | short_digest(" ".join(str(record.get("answer", "")).split()))
        if not self._questions.add(question, note):
            first = self._questions.note(question) or 0
            exact = first >> 31 == note >> 31
            self.exact, self.normalized = self.exact + exact, self.normalized + (not exact)
            self.conflicting += (first ^ note) & (2**31 - 1) != 0
            return False
        _found(self._watched, self.by_watched, bare, barest)
        self.kept += 1
        return True

    def skipped(self) -> dict[str, int]:
        """What was left out, by reason, for the manifest."""
        return {
            "excluded": self.excluded,
            "exact repetitions": self.exact,
            "normalised repetitions": self.normalized,
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
        apart = "".join(f"; none in {name}" for name, count in self.by_watched.items() if not count)
        return f"{excluded}{self.exact} exact and {self.normalized} normalized repetitions dropped{apart}"

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


def _found(among: Seen, counts: dict[str, int], *questions: str) -> bool:
    """Whether one of the questions is among a file's; counts it for that file."""
    for question in questions if len(among) else ():
        place = among.note(question)
        if place is not None:
            counts[list(counts)[place]] += 1
            return True
    return False
