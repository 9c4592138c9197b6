"""From responses to rewards: our verifiers see the text without the model's reasoning, a user's function sees all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cropi_tools.data.jsonl import Record
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rewards.reasoning import final_answer, reasoning_is_open
from cropi_tools.rewards.verifiers import BUILT_IN, verifier_of
from cropi_tools.runtime.errors import InputError

PROMPT_END = 16  # tokens at the end of a prompt that are looked at for reasoning that the template has begun
CHUNK_RESPONSES = 256  # responses between two commits; fixed, so that a resumed file has the bytes of an unbroken one


class Row(NamedTuple):
    """A rollout record; sampled: whether its samples were made now, or it was there before and is passed on as it is."""

    record: Record
    sampled: bool


def graded_rows(pool: VerifierPool, rows: Sequence[Row]) -> list[Row]:
    """The rows with a grade for every sample made now."""
    grades = iter(graded(pool, [row.record for row in rows if row.sampled]))
    return [row._replace(record=next(grades)) if row.sampled else row for row in rows]


def graded(pool: VerifierPool, records: Sequence[Record]) -> list[Record]:
    """The rollout records with `reward` and `outcome` of every sample, in place of those they may have."""
    answers = [(record, _told(record, sample, pool.verifier)) for record in records for sample in record["samples"]]
    grades = iter(pool.grade_many(answers))
    return [
        {**record, "samples": [{**sample, **next(grades)._asdict()} for sample in record["samples"]]}
        for record in records
    ]


def reasoning_mark(tokenizer: Any, prompt_token_ids: Sequence[int]) -> Record:
    """What a rollout record says where its prompt ends inside the model's reasoning; nothing where it does not."""
    return {"reasoning_open": True} if reasoning_is_open(tokenizer.decode(prompt_token_ids[-PROMPT_END:])) else {}


def _told(record: Record, sample: Record, verifier: str | None) -> str:
    """What the verifier is told of a response. verl and TRL give their functions the whole of it, which may reward how it reasons."""
    text = sample.get("text")
    if not isinstance(text, str):
        raise InputError(f"prompt '{record.get('id')}' has a sample without 'text', which a verifier reads; add it")
    if verifier_of(record, verifier) not in BUILT_IN:
        return text
    return final_answer(text, bool(record.get("reasoning_open")))
