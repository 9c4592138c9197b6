"""Rollouts as others keep them, as text: the authors' rows, one a prompt, and verl's dumps, one line a response.

    authors     {"id", "prompt", "answer", "responses": [text, ...], "rewards": [number, ...]}
    verl-dump   {"input", "output", "gts", "score", "step", ...}: a file a step, `trainer.rollout_data_dir` and
                `trainer.validation_data_dir`; input and output are decoded without special tokens

`text_rollouts` makes one form of both; `policy.imported` makes tokens of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cropi_tools.data import fields
from cropi_tools.data.fields import brief, check_fields
from cropi_tools.data.jsonl import Record, no_record, read_jsonl, shown
from cropi_tools.runtime.errors import InputError

Form = Literal["ours", "authors", "verl-dump"]
FORMS: dict[Form, str] = {
    "ours": "rollouts of cropi-rollout",
    "authors": "a row of the authors' rollouts",
    "verl-dump": "a line of verl's rollout dump",
}


class TextRollout(NamedTuple):
    """The responses to one prompt. prompt: the prompt as the file has it; for verl the decoded text of the whole rendered
    prompt. rewards: None where the file has none. row: the authors' row, or the first line of verl's."""

    form: Form
    where: str
    prompt: Any
    responses: list[str]
    rewards: list[float] | None
    row: Record


def foreign_form(record: Record) -> Form:
    """Whose rollouts a record of a rollouts file is."""
    if "samples" in record:
        return "ours"
    if "responses" in record:
        return "authors"
    if {"input", "output"} <= record.keys() and record.keys() & {"score", "step", "gts"}:
        return "verl-dump"
    return "ours"


def text_rollouts(paths: Sequence[str | Path]) -> Iterator[TextRollout]:
    """Yield the rollouts of all files in order, prompt by prompt.

    Lines of verl's dumps come together by input within a step, wherever they stand in it (verl reorders a batch to balance it), in
    the order of their first lines; so the lines of one step are held in memory, and no more. InputError: a record of
    another form, a missing or malformed field.
    """
    empty = True
    for path in paths:
        step: dict[str, TextRollout] = {}
        current: Any = None
        for number, record in read_jsonl(path):
            empty = False
            where = f"{shown(path)}:{number}"
            form = foreign_form(record)
            if form == "ours":
                raise InputError(
                    f"{where}: neither the authors' rollouts ('responses') nor a verl dump ('input', 'output', 'score')"
                )
            if form == "authors":
                yield from step.values()
                step = {}
                yield _authors(record, where)
                continue
            if record.get("step") != current:
                yield from step.values()
                step, current = {}, record.get("step")
            _add_line(step, record, where)
        yield from step.values()
    if empty:
        raise no_record(paths)


def _authors(record: Record, where: str) -> TextRollout:
    if "prompt" not in record:
        raise InputError(f"{where}: no field 'prompt'; {FORMS['authors']} has id, prompt, answer, responses, rewards")
    check_fields(record, fields.AUTHORS, where)
    responses, rewards = record["responses"], record.get("rewards")
    if rewards is not None:
        if not isinstance(rewards, list) or len(rewards) != len(responses):
            raise InputError(f"{where}: 'rewards' must have one number for each of the {len(responses)} responses")
        rewards = [_reward(value, f"{where}: 'rewards'") for value in rewards]
    return TextRollout("authors", where, record["prompt"], responses, rewards, record)


def _add_line(step: dict[str, TextRollout], record: Record, where: str) -> None:
    check_fields(record, fields.DUMP, where)
    found = step.get(record["input"])
    if found is None:
        found = step[record["input"]] = TextRollout("verl-dump", where, record["input"], [], [], record)
    if "score" not in record:
        raise InputError(f"{where}: no field 'score'; {FORMS['verl-dump']} has input, output, gts, score, step")
    found.responses.append(record["output"])
    assert found.rewards is not None
    found.rewards.append(_reward(record["score"], f"{where}: 'score'"))


def _reward(value: Any, where: str) -> float:
    if isinstance(value, bool):
        return float(value)
    if not fields.is_reward(value):
        raise InputError(f"{where} must hold {fields.REWARD.words}, found {brief(value)}")
    return float(value)
