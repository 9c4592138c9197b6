"""From responses to rewards: our verifiers see the text without the model's reasoning, a user's function sees all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cropi_tools.data.jsonl import Record
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rewards.reasoning import final_answer, reasoning_is_open
from cropi_tools.rewards.verifiers import BUILT_IN, verifier_of

PROMPT_END = 16  # tokens at the end of a prompt that are looked at for reasoning that the template has begun
CHUNK_RESPONSES = 256  # responses between two commits; fixed, so that a resumed file has the bytes of an unbroken one


def graded(pool: VerifierPool, records: Sequence[Record]) -> list[Record]:
    """The rollout records with `reward` and `outcome` of every sample. Records that have been passed on keep theirs."""
    fresh = [record for record in records if not _has_grades(record)]
    answers = [(record, _told(record, sample, pool.verifier)) for record in fresh for sample in record["samples"]]
    grades = iter(pool.grade_many(answers))
    found = []
    for record in records:
        if _has_grades(record):
            found.append(record)
            continue
        samples = [{**sample, **next(grades)._asdict()} for sample in record["samples"]]
        found.append({**record, "samples": samples})
    return found


def reasoning_mark(tokenizer: Any, prompt_token_ids: Sequence[int]) -> Record:
    """What a rollout record says where its prompt ends inside the model's reasoning; nothing where it does not."""
    return {"reasoning_open": True} if reasoning_is_open(tokenizer.decode(prompt_token_ids[-PROMPT_END:])) else {}


def _told(record: Record, sample: Record, verifier: str) -> str:
    """What the verifier is told of a response. verl and TRL give their functions the whole of it, which may reward how it reasons."""
    if verifier_of(record, verifier) not in BUILT_IN:
        return sample["text"]
    return final_answer(sample["text"], bool(record.get("reasoning_open")))


def _has_grades(record: Record) -> bool:
    return all("outcome" in sample for sample in record["samples"])


def without_grades(record: Record) -> Record:
    """A rollout record to be graded again; the keys of its samples keep their order."""
    samples = [{k: v for k, v in sample.items() if k not in ("reward", "outcome")} for sample in record["samples"]]
    return {**record, "samples": samples}
