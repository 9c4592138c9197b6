"""Reading JSON lines that somebody else packed."""

from __future__ import annotations

import gzip
import json
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


@pytest.mark.parametrize(
    ("name", "start", "filling", "said"),
    [
        ("x.json", b'[{"a": "b"}, {"a": "', b"c", "item 2: an item of more than 1 MiB"),
        ("x.json", b"[[", b"[],", "item 1: an item of more than 1 MiB"),
        ("x.csv", b"a,b\nc,d\n", b"e", "3: a row of more than 1 MiB"),
        ("x.csv", b'a,b\nc,"', b"e\n", ": a row of more than 1 MiB"),
        ("x.tsv", b"", b"e\t", "1: a row of more than 1 MiB"),
        ("x.csv.gz", b"", b"e", "1: a row of more than 1 MiB"),
    ],
)
def test_items_and_rows_are_bounded_as_lines_are(
    name: str, start: bytes, filling: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 1 << 20)
    path = tmp_path / name
    content = start + filling * (SIZE // 2 // len(filling))
    path.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=said):
            list(file_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SIZE // 2


@pytest.mark.parametrize("depth", [99, 100, 400, 5000, 100_000])
def test_records_are_nested_a_hundred_times_at_most(depth: int, tmp_path: Path) -> None:
    for name, opening, closing in (("x.jsonl", b"[", b"]"), ("x.json", b'{"b":', b"}")):
        path = tmp_path / name
        record = b'{"a": ' + opening * depth + b"1" + closing * depth + b"}"
        path.write_bytes(b"[" + record + b"]" if name == "x.json" else record)
        if depth < 100:
            assert len(list(file_rows(path))) == 1
            continue
        with pytest.raises(InputError, match=r"x\.jsonl?: ?(item )?1: broken JSON \(.*(within each other|nested)"):
            list(file_rows(path))


def test_brackets_in_a_text_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": '"[{\\' * 5000}))
    assert len(list(read_jsonl(path))) == 1


@pytest.mark.parametrize("harm", [b"\xff", b"\xed\xa0\x80", b"\xc3", b"\\ud800"])
def test_no_text_is_none(harm: bytes, tmp_path: Path) -> None:
    """Halves of surrogate pairs by escapes and in bytes, and bytes that are not UTF-8."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + harm + b'"}')
    with pytest.raises(InputError, match=r"x\.jsonl:2: broken (JSON \(not UTF-8\)|Unicode)"):
        list(read_jsonl(path))


def test_the_longest_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 12)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b"}')
    assert [record["id"] for _, record in read_jsonl(path)] == ["a", "b"]
