"""Messages that a table keeps as text: JSON, or what Python prints of a list of dictionaries (pandas writes the latter into CSV)."""

from __future__ import annotations

import ast
import json
import re
import warnings
from functools import cache
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record, decoded, refuse_depth

_LONGEST_LITERAL = 1 << 20  # characters; Python takes a hundred times as much memory to read one of its own
_BETWEEN_ROWS = re.compile(r"\}\s*\n\s*\{")  # numpy prints an array of dictionaries without commas


def messages_of(text: str) -> list[Record] | None:
    """The messages that a text is written out from: a list of objects with a role and a content; None for any other text."""
    bare = text.strip()
    if not (bare.startswith("[") and bare.endswith("]") and "role" in bare and "content" in bare):
        return None
    found = parsed(bare)
    if isinstance(found, list) and found and all(is_message(message) for message in found):
        return [{key: value for key, value in message.items() if value is not None} for message in found]
    return None


def is_message(value: Any) -> bool:
    """Whether a value is a message of text."""
    return isinstance(value, dict) and isinstance(value.get("content"), str) and isinstance(value.get("role"), str)


class ReadAsMessages:
    """Reads prompts that are messages as text, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, prompt: Any) -> Any:
        """The messages of a text of messages; any other prompt as it is."""
        found = messages_of(prompt) if isinstance(prompt, str) else None
        if found is None:
            return prompt
        self._count += 1
        return found

    def tell(self, name: str) -> None:
        """Say how many prompts of the file of that name were read so, if any were; once in a process."""
        if self._count:
            what = "1 prompt is a text that lists messages; it is" if self._count == 1 else None
            _notify_once(
                f"{name}: {what or f'{self._count} prompts are texts that list messages; they are'} read as messages"
            )


def parsed(text: str) -> Any:
    """The value of a text in JSON or in Python's words; None where it is neither."""
    try:
        found = decoded(text)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return found
    except ValueError:
        pass
    if len(text) > _LONGEST_LITERAL:
        return None
    for written in (text, _BETWEEN_ROWS.sub("}, {", text)):
        # literals alone, nothing is run
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                found = ast.literal_eval(written)
            as_json = json.dumps(found, ensure_ascii=False)
            refuse_depth(as_json)
            as_json.encode()
            return found
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


@cache
def _notify_once(sentence: str) -> None:
    runtime.notify(sentence)
