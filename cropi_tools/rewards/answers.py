"""Which answers a policy gives to a prompt, as the prompt's verifier reads them: to count those that are the same, and for people to see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from cropi_tools.rewards.choice import read_choice
from cropi_tools.rewards.extraction import MAX_ANSWER, extract_answer, last_tagged, own_turn
from cropi_tools.rewards.generated import readings, source_of
from cropi_tools.rewards.grades import Record
from cropi_tools.rewards.normalization import normalize
from cropi_tools.rewards.reasoning import final_answer
from cropi_tools.rewards.verifiers import BUILT_IN, DEFAULT


class Given(NamedTuple):
    """An answer as it was first written, and how many of the samples give it."""

    answer: str
    samples: int


def read_answer(record: Record, text: str) -> str:
    """The answer of a response, as the record's own verifier (else maths) reads it; all of the text where that reads none, or is a program.

    InputError: a record of reasoning-gym without its entry.
    """
    verifier = record.get("verifier") or DEFAULT
    if verifier not in BUILT_IN:
        return text.strip()
    response = final_answer(text, bool(record.get("reasoning_open")))
    return (_read(record, verifier, response) or response).strip()


def _read(record: Record, verifier: str, response: str) -> str | None:
    if verifier == "choice":
        return read_choice(response)
    if verifier == "exact":
        tagged = last_tagged(own_turn(response))
        return own_turn(response) if tagged is None else tagged.content
    if verifier == "reasoning-gym":
        return next(readings(response, source_of(record)["entry"].get("answer")), None)
    reference = record.get("answer")
    return extract_answer(response, None if reference is None else str(reference))


def most_frequent(record: Record, samples: Iterable[Record]) -> Given | None:
    """The answer that most samples give, the first of those that tie; None without samples. Samples of full reward all give the right one."""
    by_spelling = (record.get("verifier") or DEFAULT) == "maths"
    first: dict[object, str] = {}
    counts = Counter[object]()
    for sample in samples:
        answer = read_answer(record, sample.get("text") or "")
        alike = normalize(answer) if by_spelling and len(answer) <= MAX_ANSWER else answer
        same: object = True if sample["reward"] >= 1 else alike
        first.setdefault(same, answer)
        counts[same] += 1
    if not counts:
        return None
    most, count = counts.most_common(1)[0]
    return Given(first[most], count)
