"""What a run selects from: the pool's sources and pass rates, and the prompts that its first scores put first and last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools.data.fields import PROMPT, SCORES, SELECTED, SUSPECT
from cropi_tools.data.jsonl import Record, read_jsonl
from cropi_tools.data.manifest import file_digest
from cropi_tools.report.records import checked

ENDS = 5  # prompts at either end of a ranking
SUSPECTS = "suspects.jsonl"
"""In the folder of the shared first stage: what cropi-score --suspects found."""
_SCORED = {**SELECTED, "scores": SCORES["scores"]}


@dataclass(frozen=True)
class Selection:
    """What one stage trains on, or a pool: ids, prompts by source, and the pass rates under the rollouts' policy (None = unknown)."""

    ids: frozenset[str]
    sources: Mapping[str, int]
    pass_rates: tuple[float | None, ...]


class Ranked(NamedTuple):
    """A prompt and its score on one validation set."""

    id: str
    source: str
    score: float
    pass_rate: float | None


class Ends(NamedTuple):
    """The prompts of the highest scores, best first, and those of the lowest, worst last; none is in both. scored: how many have a score."""

    top: Sequence[Ranked]
    bottom: Sequence[Ranked]
    scored: int


class Suspect(NamedTuple):
    """A prompt that pulls away from a target by more than noise, as cropi-score --suspects lists it; scores and deviations by validation set."""

    text: str
    source: str
    answer: str
    usual_answer: str
    pass_rate: float | None
    scores: Mapping[str, float]
    deviations: Mapping[str, float]


@dataclass(frozen=True)
class Pool:
    """The pool of a run as its first scores have it. rates: pass rates by id. ends: by validation set. suspects: most suspicious first; None
    where nobody looked for them.
    """

    everything: Selection
    rates: Mapping[str, float | None]
    ends: Mapping[str, Ends]
    suspects: Sequence[Suspect] | None = None


def selection_of(found: Iterable[Record], rates: Mapping[str, float | None]) -> Selection:
    """The selection that records are. rates: those of prompts whose record has none."""
    ids: set[str] = set()
    sources: Counter[str] = Counter()
    known: list[float | None] = []
    for number, record in enumerate(found, 1):
        ids.add(record.get("id", str(number)))
        sources[_source(record)] += 1
        rate = record.get("pass_rate")
        known.append(rates.get(record.get("id", "")) if rate is None else rate)
    return Selection(frozenset(ids), dict(sorted(sources.items())), tuple(known))


def _source(record: Record) -> str:
    return record.get("source") or "unknown"


def read_pool(start: Path) -> Pool | None:
    """The pool by the scores in the folder of the shared first stage; None where there are none. InputError: a broken line."""
    found = [
        record for path in sorted(start.glob("scores*.jsonl")) for record in checked(path, read_jsonl(path), _SCORED)
    ]
    if not found:
        return None
    rates = {record["id"]: record.get("pass_rate") for record in found if "id" in record}
    return Pool(selection_of(found, {}), rates, _ends(found), _suspects(start))


def _suspects(start: Path) -> list[Suspect] | None:
    path = start / SUSPECTS
    if not path.exists():
        return None
    return [
        Suspect(
            f"({record['id']})" if record.get("prompt") is None else _text(record["prompt"]),
            _source(record),
            str(record.get("answer")),
            record["usual_answer"],
            record.get("pass_rate"),
            record["scores"],
            record["deviations"],
        )
        for record in checked(path, read_jsonl(path), SUSPECT, ("id", "usual_answer", "scores", "deviations"))
    ]


def _ends(found: Sequence[Record]) -> dict[str, Ends]:
    on_set: dict[str, list[Ranked]] = {}
    for record in found:
        if "id" in record:
            for name, score in (record.get("scores") or {}).items():
                on_set.setdefault(name, []).append(
                    Ranked(record["id"], _source(record), score, record.get("pass_rate"))
                )
    ends = {}
    for name, ranking in sorted(on_set.items()):
        ranking.sort(key=lambda item: (-item.score, item.id))
        size = min(ENDS, len(ranking) // 2)
        ends[name] = Ends(ranking[:size], ranking[len(ranking) - size :], len(ranking))
    return ends


def read_texts(files: Mapping[str, str], ids: frozenset[str]) -> dict[str, str]:
    """The texts of prompts by id, from the pool's files, of which a selection keeps the hash; none where a file is no longer what it was.

    files: SHA-256 by path.
    """
    paths = [Path(path) for path in files]
    if not all(path.is_file() and file_digest(path) == files[str(path)] for path in paths):
        return {}
    return {
        record["id"]: _text(record["prompt"])
        for path in paths
        for record in checked(path, read_jsonl(path), PROMPT, ("id", "prompt"))
        if record["id"] in ids
    }


def _text(prompt: Any) -> str:
    """A prompt as text: of messages what each says."""
    return prompt if isinstance(prompt, str) else " / ".join(f"{item['role']}: {item['content']}" for item in prompt)
