"""What the fields of records may hold: one table of names, types and ranges for every reader of JSON lines.

A reader checks each record against its table as it reads it, so that whatever works on the record need not ask again. A field that is
absent is not looked at here (which ones must be there is the reader's to say, with the remedy), and one that stands in no table is
passed through as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cropi_tools.runtime.errors import InputError

LARGEST_NUMBER = 1e9
"""Bound of rewards and log-probabilities: their squares and sums stay far below what a number of 32 bits holds."""
LARGEST_COUNT = 1 << 53
"""Bound of whole numbers: what a float holds exactly."""
_LARGEST_TOKEN = 1 << 31
_LARGEST_SINGLE = 1e38  # norms and products are kept as float32
_LARGEST_FLOAT = sys.float_info.max
_BRIEF = 60


class Field(NamedTuple):
    """One field: what it must be, in words that go on after `must be`, and whether a value is that."""

    words: str
    holds: Callable[[Any], bool]


def check_fields(record: Mapping[str, Any], table: Mapping[str, Field], where: str) -> None:
    """InputError, naming place, field and what stands there, for the first field of the table that holds something else."""
    for name, field in table.items():
        if name in record and not field.holds(record[name]):
            raise InputError(f"{where}: '{name}' must be {field.words}, found {brief(record[name])}")


def brief(value: Any) -> str:
    """A value for a message: whatever it is, a short text."""
    text = repr(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."


def is_reward(value: Any) -> bool:
    """Whether a value is a number that can be a reward; booleans are not."""
    return _is_number(value, -LARGEST_NUMBER, LARGEST_NUMBER)


def is_float(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; booleans are not."""
    return _is_number(value, -_LARGEST_FLOAT, _LARGEST_FLOAT)


def is_message(value: Any) -> bool:
    """Whether a value is a message, whatever its content."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _is_number(value: Any, low: float, high: float) -> bool:
    # comparing is exact for whole numbers of any size, which float() and math.isfinite() are not able to take; NaN compares false
    return type(value) in (int, float) and low <= value <= high


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < _LARGEST_TOKEN for token in value)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(is_message, value)))


def _is_named_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_float, value.values()))


def _is_single(value: Any) -> bool:
    return _is_number(value, -_LARGEST_SINGLE, _LARGEST_SINGLE)


def _is_named_singles(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_single, value.values()))


def _is_singles(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_single, value))


def _is_norm(value: Any) -> bool:
    return value is None or _is_number(value, 0, _LARGEST_SINGLE)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(limit, 0, 1) for limit in value)


def _is_half(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not _is_norm(value.get("gradient_norm")):
        return False
    groups = value.get("groups", {})
    return _is_named_singles(value.get("inner")) and isinstance(groups, dict) and all(map(_is_singles, groups.values()))


def _whole(low: int) -> Field:
    words = "a whole number" + {0: " that is not negative", 1: " above 0"}[low]
    return Field(words, lambda value: type(value) is int and low <= value <= LARGEST_COUNT)


def _or_null(field: Field) -> Field:
    return Field(f"{field.words}, or null", lambda value: value is None or field.holds(value))


TEXT = Field("text", _is_text)
OBJECT = Field("an object", _is_object)
COUNT = _whole(0)
AMOUNT = Field("a number from 0 to 1e15", lambda value: _is_number(value, 0, 1e15))
SHARE = Field("a number from 0 to 1", lambda value: _is_number(value, 0, 1))
REWARD = Field(f"a finite number from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}", is_reward)
TOKENS = Field("a list of token ids", _is_token_ids)
NAME = Field(
    "a text of at most 4096 visible characters",  # it may name a file
    lambda value: isinstance(value, str) and len(value) <= 4096 and value.isprintable(),
)
IDENTITY = Field("text or a whole number", lambda value: isinstance(value, str) or type(value) is int)
PLAIN = Field("text, a number or a boolean", lambda value: isinstance(value, str | bool) or is_float(value))

PROMPT: Mapping[str, Field] = {
    "prompt": Field("text or a list of messages with role and content", _is_prompt),
    "source": TEXT,
    "verifier": _or_null(NAME),
    "extra": _or_null(OBJECT),
    "chat_template_kwargs": _or_null(Field('an object such as {"enable_thinking": false}', _is_object)),
}
"""Of prompts.jsonl and everything made from it. The id is checked where it must be unique; an answer may be any value."""

ROLLOUT: Mapping[str, Field] = {
    **{name: PROMPT[name] for name in ("prompt", "source", "verifier", "extra")},
    "prompt_token_ids": TOKENS,
    "samples": Field("a list of at least one sample", lambda value: isinstance(value, list) and bool(value)),
    "reasoning_open": _or_null(Field("true or false", lambda value: isinstance(value, bool))),
    "sampled_by": _or_null(TEXT),
}
SAMPLE: Mapping[str, Field] = {
    "token_ids": TOKENS,
    "reward": REWARD,
    "text": _or_null(TEXT),
    "finish_reason": _or_null(TEXT),
    "outcome": _or_null(TEXT),
}
LOGPROBS = Field(
    f"a finite number from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}",  # each of them
    # is_reward written out: there are as many of them as tokens
    lambda value: (
        isinstance(value, list)
        and all(type(x) in (float, int) and -LARGEST_NUMBER <= x <= LARGEST_NUMBER for x in value)
    ),
)

SCORES: Mapping[str, Field] = {
    "source": TEXT,
    "scores": _or_null(Field("an object of cosines by validation set", _is_named_numbers)),
    "pass_rate": _or_null(SHARE),
    "status": TEXT,
    "measured": Field("true or false", lambda value: isinstance(value, bool)),
    "deviation": _or_null(Field("an object of numbers by validation set", _is_named_numbers)),
}

SUSPECT: Mapping[str, Field] = {
    **{name: SCORES[name] for name in ("source", "pass_rate")},
    "id": TEXT,
    "prompt": _or_null(PROMPT["prompt"]),
    "usual_answer": TEXT,
    **dict.fromkeys(("scores", "deviations"), Field("an object of numbers by validation set", _is_named_numbers)),
}

STORE: Mapping[str, Field] = {
    "id": TEXT,
    "source": TEXT,
    "status": TEXT,
    "pass_rate": _or_null(SHARE),
    "row": _or_null(COUNT),
    **dict.fromkeys(("gradient_norm", "sketch_norm"), Field("a number that is not negative, or null", _is_norm)),
    "inner": _or_null(Field("an object of numbers by mean", _is_named_singles)),
    "halves": _or_null(
        Field(
            "a list of two halves, each null or an object with gradient_norm, inner and groups",
            lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_half, value)),
        )
    ),
    "effective_sample_size": _or_null(AMOUNT),
    "weight_count": _or_null(COUNT),
}
"""Of index.jsonl in a gradient store."""

AUTHORS: Mapping[str, Field] = {
    "id": _or_null(IDENTITY),
    "answer": _or_null(PLAIN),
    "source": _or_null(TEXT),
    "responses": Field("a list of at least one text", _is_texts),
}
DUMP: Mapping[str, Field] = {"input": TEXT, "output": TEXT, "step": _or_null(COUNT)}
"""Of verl's rollout dumps."""

ROW: Mapping[str, Field] = {"id": _or_null(PLAIN), "source": _or_null(PLAIN), "verifier": _or_null(NAME)}
"""What cropi-prompts takes for these from rows of any form; numbers become text."""

RECIPE: Mapping[str, Field] = {
    **dict.fromkeys(("family", "name", "source", "template", "answer_template"), TEXT),
    "set": Field("an object of settings", _is_object),
    "size": _or_null(_whole(1)),
}

PENDING: Mapping[str, Field] = {"place": COUNT, "rollout": OBJECT}
"""Of the rollouts that a stopped training run keeps."""
VERL_LOG: Mapping[str, Field] = {"step": COUNT, "data": OBJECT}

STEP: Mapping[str, Field] = {
    "step": COUNT,
    **dict.fromkeys(
        ("tokens_generated", "tokens_trained", "seconds_sampling", "seconds_update", "seconds_evaluation"),
        _or_null(AMOUNT),
    ),
}
"""Of metrics.jsonl and timings.jsonl."""
EVALUATION: Mapping[str, Field] = {
    "set": TEXT,
    "step": COUNT,
    "accuracy": SHARE,
    "prompts": _or_null(COUNT),
    "samples": _or_null(COUNT),
    "accuracy_interval": _or_null(Field("a list of two numbers from 0 to 1", _is_interval)),
}
SELECTED: Mapping[str, Field] = {"id": TEXT, "source": _or_null(TEXT), "pass_rate": _or_null(SHARE)}
"""What a report reads of selected.jsonl, and of scores.jsonl for the pass rates."""
