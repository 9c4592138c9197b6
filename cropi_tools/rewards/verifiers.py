"""The verifiers: one function for each kind, from a prompt's record and a response to a grade.

A verifier is named `maths`, `exact`, `reasoning-gym`, or `path/file.py:function` for a function of the user's own with
verl's signature `function(data_source, solution_str, ground_truth, extra_info)`. A record's own `verifier` wins over
the command's.

`grade` runs a verifier in this process, without any protection; `VerifierPool` runs the same code in processes that it
can kill.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cropi_tools.data.errors import InputError, UsageError
from cropi_tools.rewards import maths
from cropi_tools.rewards.extraction import MAX_ANSWER, extract_answer

Outcome = Literal["correct", "wrong", "unparsed", "timeout", "error"]
Record = Mapping[str, Any]

BUILT_IN = ("maths", "exact", "reasoning-gym")


class Grade(NamedTuple):
    """What a response earned.

    `reward` is the verifier's score (0 for unparsed, timeout and error). `outcome` is "correct" if the score is exactly
    1 and "wrong" for every other score, partial ones included; "unparsed" if the response holds no answer that could be
    read; "timeout" if grading took too long; "error" if the verifier's process died or a built-in verifier failed on
    the response.
    """

    reward: float
    outcome: Outcome


def grade(record: Record, response: str, verifier: str = "maths") -> Grade:
    """Grade one response in this process: it may hang or crash on a hostile response (VerifierPool does not).

    Raises InputError, naming the prompt, if the record lacks what its verifier needs or the user's own function fails
    on it; UsageError if there is no such verifier.
    """
    quick = grade_quickly(record, response, verifier)
    return quick if quick is not None else load(verifier_of(record, verifier))(record, response)


def grade_quickly(record: Record, response: str, verifier: str = "maths") -> Grade | None:
    """The grade, where it can be told in microseconds, safely, and without loading a library; else None."""
    name = verifier_of(record, verifier)
    if name == "exact":
        return _grade_exact(record, response)
    if name == "maths":
        reference, answer = _maths_reference(record), extract_answer(response)
        outcome = "unparsed" if answer is None else maths.compare_plainly(reference, answer)
        return None if outcome is None else _compared(outcome)
    return None


def check_record(record: Record, verifier: str = "maths") -> None:
    """Raise InputError, naming the prompt, if the record lacks what its verifier needs: to be called early."""
    name = verifier_of(record, verifier)
    if name == "exact":
        _reference(record, name)
    elif name == "maths":
        _maths_reference(record)
    elif name == "reasoning-gym":
        _reasoning_gym_source(record)


def verifier_of(record: Record, default: str) -> str:
    """The name of the verifier that grades this record: its own, else the default."""
    return record.get("verifier") or default


def summarise(grades: Iterable[Grade]) -> dict[str, int]:
    """How many grades have each outcome; every outcome has an entry, in a fixed order."""
    counts = Counter(grade.outcome for grade in grades)
    return {outcome: counts[outcome] for outcome in get_args(Outcome)}


@lru_cache(maxsize=256)
def load(name: str) -> Callable[[Record, str], Grade]:
    """The verifier of that name, with its library or file imported. Raises UsageError or InputError if it cannot be."""
    if name == "maths":
        import math_verify  # noqa: F401  (here, so that importing it is not charged to the first answer)

        return _grade_maths
    if name == "exact":
        return _grade_exact
    if name == "reasoning-gym":
        import reasoning_gym  # noqa: F401

        return _grade_reasoning_gym
    return _load_function(name)


def split_name(name: str) -> tuple[Path, str]:
    """`path/file.py:function` as its two parts. Raises UsageError for a name that has not that form."""
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise UsageError(
            f"there is no verifier {name!r}: give one of {', '.join(BUILT_IN)}, or path/file.py:function for one of"
            " your own"
        )
    return Path(path), function


def _scored(score: float) -> Grade:
    return Grade(score, "correct" if score == 1 else "wrong")


def _compared(outcome: maths.Comparison) -> Grade:
    return Grade(float(outcome == "correct"), outcome)


def _prompt(record: Record) -> str:
    return f"prompt {record.get('id', '?')!r}"


def _reference(record: Record, verifier: str) -> str:
    answer = record.get("answer")
    if answer is None:
        raise InputError(
            f"{_prompt(record)} has no answer, which the verifier {verifier!r} needs: add one, or choose another"
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
            f"{_prompt(record)}: the answer is empty or longer than {MAX_ANSWER} characters, which the verifier 'maths'"
            " cannot compare: mend it, or choose another verifier"
        )
    return reference


def _grade_exact(record: Record, response: str) -> Grade:
    return _scored(float(response.strip() == _reference(record, "exact").strip()))


def _grade_maths(record: Record, response: str) -> Grade:
    """By algebra: for the answers that `grade_quickly` leaves open."""
    reference, answer = _maths_reference(record), extract_answer(response)
    if answer is None:
        return Grade(0.0, "unparsed")
    try:
        return _compared(maths.compare_formulas(reference, answer))
    except Exception:  # whatever sympy does with a hostile answer (MemoryError too): counted, with reward 0
        return Grade(0.0, "error")


def _reasoning_gym_source(record: Record) -> Mapping[str, Any]:
    """The record's `extra.reasoning_gym`: the name of its data set, and the entry as the data set made it."""
    source = (record.get("extra") or {}).get("reasoning_gym")
    if not isinstance(source, Mapping) or not isinstance(source.get("entry"), Mapping) or "dataset" not in source:
        raise InputError(
            f"{_prompt(record)} has no extra.reasoning_gym with 'dataset' and 'entry': make it with cropi-prompts, or"
            " choose another verifier"
        )
    return source


_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def _grade_reasoning_gym(record: Record, response: str) -> Grade:
    """Score by the data set of the question. The answer is the last `<answer>...</answer>`, else the whole response."""
    source = _reasoning_gym_source(record)
    try:
        scorer = _reasoning_gym_scorer(source["dataset"])
    except ValueError as error:
        raise InputError(f"{_prompt(record)}: reasoning-gym has no data set {source['dataset']!r}: {error}") from error
    tagged = _ANSWER_TAG.findall(response)
    answer = (tagged[-1] if tagged else response).strip()
    try:
        score = float(scorer(answer=answer, entry=source["entry"]))
    except Exception:  # a scorer that stumbles over a hostile answer: counted, with reward 0
        return Grade(0.0, "error")
    return _scored(score) if math.isfinite(score) else Grade(0.0, "error")


@lru_cache(maxsize=256)
def _reasoning_gym_scorer(dataset: str) -> Callable[..., float]:
    from reasoning_gym import get_score_answer_fn

    scorer: Callable[..., float] = get_score_answer_fn(dataset)
    return scorer


def _load_function(name: str) -> Callable[[Record, str], Grade]:
    """Import the user's file and wrap its function. Anything the file raises is the user's to see: InputError."""
    path, function_name = split_name(name)
    if not path.is_file():
        raise InputError(f"verifier {name}: there is no file {path}: check the path")
    module_name = f"cropi_verifier_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"verifier {name}: the file cannot be imported: {_described(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"verifier {name}: {path} has no function {function_name!r}: check the name after the colon")

    def verify(record: Record, response: str) -> Grade:
        try:
            score = function(
                data_source=record.get("source"),
                solution_str=response,
                ground_truth=record.get("answer"),
                extra_info=record.get("extra") or {},
            )
        except (Exception, SystemExit) as error:
            raise InputError(f"verifier {name}, {_prompt(record)}: {_described(error)}") from error
        return _scored(_read_score(score, name, record))

    return verify


def _read_score(value: Any, name: str, record: Record) -> float:
    """A finite number from what the user's function returned: a number, a bool, or a mapping with "score"."""
    score: Any = value.get("score") if isinstance(value, Mapping) else value
    if getattr(score, "ndim", None) == 0 and hasattr(score, "item"):
        score = score.item()  # a scalar of numpy or torch
    try:
        number = float(score) if isinstance(score, numbers.Real) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"verifier {name}, {_prompt(record)}: it returned {_shortened(value)}: return a finite number, or a dict"
            " with one as its 'score'"
        )
    return number


def _shortened(value: Any) -> str:
    """One line about a value, for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _described(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
