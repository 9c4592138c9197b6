"""What a verifier says about a response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cropi_tools.data.records import Outcome, outcome_of_score

Record = Mapping[str, Any]


class Grade(NamedTuple):
    """What a response earned.

    `reward` is the verifier's score (0 for unparsed, timeout and error, and for partial scores of built-in verifiers unless partial credit is
    wanted). `outcome` is "correct" if the score is 1 (full credit) or more, "partial" if it lies between 0 and 1, and "wrong" if it is 0 or
    less; "unparsed" if the response holds no answer that could be read; "timeout" if grading took too long; "error" if the verifier's process
    died or a built-in verifier failed on the response.
    """

    reward: float
    outcome: Outcome


def scored(score: float) -> Grade:
    """The grade of a response that was read and got this score."""
    return Grade(score, outcome_of_score(score))


def prompt_name(record: Record) -> str:
    """How a message names the prompt of a record."""
    return f"prompt {record.get('id', '?')!r}"
