"""Rows of files of every kind are the same rows; what is broken is named with its place; nothing is read whole."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import ipc, parquet

from cropi_tools.prompts import tables
from cropi_tools.prompts.tables import file_rows, kind_of
from cropi_tools.runtime.errors import InputError

ROWS = [{"prompt": f'Say "{i}",\nnow', "answer": str(i), "n": i} for i in range(2500)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def separated(path: Path, delimiter: str) -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def arrow(path: Path, opener: Callable[..., Any]) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with opener(str(path), table.schema) as writer:
        writer.write_table(table)


def frames(text: str) -> bytes:
    """Two zstd frames one after another, as `cat` of two files makes them."""
    half = len(text) // 2
    return b"".join(zstandard.compress(part.encode()) for part in (text[:half], text[half:]))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text(lines(ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS).encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(frames(lines(ROWS))),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(lines(ROWS)),
    "a.json.zst": lambda path: path.write_bytes(frames(json.dumps(ROWS))),
    "a.csv": lambda path: separated(path, ","),
    "a.tsv": lambda path: separated(path, "\t"),
    "a.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "stream.arrow": lambda path: arrow(path, ipc.new_stream),
    "file.arrow": lambda path: arrow(path, ipc.new_file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_READ_BYTES", 1000)
    WRITERS[name](tmp_path / name)
    found = list(file_rows(tmp_path / name))
    textual = kind_of(name) in (".csv", ".tsv")
    expected = [{key: str(value) if textual else value for key, value in row.items()} for row in ROWS]
    assert [row for _, row in found] == expected
    places = {".csv": ":4", ".tsv": ":4", ".parquet": ": row 2", ".arrow": ": row 2"}
    place = ": item 2" if name.startswith("a.json") and "jsonl" not in name else places.get(kind_of(name) or "", ":2")
    if textual:
        place = ":5"  # each question holds a line break
    assert found[1][0] == f"{tmp_path / name}{place}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"prompt,answer\na,1\nb,2,3\n", r"a.csv:3: more fields than the first line has names"),
        ("a.csv", b'prompt,answer\na,1\n"b" c,2\n', r"a.csv:3: broken CSV"),
        ("a.csv", b"prompt,answer\na,1\n\xff,2\n", r"a.csv: not UTF-8"),
        ("a.json", b'[{"a": 1}, {"a": ]', r"a.json: item 2: broken JSON"),
        ("a.json", b'[{"a": 1}, {"a": 2}', r"a.json: item 3: broken JSON"),
        ("a.json", b'[{"a": "\xff"}]', r"a.json: not UTF-8"),
        ("a.json", b'[{"a": "\\ud800"}]', r"a.json: item 1: broken Unicode"),
        ("a.json", b'[{"a": 1}, 5]', r"a.json: item 2: expected a JSON object, found int"),
        ("a.parquet", b"PAR1 not really", r"a.parquet: not a readable .parquet file"),
        ("a.arrow", b"ARROW1 not really", r"a.arrow: not a readable .arrow file"),
        ("a.jsonl.zst", zstandard.compress(lines(ROWS).encode())[:-20], r"a.jsonl.zst: not a whole zstd file"),
        ("a.jsonl.zst", b"no frame", r"a.jsonl.zst: not a whole zstd file"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-20], r"a.jsonl.gz: not a whole gzip file"),
    ],
)
def test_what_is_broken_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as raised:
        list(file_rows(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(file_rows(tmp_path / name))


def test_empty_arrays_and_files_have_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ ]\n")
    (tmp_path / "a.csv").write_text("")
    assert list(file_rows(tmp_path / "a.json")) == list(file_rows(tmp_path / "a.csv")) == []


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "lines.json"])
def test_the_first_row_comes_before_the_last_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held is a batch, not the file: the reader has come at most a batch or a buffer further."""
    monkeypatch.setattr(tables, "_READ_BYTES", 1000)
    monkeypatch.setattr(tables, "_BATCH_ROWS", 100)
    WRITERS[name](tmp_path / name)
    alive = 0

    def counted(row: Any) -> Any:
        nonlocal alive
        alive += 1
        return row

    monkeypatch.setattr(tables, "plain", counted)
    monkeypatch.setattr(tables, "parse_line", lambda line, path, number: counted(json.loads(line)))
    rows: Iterator[Any] = file_rows(tmp_path / name)
    next(rows)
    assert alive <= 1
