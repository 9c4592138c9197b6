"""NaN and infinity in data, which JSON lacks: pandas writes them for what is missing, and Python's json reads and writes them all the same.

A value that something here reads is refused, with its place. One that is only carried along becomes null, and the columns in which that
happened are told, once a file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.runtime.errors import InputError


def is_number(value: Any) -> bool:
    """Whether a value is not a float that is NaN or infinite."""
    return not isinstance(value, float) or math.isfinite(value)


def place_of(value: Any, name: str) -> tuple[str, float] | None:
    """Where in a value the first number that is not finite stands (`extra.weight`, `scores.target`), and that number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (name, value)
    if isinstance(value, dict):
        found = (place_of(item, f"{name}.{key}") for key, item in value.items())
    elif isinstance(value, list):
        found = (place_of(item, name) for item in value)
    else:
        return None
    return next(filter(None, found), None)


class Carried:
    """Makes null what is not finite among values that are only carried along, and counts the rows by column."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}

    def record(
        self,
        record: Record,
        where: str,
        read: Collection[str],
        checked_elsewhere: Collection[str] = (),
        prefix: str = "",
    ) -> Record:
        """The record with nulls, or itself where there is nothing to change.

        read: fields whose numbers count; InputError: one is not finite. prefix: what stands before the fields' names in messages.
        """
        changed: Record = {}
        for name, value in record.items():
            if value is None or isinstance(value, str | int) or name in checked_elsewhere:
                continue
            found = place_of(value, prefix + name)
            if found is None:
                continue
            if name in read:
                raise refused(where, record.get("id"), *found)
            columns: set[str] = set()
            changed[name] = _with_nulls(value, prefix + name, columns)
            for column in columns:
                self._rows[column] = self._rows.get(column, 0) + 1
        return {**record, **changed} if changed else record

    def tell(self, name: str) -> None:
        """Say what became null in the file of that name, if anything did; once in a process, however often the file is read."""
        if self._rows:
            told = ", ".join(
                f"'{column}' ({count} row{'s' if count > 1 else ''})" for column, count in self._rows.items()
            )
            _warn_once(f"{name}: numbers that are not finite (NaN or infinite) count as null, in {told}")


@contextmanager
def telling(name: str, *counted: Any) -> Iterator[None]:
    """Around the reading of a file: what was counted is told at its end, also where a reader wants no more of it, but not before an error."""
    try:
        yield
    except GeneratorExit:
        for one in counted:
            one.tell(name)
        raise
    for one in counted:
        one.tell(name)


def refused(where: str, identity: Any, place: str, value: float) -> InputError:
    """The error of a number that something reads."""
    whose = f"prompt '{identity}': " if isinstance(identity, str) else ""
    return InputError(f"{where}: {whose}'{place}' is {value}, not a finite number; correct it, or remove the line")


def _with_nulls(value: Any, name: str, columns: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item, f"{name}.{key}", columns) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nulls(item, name, columns) for item in value]
    if is_number(value):
        return value
    columns.add(name)
    return None


@cache
def _warn_once(sentence: str) -> None:
    runtime.warn(sentence)
