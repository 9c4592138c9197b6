"""Outputs that grow line by line: a resumable file of JSON lines, or standard output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from cropi_tools.data.jsonl import Record, dump_line, is_stream
from cropi_tools.data.manifest import Fingerprint, Input, manifest_path, read_manifest
from cropi_tools.data.metadata import Shape, checked
from cropi_tools.data.output import Output
from cropi_tools.runtime.console import data_stream
from cropi_tools.runtime.errors import InputError, UsageError

_TABLES = (".parquet", ".csv", ".tsv", ".arrow")  # names that readers take for tables


def open_cut(path: Path, size: int, part: Path, binary: bool = False) -> IO[Any]:
    """A file of unfinished work, opened to write on from its last commit; what came after that is dropped. InputError: it holds less.

    size: bytes that the commit counts. part: the unfinished work, for the message. binary: of bytes, not of text.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise InputError(f"{path}: has {found} bytes, {size} were saved; restore it, or remove {part} to start again")
    stream: IO[Any] = open(path, "ab") if binary else open(path, "a", encoding="utf-8")
    stream.truncate(size)
    stream.seek(0, os.SEEK_END)
    return stream


class JsonLinesOutput:
    """A JSONL result that grows line by line: a resumable file, or standard output for `-`.

    `append` then `commit`: lines of an uncommitted chunk are dropped on resume, so a resumed file has the bytes of an unbroken one.
    """

    def __init__(self, path: str, fingerprint: Fingerprint, inputs: Mapping[str, Input], force: bool = False) -> None:
        if Path(path).suffix in _TABLES:
            raise UsageError(f"-o {path}: JSON lines are written there; name it .jsonl, .jsonl.gz or .jsonl.zst")
        self._file = None if is_stream(path) else Output(path, fingerprint, inputs, force=force)
        self._stream: IO[str] | None = None
        self._lines = 0

    def open(self) -> bool:
        """As `Output.open`; standard output is never up to date."""
        if self._file is None:
            self._stream = data_stream()
            return True
        if not self._file.open():
            return False
        committed = self._file.state
        self._lines = committed.get("lines", 0)
        self._stream = open_cut(self._file.part, committed.get("bytes", 0), self._file.part)
        return True

    def begin_work(self) -> None:
        """As `Output.begin_work`."""
        if self._file is not None:
            self._file.begin_work()

    def resumed(self, shape: Shape) -> dict[str, Any]:
        """What the last commit said beside the lines, counters of the caller of this shape; empty without one. InputError: it is damaged."""
        state = {} if self._file is None else self._file.resumed({"counters?": shape})
        return state.get("counters", {})

    @property
    def lasting(self) -> bool:
        """Whether what is committed is there after an interruption; what went to standard output has gone."""
        return self._file is not None

    @property
    def lines(self) -> int:
        """Lines committed or appended so far."""
        return self._lines

    def finished_fact(self, name: str, shape_of: Callable[[Any], Shape]) -> Any:
        """A fact in the manifest of an output that is up to date. InputError: it is not there, or has not the shape that `shape_of` gives it."""
        assert self._file is not None, "a stream is never up to date"
        path, remedy = manifest_path(self._file.path), "give --force to make the output again"
        facts = (read_manifest(self._file.path) or {})["facts"]
        shape = {name: shape_of(facts.get(name))}
        return checked(facts, shape, f"{path}: is damaged in its facts", remedy)[name]

    def append(self, records: Iterable[Record]) -> None:
        """Write records, each one line."""
        assert self._stream is not None, "open() first"
        for record in records:
            self._stream.write(dump_line(record) + "\n")
            self._lines += 1

    def commit(self, counters: Mapping[str, Any] | None = None) -> None:
        """Make what was appended durable."""
        assert self._stream is not None, "open() first"
        self._stream.flush()
        if self._file is not None:
            os.fsync(self._stream.fileno())
            self._file.commit({"lines": self._lines, "bytes": self._stream.tell(), "counters": dict(counters or {})})

    def finish(self, **described: Any) -> None:
        """As `Output.finish`; nothing to name for standard output. Lines after the last commit are not committed by it: who
        never commits starts again.
        """
        assert self._stream is not None, "open() first"
        self._stream.flush()
        if self._file is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._file.finish(rows=self._lines, **described)
