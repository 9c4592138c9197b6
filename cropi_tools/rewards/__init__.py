"""Verifiers: is this response right?

This room turns a prompt's record and a response into a grade: a reward and what became of the answer (correct, partial,
wrong, unparsed, timeout, error). It holds the verifiers (mathematics, the letter of a choice, exact text, reasoning-gym's
scorers, and functions of the user's own in verl's form or TRL's), what tells a model's reasoning from its answer, and the
pool of worker processes they run in. Responses come from a policy that is
rewarded for whatever passes, so each is treated as hostile: it may cost its own reward and at most its own time limit,
never the batch. Nothing here knows of policies, tokens or gradients.
"""

from __future__ import annotations

from cropi_tools.rewards.check import (
    check_own_verifiers,
    check_partial_credit,
    check_verifier,
    checked_verifiers,
    verifier_fingerprint,
)
from cropi_tools.rewards.grades import Grade, Outcome
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rewards.reasoning import final_answer, reasoning_is_open
from cropi_tools.rewards.verifiers import allow_files, check_record, grade

__all__ = [
    "Grade",
    "Outcome",
    "VerifierPool",
    "allow_files",
    "check_own_verifiers",
    "check_partial_credit",
    "check_record",
    "check_verifier",
    "checked_verifiers",
    "final_answer",
    "grade",
    "reasoning_is_open",
    "verifier_fingerprint",
]
