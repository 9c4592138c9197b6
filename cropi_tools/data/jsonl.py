"""JSON lines, streamed: one object a line, `.gz` and `.zst` by extension, `-` for the standard streams.

Standard input and pipes are spooled to temporary files once, because commands hash their inputs before they work on them and some
read them twice.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import io
import itertools
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cropi_tools.runtime.errors import InputError
from cropi_tools.runtime.signals import at_once

Record = dict[str, Any]

MAX_LINE = 1 << 28
"""Longest line that is read, in bytes: the largest records (hundreds of long samples) stay far below."""

MAX_DEPTH = 100
"""Most objects and lists within each other: what walks through a record calls itself for each."""

_TEXTS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ZSTD_PIECE = 1 << 8  # compressed bytes at a time

_spools: dict[str, Path] = {}


def is_stream(path: str | Path) -> bool:
    """Whether the path is `-`, a standard stream."""
    return str(path) == "-"


def shown(path: str | Path) -> str:
    """The path as messages name it."""
    return "standard input" if is_stream(path) else str(path)


def local_path(path: str | Path) -> Path:
    """The file that holds the input: itself, or a spooled copy of standard input or a pipe. InputError if there is no such file."""
    found = Path(path)
    if is_stream(path):
        return _spooled("-")
    if not found.exists():
        raise InputError(f"{path}: no such file")
    if found.is_dir():
        raise InputError(f"{path}: is a folder, expected a JSONL file")
    return found if found.is_file() else _spooled(str(path))


def _spooled(path: str) -> Path:
    """What can be read only once (standard input, a pipe, `<(...)` of a shell) as a temporary file, made at the first call."""
    if path not in _spools:
        with tempfile.NamedTemporaryFile(
            prefix="cropi-input-", suffix=Path(path).suffix or ".jsonl", delete=False
        ) as spool:
            _spools[path] = Path(spool.name)
            atexit.register(_spools[path].unlink, missing_ok=True)
            with at_once():
                if path == "-":
                    shutil.copyfileobj(sys.stdin.buffer, spool)
                else:
                    with open(path, "rb", buffering=0) as stream:
                        shutil.copyfileobj(stream, spool)
    return _spools[path]


@contextlib.contextmanager
def open_binary(path: str | Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file; a truncated or corrupt archive is an InputError."""
    found = local_path(path)
    try:
        if found.suffix == ".gz":
            with gzip.open(found, "rb") as stream:
                yield stream  # type: ignore[misc]
        elif found.suffix == ".zst":
            with open(found, "rb") as raw:
                yield io.BufferedReader(_ZstdReader(raw, path), 1 << 17)
        else:
            with open(found, "rb") as stream:
                yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{shown(path)}: not a whole gzip file ({error})") from None


class _ZstdReader(io.RawIOBase):
    """The content of a zstd file of one or more frames. InputError at an end within a frame, which zstandard's own reader
    takes for the end of the data."""

    def __init__(self, raw: IO[bytes], path: str | Path) -> None:
        import zstandard

        self._raw, self._path, self._error = raw, path, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._left = b""  # read, and behind the end of a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # a few bytes can stand for 128 KiB of zeros: small pieces keep what one of them becomes small
            packed = self._left[:_ZSTD_PIECE] or self._raw.read(_ZSTD_PIECE)
            self._left = self._left[_ZSTD_PIECE:]
            if not packed:
                if self._frame and not self._frame.eof:
                    raise InputError(f"{shown(self._path)}: not a whole zstd file (it ends within its data)")
                return 0
            if not self._frame or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise InputError(f"{shown(self._path)}: not a whole zstd file ({error})") from None
            if self._frame.eof:
                self._left = self._frame.unused_data + self._left
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yield (line number from 1, object). Blank lines are passed over; anything else that is not a JSON object is an InputError."""
    with open_binary(path) as stream:
        for number, line in bounded_lines(stream, path):
            yield number, parse_line(line, path, number)


def bounded_lines(stream: IO[bytes], path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of an opened file, but for blank lines. InputError: a line is longer than MAX_LINE."""
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise InputError(f"{shown(path)}:{number}: a line of more than {MAX_LINE >> 20} MiB; is this a JSONL file?")
        if line.strip():
            yield number, line


def parse_line(line: bytes, path: str | Path, number: int) -> Record:
    """One line as an object; InputError names the file and the line."""
    try:
        # decoded here, since json lets through halves of surrogate pairs that are written as bytes
        text = line.decode(json.detect_encoding(line))
        record = decoded(text)
    except ValueError as error:
        if Path(path).suffix in (".csv", ".tsv", ".parquet", ".arrow"):
            raise InputError(f"{path}: JSON lines are expected here; cropi-prompts makes them of tables") from None
        raise InputError(f"{shown(path)}:{number}: broken JSON ({reason_of(error)}); fix or remove the line") from None
    if not isinstance(record, dict):
        raise InputError(f"{shown(path)}:{number}: expected a JSON object, found {type(record).__name__}")
    if b"\\ud" in line.lower():
        refuse_half_characters(record, f"{shown(path)}:{number}")
    return record


def decoded(text: str) -> Any:
    """The value of a JSON text. ValueError: it is none, holds a number of thousands of digits, or is nested deeper than MAX_DEPTH."""
    refuse_depth(text)
    return json.loads(text)


def refuse_depth(text: str) -> None:
    """ValueError when a JSON text holds more than MAX_DEPTH objects and lists within each other."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _TEXTS.sub("", text).encode("utf-8", "replace").translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} objects and lists within each other")


def reason_of(error: ValueError) -> str:
    """Why a text is no JSON, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return str(getattr(error, "msg", None) or str(error).partition(";")[0])


def no_record(paths: Sequence[str | Path]) -> InputError:
    """The error of files that are all empty."""
    return InputError(f"{', '.join(map(shown, paths))}: {'holds' if len(paths) == 1 else 'hold'} no record")


def refuse_half_characters(record: Record, where: str) -> None:
    """InputError when a text of the record is none: JSON's escapes can write half of a surrogate pair."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: broken Unicode (half of a surrogate pair); fix or remove it") from None


def dump_line(record: Record) -> str:
    """One record as a line without its newline. Keys keep their order, text stays readable, NaN and infinity are refused."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError(f"record '{record.get('id')}' holds a number that is not finite, which JSON lacks") from None


def compress(source: Path, target: Path, suffix: str) -> None:
    """Compress `source` into `target` as its suffix says, without time stamps, so that the same lines give the same bytes."""
    if suffix == ".gz":
        with open(source, "rb") as raw, open(target, "wb") as out, gzip.GzipFile("", "wb", 6, out, mtime=0) as packed:
            shutil.copyfileobj(raw, packed)
    elif suffix == ".zst":
        import zstandard

        with open(source, "rb") as raw, open(target, "wb") as out:
            zstandard.ZstdCompressor(level=3).copy_stream(raw, out)
    else:
        raise ValueError(f"no compression for {suffix!r}")


def float32_text(value: float) -> float:
    """A float32 as the shortest decimal that reads back as the same float32 (nine significant digits are enough)."""
    return float(f"{value:.9g}")
