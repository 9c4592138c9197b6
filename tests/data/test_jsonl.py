"""Reading JSON lines that somebody else packed."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from cropi_tools.data import jsonl
from cropi_tools.data.jsonl import open_binary, read_jsonl
from cropi_tools.prompts.tables import file_rows
from cropi_tools.rewards import check_own_verifiers
from cropi_tools.runtime.errors import InputError

SIZE = 1 << 27


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_small_file_of_much_content_takes_little_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.jsonl.{ending}"
    pack = gzip.compress if ending == "gz" else zstandard.compress
    path.write_bytes(pack(b" " * SIZE))
    tracemalloc.start()
    try:
        with open_binary(path) as stream:
            read = sum(len(part) for part in iter(lambda: stream.read(1 << 16), b""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == SIZE
    assert peak < SIZE // 4


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 1 << 20)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + b" " * (1 << 21))
    records = read_jsonl(path)
    assert next(records) == (1, {"id": "a"})
    with pytest.raises(InputError, match=r"x\.jsonl:2: a line of more than 1 MiB"):
        next(records)


def test_every_reader_of_lines_keeps_to_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 1 << 20)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b" " * (1 << 21))
    readers: tuple[Callable[[], object], ...] = (
        lambda: list(read_jsonl(path)),
        lambda: list(file_rows(path)),
        lambda: check_own_verifiers([str(path)], "maths"),
    )
    for read in readers:
        with pytest.raises(InputError, match=r"x\.jsonl:1: a line of more than 1 MiB"):
            read()


def test_the_longest_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 12)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b"}')
    assert [record["id"] for _, record in read_jsonl(path)] == ["a", "b"]
