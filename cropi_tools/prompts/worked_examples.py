"""Worked examples that stand before every question, as turns of a chat: `cropi-prompts --messages FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cropi_tools.data.jsonl import Record, decoded, open_binary, reason_of, refuse_half_characters, shown
from cropi_tools.data.questions import SYSTEM
from cropi_tools.runtime.errors import InputError

_TURNS = ("user", "assistant")


def read_examples(path: str) -> list[Record]:
    """The messages of a JSON file: a question of the user's and an answer of the assistant's in turn.

    InputError names the file and the message: no such file, no JSON, no list of such messages.
    """
    with open_binary(path) as stream:
        written = stream.read()
    try:
        found = decoded(written.decode())
    except ValueError as error:
        raise InputError(f"{shown(path)}: broken JSON ({reason_of(error)}); expected a list of messages") from None
    if not isinstance(found, list) or not found:
        raise InputError(
            f'{shown(path)}: expected a list of messages, [{{"role": "user", "content": "..."}}, {{"role": "assistant", ...}}]'
        )
    for number, message in enumerate(found):
        _check(message, f"{shown(path)}: message {number + 1}", _TURNS[number % 2])
    if len(found) % 2:
        raise InputError(
            f"{shown(path)}: the last message is the user's; a worked example ends with the assistant's answer"
        )
    return found


def with_examples(messages: Sequence[Record], examples: Sequence[Record]) -> list[Record]:
    """A prompt's messages with the examples after its system messages, before everything else."""
    start = next((place for place, one in enumerate(messages) if one["role"] not in SYSTEM), len(messages))
    return [*messages[:start], *(dict(example) for example in examples), *messages[start:]]


def _check(message: Any, where: str, role: str) -> None:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        raise InputError(f"{where}: expected an object of role and content")
    if message["role"] in SYSTEM:
        raise InputError(f"{where}: is a system message; give it as --system")
    if message["role"] != role:
        raise InputError(
            f"{where}: expected the role {role!r}, found {message['role']!r}; user and assistant take turns"
        )
    if not isinstance(message["content"], str) or not message["content"].strip():
        raise InputError(f"{where}: 'content' must be a text that is not empty")
    refuse_half_characters(message, where)
