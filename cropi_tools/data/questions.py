"""Which prompts ask the same question, for whoever keeps sets of prompts apart.

Two prompts ask the same when their texts agree up to case, white space and Unicode's compatible forms. What stands before a question in
every prompt of a set (system messages, worked examples) does not make it another.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

Prompt = str | Sequence[Mapping[str, Any]]

SYSTEM = ("system", "developer")
"""Roles whose messages instruct, and ask nothing."""

EXAMPLES = "worked_examples"
"""In `extra` of a prompt: how many of its messages, after the system message, are worked examples."""


def normalize_question(prompt: Prompt) -> str:
    """The text by which two prompts count as the same question: NFKC, case folded, white space collapsed; messages are
    joined."""
    text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def bare_question(prompt: Prompt) -> str:
    """The normalized question without system messages, by which sets are kept apart: instructions do not make it another."""
    return normalize_question(prompt if isinstance(prompt, str) else _turns(prompt))


def without_examples(record: Mapping[str, Any]) -> Prompt:
    """A record's prompt without the worked examples that `cropi-prompts --messages` put before the question."""
    prompt: Prompt = record["prompt"]
    count = examples_in(record)
    return prompt if isinstance(prompt, str) or not count else _turns(prompt)[count:] or prompt


def examples_in(record: Mapping[str, Any]) -> int:
    """How many messages of a prompt its record calls worked examples."""
    extra = record.get("extra")
    count = extra.get(EXAMPLES) if isinstance(extra, Mapping) else None
    return count if type(count) is int and count > 0 else 0


def _turns(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [message for message in messages if message["role"] not in SYSTEM]
