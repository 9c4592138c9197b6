"""Records spoilt in every way that a line can be wrong, by a seeded generator."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

Record = dict[str, Any]


def nested(depth: int, by: str = "list") -> Any:
    """A value within so many lists or objects."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if by == "list" else {"a": value}
    return value


DEEP = "@deep@"  # stands for lists within each other that json does not write

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 1.5, 0.5, -0.0, 1e-300, 1e9, 1e10, 1e200, -1e308, math.nan, math.inf, -math.inf),
    *(10**400, -(10**400), 10**18, 2**31, 2**53, 2**63, 2**64),
    *(
        "",
        " ",
        "x",
        "7",
        "0.5",
        "NaN",
        "1e400",
        "maths",
        "exact",
        "choice",
        "reasoning-gym",
        "x.py:f",
        "a/\0b.py:f",
        "../x",
    ),
    *("\ud800", "x\udfff", "\x00", "a\nb\r\u2028", "\u202e\x1b[31m", "é\U0001f600", "[" * 500, "x" * 5000, "1" * 5000),
    *('[{"role": "user", "content": "x"}]', "{'a': 1}", "{", "[1, 2", '{"a": NaN}', '{"a": "\\ud800"}'),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        {"a": 1},
        {"": {}},
        {"a": [1, {"b": None}]},
        [1, "x"],
        [0.5, None],
        [True],
        [10**400],
    ),
    *(
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "a", "content": []}],
        [{"role": 1}],
    ),
    *({"a": math.nan}, {"a": "\ud800"}, {"reasoning_gym": {"dataset": [], "entry": {}}}, {"prompts": 1, "id": [2]}),
    *(
        {"reasoning_gym": {"dataset": "gcd", "entry": 5}},
        {"reasoning_gym": {"dataset": "x", "entry": {}}},
        [[1, 2], [3]],
    ),
    *(nested(90), nested(150), nested(90, "object"), DEEP, f"x{DEEP}"),
)


def spoilt(record: Record, draw: random.Random) -> bytes:
    """One line, without its end, of a record in which something is wrong, or at least unusual."""
    changed = copy.deepcopy(record)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(changed, draw)
    line = _written(changed, draw)
    return _harmed(line, draw) if draw.random() < 0.1 else line


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a record where a value stands: its container and its key there."""
    found: list[tuple[Any, Any]] = []
    open_values = [value]
    while open_values:
        one = open_values.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            if len(found) < 500:
                open_values.append(one[key])
    return found


def _change(record: Record, draw: random.Random) -> None:
    # fields of the record itself are where most faults were
    places = [(record, key) for key in record] if draw.random() < 0.5 else _places(record)
    kind = draw.random()
    if not places or kind < 0.1:
        record[draw.choice(("new", "extra", "verifier", "responses", "outcome", "", "pass_rate", "source"))] = _odd(
            draw
        )
        return
    container, key = draw.choice(places)
    if kind < 0.2:
        del container[key]
    elif kind < 0.3 and isinstance(container, dict):
        container[draw.choice(("id", "prompt", "x", "source", str(key).upper()))] = container.pop(key)
    elif kind < 0.4:
        container[key] = [container[key]] if draw.random() < 0.5 else {str(key): container[key]}
    elif kind < 0.5:
        container[key] = str(container[key])
    elif kind < 0.6 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        factor = draw.choice((-1, 1e9, 10**30, 0.5, 10**330))
        container[key] = container[key] * factor if abs(container[key]) < 1e300 and abs(factor) < 1e300 else factor
    else:
        container[key] = _odd(draw)


def _odd(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(ODD))


def _written(record: Record, draw: random.Random) -> bytes:
    """A record as JSON: by escapes or in bytes, halves of surrogate pairs too; now and then with a key twice."""
    if draw.random() < 0.5:
        line = json.dumps(record).encode()
    else:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    line = line.replace(f'"{DEEP}"'.encode(), b"[" * 5000 + b"]" * 5000)
    if draw.random() < 0.03:
        key = draw.choice(list(record) or ["id"]).encode("utf-8", "replace")
        line = b'{"' + key.replace(b'"', b"") + b'": ' + json.dumps(str(_odd(draw))[:50]).encode() + b", " + line[1:]
    return line


def _harmed(line: bytes, draw: random.Random) -> bytes:
    """The bytes of a line with something wrong among them."""
    at = draw.randrange(len(line) + 1)
    piece = draw.choice(
        (
            b"\xff",
            b"\xed\xa0\x80",
            b"\xc3",
            b"\x00",
            b"\xef\xbb\xbf",
            b"\\ud800",
            b'"',
            b"[",
            b"}",
            b"1" * 5000,
            b"1e999",
            b"\r",
            b"NaN",
        )
    )
    kind = draw.random()
    if kind < 0.5:
        return line[:at] + piece + line[at:]
    if kind < 0.7:
        return line[:at]
    if kind < 0.8:
        return line + line
    if kind < 0.9:
        return line.decode("utf-8", "replace").encode("utf-16")
    return draw.choice((b"[]", b"null", b"5", b'"x"', b"{}", b"\xff\xfe", b"{" * 2000))
