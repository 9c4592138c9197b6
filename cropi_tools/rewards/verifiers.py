"""The verifiers by their names, from a prompt's record and a response to a grade.

`maths`, `choice`, `exact`, `reasoning-gym`, or `path/file.py:function` for a function of the user's own (functions.py). The
verifier that the command line chooses grades every record. Where it chooses none, a record's own `verifier` does, so that one file may
hold prompts of several kinds, and `maths` grades the rest; a record's own may be a file only if the command line allows that file.

`grade` runs a verifier in this process, without any protection; `VerifierPool` runs the same code in processes that it
can kill. Both take a response without the model's reasoning (reasoning.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import lru_cache

from cropi_tools.rewards import choice, generated, maths
from cropi_tools.rewards.extraction import MAX_ANSWER, extract_answer, last_box, last_tagged, own_turn
from cropi_tools.rewards.functions import load_function, split_name
from cropi_tools.rewards.grades import Grade, Record, prompt_name, scored
from cropi_tools.runtime.errors import InputError

BUILT_IN = ("maths", "choice", "exact", "reasoning-gym")

DEFAULT = "maths"
"""What grades a record that names no verifier, where none was chosen for all."""

_allowed: set[str] = set()

PARTIAL = frozenset({"reasoning-gym"})
"""The built-in verifiers whose scores may lie between 0 and 1."""


def grade(record: Record, response: str, verifier: str | None = None, partial_credit: bool = False) -> Grade:
    """Grade one response in this process: it may hang or crash on a hostile response (VerifierPool does not).

    verifier: as of `verifier_of`. partial_credit: see `credited`.
    Raises InputError, naming the prompt, if the record lacks what its verifier needs or the user's own function fails
    on it; UsageError if there is no such verifier.
    """
    quick = grade_quickly(record, response, verifier)
    if quick is not None:
        return quick
    name = verifier_of(record, verifier)
    return credited(load(name)(record, response), name, partial_credit)


def credited(found: Grade, verifier: str, partial_credit: bool) -> Grade:
    """The grade with the reward that it is worth: 0 for a partial score of a built-in verifier, unless partial_credit is wanted.

    reasoning-gym gives a few hundredths for nothing but length: such rewards make groups unequal, and gradients of full size, where no answer is
    right. Functions of the user's own keep their scores.
    """
    if found.outcome == "partial" and verifier in PARTIAL and not partial_credit:
        return found._replace(reward=0.0)
    return found


def grade_quickly(record: Record, response: str, verifier: str | None = None) -> Grade | None:
    """The grade, where it can be told in microseconds, safely, and without loading a library; else None."""
    name = verifier_of(record, verifier)
    if name == "exact":
        return _grade_exact(record, response)
    if name == "choice":
        return choice.grade_choice(_choice_reference(record), response)
    if name == "maths":
        reference = _maths_reference(record)
        answer = extract_answer(response, reference)
        outcome = "unparsed" if answer is None else maths.compare_plainly(reference, answer)
        return None if outcome is None else _compared(outcome)
    return None


def check_record(record: Record, verifier: str | None = None) -> None:
    """Raise InputError, naming the prompt, if the record lacks what its verifier needs: to be called early."""
    name = verifier_of(record, verifier)
    if name == "exact":
        _reference(record, name)
    elif name == "choice":
        _choice_reference(record)
    elif name == "maths":
        _maths_reference(record)
    elif name == "reasoning-gym":
        generated.source_of(record)


def verifier_of(record: Record, chosen: str | None) -> str:
    """The name of the verifier that grades this record: the one chosen for all, if there is one, else its own, else DEFAULT.

    InputError: its own is a file that `allow_files` was not told. Data may come from anybody, and must not run programs.
    """
    if chosen is not None:
        return chosen
    own = record.get("verifier") or DEFAULT
    if own not in BUILT_IN and not _may_run(own):
        raise InputError(
            f"{prompt_name(record)} names the program {own} as its verifier; records run no program that the command line does not "
            f"name: give --allow-verifier {split_name(own, BUILT_IN)[0]} if you trust it"
        )
    return str(own)


def allow_files(files: Iterable[str]) -> None:
    """Let records name functions of these Python files as their verifiers, in this process."""
    _allowed.update(os.path.realpath(file) for file in files)
    _may_run.cache_clear()


@lru_cache(maxsize=1024)
def _may_run(name: str) -> bool:
    """Whether a record may name this file's function. UsageError: it has not that form."""
    return os.path.realpath(split_name(name, BUILT_IN)[0]) in _allowed


def same_verifier(first: str, second: str) -> bool:
    """Whether two names are of one verifier; a file may be spelled in several ways."""
    return first == second or _place(first) == _place(second)


def _place(name: str) -> tuple[str, str]:
    path, _, function = name.rpartition(":")
    return os.path.realpath(path) if path else "", function


@lru_cache(maxsize=256)
def load(name: str) -> Callable[[Record, str], Grade]:
    """The verifier of that name, with its library or file imported. Raises UsageError or InputError if it cannot be."""
    if name == "maths":
        maths.compare_formulas("x+1", "1+x")  # imports and tables of the parser are not charged to the first answer
        return _grade_maths
    if name == "choice":
        return lambda record, response: choice.grade_choice(_choice_reference(record), response)
    if name == "exact":
        return _grade_exact
    if name == "reasoning-gym":
        import reasoning_gym  # noqa: F401

        return generated.grade_generated
    split_name(name, BUILT_IN)
    return load_function(name)


def _compared(outcome: maths.Comparison) -> Grade:
    return Grade(float(outcome == "correct"), outcome)


def _reference(record: Record, verifier: str) -> str:
    answer = record.get("answer")
    if answer is None:
        raise InputError(
            f"{prompt_name(record)} has no answer, which the verifier {verifier!r} needs: add one, or choose another"
            " verifier"
        )
    return str(answer)


def _maths_reference(record: Record) -> str:
    """The reference answer; it may be a worked solution that ends in a box or in `#### 42`."""
    reference = _reference(record, "maths")
    if "\\boxed" in reference or "####" in reference:
        reference = extract_answer(reference) or reference
    if not reference.strip() or len(reference) > MAX_ANSWER:
        raise InputError(
            f"{prompt_name(record)}: the answer is empty or longer than {MAX_ANSWER} characters, which the verifier 'maths'"
            " cannot compare: fix it, or choose another verifier"
        )
    return reference


def _choice_reference(record: Record) -> str:
    letter = choice.read_reference(_reference(record, "choice"))
    if letter is None:
        raise InputError(
            f"{prompt_name(record)}: the answer is not one letter from A to J, which the verifier 'choice' compares: fix it,"
            " or choose another verifier"
        )
    return letter


def _grade_exact(record: Record, response: str) -> Grade:
    response, reference = own_turn(response), _reference(record, "exact").strip()
    tagged = last_tagged(response)
    if tagged is None:
        return scored(float(response.strip() == reference))
    return scored(float(reference in (tagged.content, last_box(tagged.content), response.strip())))


def _grade_maths(record: Record, response: str) -> Grade:
    """By algebra: for the answers that `grade_quickly` leaves open."""
    reference = _maths_reference(record)
    answer = extract_answer(response, reference)
    if answer is None:
        return Grade(0.0, "unparsed")
    try:
        return _compared(maths.compare_formulas(reference, answer))
    except Exception:  # whatever sympy does with a hostile answer (MemoryError too): counted, with reward 0
        return Grade(0.0, "error")
