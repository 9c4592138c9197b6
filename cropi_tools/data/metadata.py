"""The small JSON files and headers that stand beside data, checked as they are read: anybody may have written or damaged them.

A shape says what a value must hold. It is a `Kind` (a text, a number), an object with certain keys (a mapping; a key that ends in `?` may be
absent, keys that it does not name are free), or an `Each`, `Listed` or `Maybe`. What a file must hold stands in one table beside the code that
writes it, so that readers rely on it.
"""

from __future__ import annotations

import errno
import json
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cropi_tools.runtime.errors import InputError

LARGEST = 1 << 24
"""Bytes of a metadata file at most: the largest (command lines, lists of files) stay far below."""

DEEPEST = 64  # objects and lists within each other; ours have fewer than ten
_WIDEST = 1 << 63


class Kind(NamedTuple):
    """A kind of value by itself: how messages call it, and whether a value is one."""

    said: str
    fits: Callable[[Any], bool]


class Each(NamedTuple):
    """An object with any keys, all of whose values have a shape."""

    value: Any
    key: Kind | None = None


class Listed(NamedTuple):
    """A list, all of whose values have a shape; length: how many they are, where that is given."""

    value: Any
    length: int | None = None


class Maybe(NamedTuple):
    """A shape, or null."""

    value: Any


Shape = Kind | Each | Listed | Maybe | Mapping[str, Any]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that float64 holds with room to spare for arithmetic."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_name(value: Any) -> bool:
    path = PurePosixPath(value)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in value


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < _WIDEST)
WHOLE = Kind("a whole number", lambda value: type(value) is int and -_WIDEST <= value < _WIDEST)
NUMBER = Kind("a number", is_number)
AT_LEAST_ONE = Kind("a whole number from 1 on", lambda value: type(value) is int and 0 < value < _WIDEST)
POSITIVE = Kind("a positive number", lambda value: is_number(value) and value > 0)
NOT_NEGATIVE = Kind("a number from 0 on", lambda value: is_number(value) and value >= 0)
NAME = Kind("the name of a file in the folder", lambda value: isinstance(value, str) and _is_name(value))
OBJECT = Each(ANYTHING)


def read_json(path: Path, remedy: str, largest: int = LARGEST) -> Any:
    """The value of a JSON file. FileNotFoundError: there is none. InputError, with the remedy: it is no file, too large, or no JSON of use.

    What cannot be used: nesting beyond any of ours, NaN and infinity, and texts that are no Unicode.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise InputError(f"{path}: is no file; {remedy}")
        with open(path, "rb") as stream:
            content = stream.read(largest + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        raise InputError(f"{path}: does not read ({error.strerror}); {remedy}") from None
    if len(content) > largest:
        raise InputError(f"{path}: has more than {largest >> 20} MiB, so it is not what it should be; {remedy}")
    return parse_json(content, str(path), remedy)


def parse_json(content: bytes | str, where: str, remedy: str) -> Any:
    """The value of a JSON text, with the errors of `read_json`."""
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
        _refuse_odd(value)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or ("too deep" if isinstance(error, RecursionError) else str(error))
        raise InputError(f"{where}: broken JSON ({reason}); {remedy}") from None
    return value


def checked(value: Any, shape: Shape, where: str, remedy: str) -> Any:
    """The value, which has the shape. InputError, with the remedy: it has not; the message names the first entry that is wrong."""
    wrong = fault(value, shape)
    if wrong:
        raise InputError(f"{where}: {wrong}; {remedy}")
    return value


def fault(value: Any, shape: Shape, place: str = "") -> str | None:
    """What is wrong with a value, as half a sentence; None: it has the shape."""
    here = f"its {place}" if place else "it"
    if isinstance(shape, Maybe):
        return None if value is None else fault(value, shape.value, place)
    if isinstance(shape, Kind):
        return None if shape.fits(value) else f"{here} should be {shape.said}, found {_brief(value)}"
    if isinstance(shape, Listed):
        if not isinstance(value, list) or shape.length not in (None, len(value)):
            many = "" if shape.length is None else f" of {shape.length}"
            return f"{here} should be a list{many}, found {_brief(value)}"
        parts = ((str(number), item, shape.value) for number, item in enumerate(value))
    else:
        if not isinstance(value, dict):
            return f"{here} should be a JSON object, found {_brief(value)}"
        if isinstance(shape, Each):
            odd = [key for key in value if shape.key is not None and not shape.key.fits(key)]
            if odd:
                return f"{here} has the entry {_brief(odd[0])}, which is not {shape.key.said if shape.key else ''}"
            parts = ((key, item, shape.value) for key, item in value.items())
        else:
            absent = [key for key in shape if not key.endswith("?") and key not in value]
            if absent:
                return f"{here} has no {absent[0]}"
            asked = ((key.removesuffix("?"), wanted) for key, wanted in shape.items())
            parts = ((key, value[key], wanted) for key, wanted in asked if key in value)
    found = (fault(item, wanted, f"{place}.{key}" if place else key) for key, item, wanted in parts)
    return next((wrong for wrong in found if wrong), None)


def _brief(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "null"}
    if type(value) in names:
        return names[type(value)] + (f" of {len(value)}" if isinstance(value, list) else "")
    try:
        text = json.dumps(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number"
    return text if len(text) <= 40 else text[:37] + "..."


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _refuse_odd(value: Any) -> None:
    """ValueError: nested too deep, a number that no float holds, or half of a surrogate pair."""
    level = [value]
    for _ in range(DEEPEST):
        if any(isinstance(one, float) and not math.isfinite(one) for one in level):
            raise ValueError("a number that is not finite")
        within = [one for one in level if isinstance(one, dict | list)]
        level = [part for one in within for part in (one.values() if isinstance(one, dict) else one)]
        if not level:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError("half of a surrogate pair") from None
            return
    raise ValueError("too deep")


def _is_parameter(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and fault(value[1], Listed(COUNT)) is None
    )


PARAMETERS = Listed(Kind("a name and a shape", _is_parameter))
"""Of a mean's header and a store's attributes: the parameters in order."""
