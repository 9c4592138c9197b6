"""Rows as others write them made into records of `prompts.jsonl`: our own form, verl's, TRL's, the authors', or any
columns by `--map`.

What is recognized: `reward_model` or `data_source` make a row verl's. Any other has its question in `prompt` and its answer
in `answer`, `solution` or `ground_truth`. Columns without a meaning here are kept in `extra`, since rewards may read them;
what rollouts and selections added to a prompt (responses, ranks) is left behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cropi_tools.data import fields
from cropi_tools.data.fields import check_fields
from cropi_tools.data.jsonl import Record
from cropi_tools.data.message_text import ReadAsMessages, is_message, parsed
from cropi_tools.data.nonfinite import Carried, telling
from cropi_tools.data.questions import without_examples
from cropi_tools.data.records import ROLLOUT_FIELDS
from cropi_tools.prompts.datasets import Dataset
from cropi_tools.prompts.families import near
from cropi_tools.runtime.errors import InputError, UsageError

MAPPED = ("prompt", "answer", "source", "id", "verifier")
"""What `--map` can fill."""

_ANSWERS = ("answer", "solution", "ground_truth")
_QUESTIONS = ("prompt", "question", "problem", "query", "instruction", "input", "messages", "conversations", "text")
_USUAL_ANSWERS = (*_ANSWERS, "final_answer", "final", "target", "label", "output", "response")
_NUMBER = re.compile("-?[0-9]{1,9}")
_OURS = frozenset({"id", "prompt", "answer", "source", "verifier", "extra", "chat_template_kwargs"})
_ADDED_LATER = frozenset(
    {*ROLLOUT_FIELDS, "responses", "rewards", "rank", "score", "reciprocal_rank", "pass_rate"}
)  # by rollouts and selections
_KNOWN = _OURS | _ADDED_LATER
_READ = frozenset({"id", "prompt", "source", "data_source", "verifier", "chat_template_kwargs"})
_VERL = frozenset({"data_source", "prompt", "ability", "reward_model", "extra_info"})


def parse_mapping(text: str) -> dict[str, str]:
    """`prompt=question,answer=reward_model.ground_truth` as a dictionary. UsageError: not of this form, or an unknown name."""
    mapping: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (equals and name and column):
            raise UsageError(f"--map {text}: expected NAME=COLUMN,NAME=COLUMN, such as prompt=question,answer=final")
        if name not in MAPPED:
            raise UsageError(f"--map {text}: no {name!r} to fill{near(name, MAPPED)}")
        if name in mapping:
            raise UsageError(f"--map {text}: {name!r} is filled twice")
        mapping[name] = column
    return mapping


def dataset_prompts(
    dataset: Dataset, mapping: Mapping[str, str] | None = None, source: str | None = None
) -> Iterator[tuple[str, Record, Record]]:
    """Yield (place, row, record) of every row: the record of `prompts.jsonl` it makes, and what it was made of.

    `mapping` names columns, by dots inside objects and lists (`messages.-1.content`). `source` replaces the rows' own; without
    either it is the data set's name. Ids that are absent, or plain numbers, are made of that name (or `source`) and row or number.
    InputError names file, line (or row), field, and the columns there are.
    """
    carried, reader = Carried(), ReadAsMessages()
    columns = {name: column.partition(".")[0] for name, column in (mapping or {}).items()}
    read = {*_READ, *columns.values()}
    # of these the one that is taken is checked where it is taken
    answers = [columns["answer"]] if "answer" in columns else ["reward_model", *_ANSWERS]
    with telling(dataset.input.path, carried, reader):
        for index, (where, row) in enumerate(dataset.rows()):
            verl = "reward_model" in row or "data_source" in row
            known = carried.record(row, where, read, answers if verl else _answer_column(row, answers))
            record = (_from_verl if verl else _from_columns)(known, where, mapping or {}, reader)
            # objects that a table keeps as text may hold what the row itself did not
            record = carried.record(record, where, _READ)
            check_fields(record, fields.ROW, where)
            identity = index if record["id"] in (None, "") else record["id"]
            if isinstance(identity, int):
                identity = f"{source or dataset.stem}-{identity}"
            record |= {"id": str(identity), "source": source or _text(record["source"]) or dataset.stem}
            yield where, row, {key: value for key, value in record.items() if value not in (None, {})}


def prompt_texts(dataset: Dataset, mapping: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The prompt alone (text or messages, worked examples apart) of every row; nothing else need be there. `mapping` counts for rows that
    have its column."""
    column = (mapping or {}).get("prompt", "prompt")
    reader = ReadAsMessages()
    for where, row in dataset.rows():
        prompt = _prompt(row, where, {"prompt": column} if _value(row, column) is not None else {}, reader)
        yield without_examples({"prompt": prompt, "extra": row.get("extra")})


def as_messages(prompt: str | Sequence[Record]) -> list[Record]:
    """The prompt as messages of text: text is one user message, as a policy with a chat template takes it."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def _from_columns(row: Record, where: str, mapping: Mapping[str, str], reader: ReadAsMessages) -> Record:
    prompt = _prompt(row, where, mapping, reader)
    answer_column = mapping.get("answer") or next(iter(_answer_column(row, _ANSWERS)), None)
    if answer_column is None:
        raise _missing(row, where, "answer", "a row needs its answer there, as text or number")
    extra = _object(row, "extra", where)
    others: Record = {}
    if strange := row.keys() - _KNOWN:
        strange -= {answer_column.partition(".")[0], *(path.partition(".")[0] for path in mapping.values())}
        others = {name: row[name] for name in row if name in strange and row[name] is not None}
    return {
        "id": _mapped(row, where, mapping, "id"),
        "prompt": prompt,
        "answer": _answer(row, answer_column, where),
        "source": _mapped(row, where, mapping, "source"),
        "verifier": _mapped(row, where, mapping, "verifier"),
        "extra": {**others, **extra},
        "chat_template_kwargs": _object(row, "chat_template_kwargs", where),
    }


def _from_verl(row: Record, where: str, mapping: Mapping[str, str], reader: ReadAsMessages) -> Record:
    if isinstance(row.get("reward_model"), str):
        row = {**row, "reward_model": _object(row, "reward_model", where)}  # as a table of texts has it
    reward = row.get("reward_model")
    if not isinstance(reward, dict) and "answer" not in mapping:
        raise InputError(f"{where}: no 'reward_model'; a verl row holds the answer in reward_model.ground_truth")
    rest = dict(_object(row, "extra_info", where))
    index, verifier = rest.pop("index", None), rest.pop("verifier", None)
    ours = isinstance(rest.get("extra"), str) and "prompt_form" in rest  # `exports.to_verl`
    prompt = _prompt(row, where, mapping, reader)
    if ours and rest["prompt_form"] == "text" and isinstance(prompt, list):
        prompt = prompt[0]["content"]
    return {
        "id": _mapped(row, where, mapping, "id") if "id" in mapping else index,
        "prompt": prompt,
        "answer": _answer(row, mapping.get("answer", "reward_model.ground_truth"), where),
        "source": _mapped(row, where, mapping, "source") if "source" in mapping else row.get("data_source"),
        "verifier": _mapped(row, where, mapping, "verifier") if "verifier" in mapping else verifier or None,
        "extra": _object(rest, "extra", where)
        if ours
        else {**{name: value for name, value in row.items() if name not in _VERL and value is not None}, **rest},
        "chat_template_kwargs": _object(rest, "chat_template_kwargs", where) if ours else None,
        **({name: value for name, value in _object(rest, "rest", where).items() if name not in _OURS} if ours else {}),
    }


# -------------------------------------------------------------------------------------------------------------- fields


def _prompt(row: Record, where: str, mapping: Mapping[str, str], reader: ReadAsMessages) -> str | list[Record]:
    column = mapping.get("prompt", "prompt")
    prompt = reader(_value(row, column))
    if prompt is None:
        raise _missing(row, where, column, "a row needs a text or a list of messages there")
    if isinstance(prompt, list) and prompt and all(map(is_message, prompt)):
        return [{key: value for key, value in message.items() if value is not None} for message in prompt]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: '{column}' must be a text or messages with role and content, and not empty")
    return prompt


def _answer_column(row: Record, columns: Sequence[str]) -> list[str]:
    """The first of the columns that has a value, alone; none when none has."""
    return [name for name in columns if row.get(name) is not None][:1]


def _answer(row: Record, column: str, where: str) -> str:
    answer = _value(row, column)
    if answer is None:
        raise _missing(row, where, column, "a row needs its answer there, as text or number")
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise InputError(f"{where}: '{column}' must be a text or a number, found {type(answer).__name__}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise InputError(f"{where}: '{column}' is {answer}, which is no answer; remove the row, or fill in its answer")
    if not str(answer).strip() and not row.get("verifier"):
        raise InputError(f"{where}: '{column}' is empty; remove the row, or fill in its answer")
    return str(answer)


def _mapped(row: Record, where: str, mapping: Mapping[str, str], name: str) -> Any:
    """A field that may be absent, unless the mapping asks for it."""
    if name not in mapping:
        return row.get(name)
    value = _value(row, mapping[name])
    if value is None or isinstance(value, (dict, list)):
        raise _missing(row, where, mapping[name], f"--map takes '{name}' from there")
    return value


def _value(row: Record, column: str) -> Any:
    """The value of a column, or by dots of something inside it; None when it is not there."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and _NUMBER.fullmatch(part) and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _object(row: Record, name: str, where: str) -> Record:
    """A field that is an object, or an object's JSON text; empty when it is absent."""
    value = row.get(name)
    if isinstance(value, str):
        value = parsed(value or "{}")
        if value is None:
            raise InputError(f"{where}: '{name}' must be an object, found a text that is not one's JSON")
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: '{name}' must be an object, found {type(value).__name__}")
    return value or {}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _missing(row: Record, where: str, column: str, needed: str) -> InputError:
    """An error for a column that is not there, with the option that would name the right ones."""
    there = f" (the columns are {', '.join(row) or 'none'})"
    if column != "prompt" and column not in _ANSWERS:
        return InputError(f"{where}: no '{column}'; {needed}{near(column, row) if row else ''}{there}")
    lacking = [
        f"{name}={next((known for known in usual if row.get(known) is not None), 'COLUMN')}"
        for name, usual in (("prompt", _QUESTIONS), ("answer", _USUAL_ANSWERS))
        if row.get(name) is None
    ]
    return InputError(f"{where}: no '{column}'; {needed}, or name its column: --map {','.join(lacking)}{there}")
