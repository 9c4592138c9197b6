"""Every way to damage one node of a JSON value: each is replaced by each of some junk values, left out, or given a stranger beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.runtime.errors import InputError


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


JUNK: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -7,
    "fraction": 0.5,
    "huge": 10**18,
    "beyond floats": 10**400,
    "empty text": "",
    "text": "junk",
    "upwards": "../../../etc/passwd\x00",
    "list": [],
    "list of null": [None],
    "list of lists": [[1], "x"],
    "object": {},
    "object of null": {"junk": None},
    "deep": _deep(200),
    "infinite": float("inf"),
    "no number": float("nan"),
    "half a character": "\ud800",
}
BRIEF = {name: JUNK[name] for name in ("null", "negative", "beyond floats", "text", "list", "object of null")}
"""One of a kind, where each value takes long."""

_ABSENT = object()

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "cut": b'{"schema": 1, "command": "x',
    "no JSON": b"<html>404</html>",
    "no UTF-8": b'{"command": "\xff\xfe"}',
    "bytes": bytes(range(256)),
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of 5000 digits": b"9" * 5000,
    "1e400": b"1e400",
    "huge": b"[" + b"1," * (9 << 20) + b"1]",
    "zeros": b"\0" * 64,
}
"""Files that hold nothing of use."""


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node, the root first; of long lists the first and the last entry."""
    yield here
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*here, key))
    elif isinstance(value, list):
        for number in sorted({0, len(value) - 1}) if value else ():
            yield from places(value[number], (*here, number))


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    """A copy of the value with another node at a place."""
    if not place:
        return copy.deepcopy(by)
    whole = copy.deepcopy(value)
    node = whole
    for step in place[:-1]:
        node = node[step]
    if by is _ABSENT:
        del node[place[-1]]
    else:
        node[place[-1]] = by
    return whole


def mutations(
    value: Any, junk: dict[str, Any] | None = None, within: tuple[Any, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """(what was done, the damaged value) for every node, or every node below `within`."""
    for place in places(value):
        if place[: len(within)] != within:
            continue
        name = ".".join(map(str, place)) or "all of it"
        for called, by in (JUNK if junk is None else junk).items():
            yield f"{name} is {called}", replaced(value, place, by)
        if place:
            yield f"{name} is absent", replaced(value, place, _ABSENT)


def one_line(error: BaseException, *named: object) -> str:
    """The message of an error, which is a single line that names what it should."""
    message = str(error)
    assert "\n" not in message
    assert len(message) < 2000
    assert all(str(name) in message for name in named), message
    return message


def survives(action: Callable[[], Any], what: str, *named: object) -> bool:
    """Whether an action takes what was damaged; if not, it says so in one line that names it."""
    try:
        action()
    except InputError as error:
        one_line(error, *named)
        return False
    except BaseException as error:
        pytest.fail(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    return True


def write(path: Path, value: Any) -> None:
    """Write a damaged value as JSON, with what JSON lacks as Python writes it."""
    path.write_text(json.dumps(value))
