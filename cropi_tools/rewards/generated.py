r"""reasoning-gym's scorers: the answer of a response as they want it, and their partial credit apart from full credit.

The scorers compare what they are given as a whole and give partial credit by length and likeness, which also rewards what answers nothing. So
the answer is taken out of the response first: from answer tags; and where the family's own answer is short (a number, a word, a list on one
line), from a box or a sentence that names it, as for mathematics. Long and structured answers (grids, plans, tables) are the whole response.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from cropi_tools.rewards.answer_sentences import mentions_answer, named_answer, named_rests
from cropi_tools.rewards.extraction import kind_of, last_box, last_tagged, own_turn, plain_answer, plain_tail
from cropi_tools.rewards.grades import Grade, Record, prompt_name, scored
from cropi_tools.rewards.normalization import normalize, without_macros
from cropi_tools.rewards.quantities import read_quantity
from cropi_tools.runtime.errors import InputError

NO_ANSWER = "no answer at all"
"""What no scorer may give full credit to."""

SHORT = 60
"""Most characters of a short answer; it also has one line."""

ALMOST = math.nextafter(1.0, 0.0)
"""In place of a score above 1. Full credit is 1 exactly; spell_backward adds up parts to a little more for a right word with letters added."""

_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, AssertionError)
"""What scorers raise on answers that they cannot read."""


def source_of(record: Record) -> Mapping[str, Any]:
    """The record's `extra.reasoning_gym`: the name of its data set, and the entry as the data set made it. Raises InputError."""
    source = (record.get("extra") or {}).get("reasoning_gym")
    if not (
        isinstance(source, Mapping)
        and isinstance(source.get("entry"), Mapping)
        and isinstance(source.get("dataset"), str)
    ):
        raise InputError(
            f"{prompt_name(record)} has no extra.reasoning_gym with 'dataset' and 'entry': make it with cropi-prompts, or"
            " choose another verifier"
        )
    return source


def grade_generated(record: Record, response: str) -> Grade:
    """Score by the data set of the question; the best of the readings of the response's one answer. Partial scores are not yet taken away."""
    source = source_of(record)
    try:
        scorer = _scorer(source["dataset"])
    except ValueError as error:
        raise InputError(
            f"{prompt_name(record)}: reasoning-gym has no data set {source['dataset']!r}: {error}"
        ) from error
    entry = source["entry"]
    _check_discerning(source["dataset"], scorer, record, entry)
    best: float | None = None
    for reading in readings(response, entry.get("answer")):
        try:
            score = _score(scorer, reading, entry)
        except _UNREADABLE:
            continue
        except Exception:  # MemoryError and the like: counted, with reward 0
            return Grade(0.0, "error")
        if math.isfinite(score):
            score = score if score <= 1 else ALMOST
            best = score if best is None else max(best, score)
            if best >= 1:
                break
    return Grade(0.0, "unparsed") if best is None else scored(best)


def readings(response: str, answer: Any) -> Iterator[str]:
    """The answer of a response in the spellings that a scorer may want: with and without LaTeX, a period, the words around a number.

    answer: the data set's own, which tells what answers look like; None where a question has many.
    """
    response = own_turn(response).strip()
    seen = set()
    for reading in _readings(response, None if answer is None else str(answer).strip()):
        reading = reading.strip()
        if reading not in seen:
            seen.add(reading)
            yield reading


def _readings(response: str, answer: str | None) -> Iterator[str]:
    if response == answer:
        yield response
        return
    short = answer is not None and "\n" not in answer and len(answer) <= SHORT
    tagged = last_tagged(response)
    if tagged is not None and tagged.closed:
        yield tagged.content
        box = last_box(tagged.content)
        if box:
            yield from _spellings(box)
        elif short and answer is not None:
            yield from _named(tagged.content, answer)
        return
    if not short or answer is None:
        yield response if tagged is None else tagged.content
        return
    box = last_box(response)
    if box is not None:
        yield from _spellings(box)
        return
    tail = plain_tail(response)
    named = list(_named(tail, answer))
    if named:
        yield from named
        return
    if not mentions_answer(tail):  # else it says of an answer what it is not
        yield response if tagged is None else tagged.content
    if read_quantity(normalize(answer)) is not None:
        yield plain_answer(tail) or ""


def _named(tail: str, answer: str) -> Iterator[str]:
    """What a sentence names, as it stands there, and as mathematics reads it."""
    rests = named_rests(tail)
    for rest in rests:
        yield from _spellings(rest)
    value = named_answer(tail, kind_of(answer))
    if value is not None and (not rests or value in rests[0] or read_quantity(normalize(answer)) is not None):
        yield from _spellings(value)


def _spellings(text: str) -> Iterator[str]:
    yield text
    yield text.removesuffix(".")
    yield text.rstrip(" .!,;*_`")
    yield text.rstrip(" .!,;").strip(" *_`\"'$")
    yield without_macros(text).strip("$ ").rstrip(".")
    number = read_quantity(normalize(text))
    if number is not None and number.value.denominator == 1:
        yield str(int(number.value))


def _score(scorer: Callable[..., float], answer: str, entry: Mapping[str, Any]) -> float:
    """The score; some scorers print what they think of a move, or have their libraries warn of it."""
    with contextlib.redirect_stdout(_nowhere()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(scorer(answer=answer, entry=entry))


def _check_discerning(dataset: str, scorer: Callable[..., float], record: Record, entry: Mapping[str, Any]) -> None:
    """Raise InputError for a scorer that gives full credit to anything; asked once a data set, of its first entry."""
    if dataset in _discerning:
        return
    with contextlib.suppress(*_UNREADABLE):
        if _score(scorer, NO_ANSWER, entry) >= 1:
            raise InputError(
                f"{prompt_name(record)}: reasoning-gym's scorer of {dataset!r} gives full credit to any text: leave the data set out, or"
                " make its prompts with --template, which compares exactly"
            )
    _discerning.add(dataset)


_discerning: set[str] = set()


@lru_cache(maxsize=256)
def _scorer(dataset: str) -> Callable[..., float]:
    from reasoning_gym import get_score_answer_fn

    scorer: Callable[..., float] = get_score_answer_fn(dataset)
    return scorer


@lru_cache(maxsize=1)
def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")
