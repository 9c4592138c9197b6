"""Lines of the files of a run, checked as they are read; of files that are still being written too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cropi_tools.data.fields import Field, check_fields
from cropi_tools.data.jsonl import Record, bounded_lines, parse_line, read_jsonl
from cropi_tools.runtime.errors import InputError


def records(path: Path, finished: bool, table: Mapping[str, Field], needed: Sequence[str]) -> Iterator[Record]:
    """The records of a file that may be missing, each with the fields that are needed. finished: else its last line may be torn."""
    return checked(path, _lines(path, finished), table, needed)


def checked(
    path: Path, lines: Iterable[tuple[int, Record]], table: Mapping[str, Field], needed: Sequence[str] = ()
) -> Iterator[Record]:
    """The records of numbered lines. InputError: a field is missing that is needed, or holds what is no such value."""
    for number, record in lines:
        for name in needed:
            if name not in record:
                raise InputError(f"{path}:{number}: no field '{name}'; fix or remove the line")
        check_fields(record, table, f"{path}:{number}")
        yield record


def _lines(path: Path, finished: bool) -> Iterator[tuple[int, Record]]:
    if not path.exists():
        return
    if finished:
        yield from read_jsonl(path)
        return
    with open(path, "rb") as stream:
        for number, line in bounded_lines(stream, path):
            if line.endswith(b"\n"):
                yield number, parse_line(line, path, number)
