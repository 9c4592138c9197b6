"""Rows of data files, streamed, each with its place in words: JSONL and JSON arrays, CSV and TSV (these also `.gz` and
`.zst`), parquet and Arrow. No file is held in memory whole.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cropi_tools.data import jsonl
from cropi_tools.data.jsonl import (
    Record,
    bounded_lines,
    is_stream,
    open_binary,
    parse_line,
    reason_of,
    refuse_depth,
    refuse_half_characters,
    shown,
)
from cropi_tools.prompts.families import plain
from cropi_tools.runtime.clock import importing
from cropi_tools.runtime.errors import InputError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Names of data files end so, in folders; `.gz` or `.zst` may follow the first four."""

_BATCH_ROWS = 1024
_READ_BYTES = 1 << 20
_UNREADABLE = (ValueError, ArithmeticError, TypeError, LookupError, SystemError)
"""What pyarrow raises of values that Python has none for, and of what is no value."""


def kind_of(path: str | Path) -> str | None:
    """The suffix that says how a file is read, compression left out; None for one that is not a data file's."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES[:4] else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def file_rows(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Each row of a file, as JSON values, and its place for messages: `FILE:LINE` or `FILE: row N`. A name that says
    nothing is read as JSONL. InputError: no such file, or not what its name says."""
    kind = None if is_stream(path) else kind_of(path)
    if kind in (".csv", ".tsv"):
        yield from _csv_rows(path, "," if kind == ".csv" else "\t")
    elif kind in (".parquet", ".arrow"):
        yield from _column_rows(Path(path), kind)
    elif kind == ".json":
        yield from _json_rows(path)
    else:
        with open_binary(path) as stream:
            yield from _line_rows(stream, path)


def _line_rows(stream: Any, path: str | Path) -> Iterator[tuple[str, Record]]:
    for number, line in bounded_lines(stream, path):
        yield f"{shown(path)}:{number}", parse_line(line, path, number)


def _csv_rows(path: str | Path, delimiter: str) -> Iterator[tuple[str, Record]]:
    """Rows under the names of the first line; empty fields are text too."""
    csv.field_size_limit(jsonl.MAX_LINE)
    with open_binary(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        lines = _Texts(text, path)
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            names = list(reader.fieldnames or ())
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{shown(path)}:1: two columns are named '{twice}'; rename one of them")
            for row in reader:
                lines.next_row()
                where = f"{shown(path)}:{reader.line_num}"
                if None in row:
                    raise InputError(f"{where}: more fields than the first line has names; quote those with a comma")
                yield where, {name: value for name, value in row.items() if value is not None}
        except csv.Error as error:
            raise InputError(f"{shown(path)}:{reader.reader.line_num}: broken CSV ({error}); fix the line") from None
        except UnicodeDecodeError:
            raise InputError(f"{shown(path)}: not UTF-8; convert the file") from None


class _Texts:
    """The lines of a text, one after another; a row of more than MAX_LINE characters, on one line or on many, is refused before it is
    read whole."""

    def __init__(self, stream: IO[str], path: str | Path) -> None:
        self._stream, self._path = stream, path
        self._number = self._held = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(jsonl.MAX_LINE + 1):
            self._number, self._held = self._number + 1, self._held + len(line)
            if self._held > jsonl.MAX_LINE:
                size = f"a row of more than {jsonl.MAX_LINE >> 20} MiB"
                raise InputError(
                    f"{shown(self._path)}:{self._number}: {size}; is this a table, with its quotes closed?"
                )
            yield line

    def next_row(self) -> None:
        """What was read so far is behind."""
        self._held = 0


def _json_rows(path: str | Path) -> Iterator[tuple[str, Record]]:
    """The objects of an array, decoded one at a time; a file that opens no array is read as lines."""
    with open_binary(path) as stream:
        start = stream.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n")  # type: ignore[attr-defined]
        if not start.startswith(b"["):
            yield from _line_rows(stream, path)
            return
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
            try:
                for number, (value, escaped) in enumerate(_array_items(text, path), 1):
                    where = f"{shown(path)}: item {number}"
                    if not isinstance(value, dict):
                        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
                    if escaped:
                        refuse_half_characters(value, where)
                    yield where, value
            except UnicodeDecodeError:
                raise InputError(f"{shown(path)}: not UTF-8; convert the file") from None


def _array_items(stream: IO[str], path: str | Path) -> Iterator[tuple[Any, bool]]:
    """The items, and whether halves of surrogate pairs may be written in one by escapes. InputError: one is broken, nested deeper than
    lines may be, or not whole within MAX_LINE characters."""
    decoder = json.JSONDecoder()
    text, place, number = stream.read(_READ_BYTES), 0, 0
    place = text.index("[") + 1
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text[place : place + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            # perhaps it goes on in what was not read yet; as much again, so that a long item is not tried too often
            held = len(text) - place
            more = "" if isinstance(error, RecursionError) else stream.read(max(_READ_BYTES, held))
            if held > jsonl.MAX_LINE:
                size = f"an item of more than {jsonl.MAX_LINE >> 20} MiB"
                raise InputError(
                    f"{shown(path)}: item {number + 1}: {size}, or broken JSON; fix or remove it"
                ) from None
            if not more:
                reason = reason_of(error) if isinstance(error, ValueError) else "nested too deep"
                raise InputError(
                    f"{shown(path)}: item {number + 1}: broken JSON ({reason}); fix or remove it"
                ) from None
            text, place = text[place:] + more, 0
            continue
        number += 1
        try:
            refuse_depth(text[place:end])
        except ValueError as error:
            raise InputError(f"{shown(path)}: item {number}: broken JSON ({error}); fix or remove it") from None
        yield value, "\\ud" in text[place:end].lower()
        place = end


def _column_rows(path: Path, kind: str) -> Iterator[tuple[str, Record]]:
    with importing():
        import pyarrow

    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a {kind} file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    numbers = itertools.count(1)
    try:
        for batch in _parquet_batches(path) if kind == ".parquet" else _arrow_batches(path):
            for row in _rows_of(batch, path):
                yield f"{path}: row {next(numbers)}", plain(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable {kind} file ({first_line(error)})") from None


def _rows_of(batch: Any, path: Path) -> list[Record]:
    """The rows of a batch as Python values. InputError: a column holds what Python or JSON has no value for (text that is not UTF-8, dates
    beyond the year 9999, nanoseconds)."""
    try:
        batch.validate(full=True)  # what a harmed file points to may lie outside of it
        rows: list[Record] = batch.to_pylist()
        if any(str(kind).count("<") > jsonl.MAX_DEPTH for kind in batch.schema.types):
            refuse_depth(json.dumps(plain(rows)))
        return rows
    except (*_UNREADABLE, RecursionError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.validate(full=True)
                column.to_pylist()
            except _UNREADABLE as error:
                reason = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else first_line(error)
                raise InputError(
                    f"{path}: column '{name}' of type {column.type} holds what cannot be read ({reason}); convert it, or leave it out"
                ) from None
        raise InputError(f"{path}: not a readable table (nested too deep)") from None


def _parquet_batches(path: Path) -> Iterator[Any]:
    with importing():
        from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of an Arrow stream (what `datasets` writes) or an Arrow file."""
    with importing():
        from pyarrow import ipc, memory_map

    with memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            file = ipc.open_file(source)
            batches: Iterator[Any] = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            batches = iter(ipc.open_stream(source))
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)
