"""cropi-project --check: a whole store is described, and each kind of damage is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from forward_stores import forward_store
from gradient_stores import make_store, spec, unseal

from cropi_tools.data import store as room
from cropi_tools.data.manifest import FOLDER_MANIFEST, file_digest
from cropi_tools.data.store import Store
from cropi_tools.data.store_check import check_store
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.spec import Layout, ProjectionSpec

MEANS = {"t": {"norm": 2.0, "sha256": "x", "halves": [1.5, 2.5]}}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 prompts, of which p2 has no gradient, in chunks of 8 rows; with halves, one of which is missing."""
    monkeypatch.setattr(room, "CHUNK_ROWS", 8)
    draw = np.random.default_rng(0)
    rows = [None if n == 2 else draw.normal(size=64).astype(np.float32) for n in range(20)]
    path = tmp_path / "s.zarr"
    made = make_store(path, rows, spec(), inner=[{"t": 0.1 * n} for n in range(20)], against=MEANS)
    half = {"gradient_norm": 3.0, "inner": {"t": 0.5}}

    def with_halves(entry: dict[str, Any]) -> None:
        if entry["row"] is not None:
            entry["halves"] = [half, None if entry["id"] == "p5" else half]

    for entry in list(made.entries()):
        edit(path, entry["id"], with_halves)
    return path


def edit(path: Path, prompt: str, change: Callable[[dict[str, Any]], None], rehash: bool = True) -> None:
    """Change one entry of the index, and the hash that guards it."""
    index = path / "index.jsonl"
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    change(next(entry for entry in entries if entry["id"] == prompt))
    index.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if rehash:
        manifest = json.loads((path / FOLDER_MANIFEST).read_text())
        manifest["outputs"]["index.jsonl"]["sha256"] = file_digest(index)
        (path / FOLDER_MANIFEST).write_text(json.dumps(manifest))


def array(path: Path, name: str) -> Any:
    return zarr.open_group(str(path), mode="r+")[name]


def set_value(path: Path, name: str, place: Any, value: float) -> None:
    array(path, name)[place] = value


def test_a_whole_store_is_described(store: Path) -> None:
    found = check_store(store)
    assert found.pop("bytes") == sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert found == {
        "prompts": 20,
        "live": 19,
        "by_status": {"ok": 19, "zero-advantage": 1},
        "projection": "countsketch",
        "dim": 64,
        "sets": ["t"],
        "halves": True,
        "checksums": True,
    }
    assert json.loads(json.dumps(found)) == found


def test_stores_of_other_kinds_pass(tmp_path: Path) -> None:
    """Raw float32 rows, a sketch that missed everything, forward mode, and no prompt with a gradient."""
    draw = np.random.default_rng(0)
    raw = spec("none")
    make_store(tmp_path / "raw.zarr", list(draw.normal(size=(5, raw.dim)).astype(np.float32)), raw)
    assert check_store(tmp_path / "raw.zarr")["projection"] == "none"
    make_store(tmp_path / "zero.zarr", [np.zeros(64, np.float32)], spec(), norms=[1.0])
    assert check_store(tmp_path / "zero.zarr")["live"] == 1
    assert check_store(forward_store(tmp_path / "f.zarr", 5).path)["dim"] is None
    make_store(tmp_path / "dead.zarr", [None, None], spec())
    assert check_store(tmp_path / "dead.zarr")["live"] == 0


def test_rounding_to_float16_passes(tmp_path: Path) -> None:
    """Coordinates all rounded to the same side, and coordinates below the normal numbers of float16."""
    draw = np.random.default_rng(0)
    uneven = np.full(64, 1 + 2.0**-11, np.float32)
    tiny = (draw.normal(size=64) * 1e-6).astype(np.float32)
    tiny[0] = 1.0
    make_store(tmp_path / "s.zarr", [uneven, tiny], spec())
    check_store(tmp_path / "s.zarr")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("no manifest", lambda s: (s / FOLDER_MANIFEST).unlink(), "has no manifest.json"),
    (
        "index changed",
        lambda s: edit(s, "p4", lambda e: e.update(pass_rate=0.25), rehash=False),
        r"index\.jsonl: was changed",
    ),
    ("id twice", lambda s: edit(s, "p4", lambda e: e.update(id="p3")), "prompt 'p3' is in"),
    ("row missing", lambda s: array(s, "vector").resize((18, 64)), "19 rows, expected 20 and 18"),
    ("column short", lambda s: array(s, "gradient_norm").resize((18,)), "gradient_norm: has 18 rows, expected 19"),
    ("status", lambda s: edit(s, "p4", lambda e: e.update(status="empty")), "'p4' has status empty and row 3"),
    ("chunk lost", lambda s: (s / "vector" / "c" / "1" / "0").unlink(), r"vector/c/1/0: is missing"),
    (
        "chunk torn",
        lambda s: os.truncate(s / "vector" / "c" / "1" / "0", 1000),
        r"c/1/0: has 1000 bytes, expected 1028",
    ),
    ("last chunk torn", lambda s: os.truncate(s / "vector" / "c" / "2" / "0", 384), r"c/2/0: has 384 bytes"),
    ("row of NaN", lambda s: set_value(s, "vector", 9, np.nan), "vector of prompt 'p10' is not finite"),
    ("one infinity", lambda s: set_value(s, "vector", (9, 7), np.inf), "vector of prompt 'p10' is not finite"),
    ("row not of length one", lambda s: set_value(s, "vector", (9, 7), 0.9), "row of prompt 'p10' has length"),
    ("row of zeros", lambda s: set_value(s, "vector", 9, 0.0), "row of prompt 'p10' has length 0, expected 1"),
    ("NaN column", lambda s: set_value(s, "inner/t", 1, np.nan), "inner/t of prompt 'p1' is not finite"),
    ("other norm", lambda s: set_value(s, "gradient_norm", 3, 7.0), r"'p4' has gradient_norm 7\.0 in the column"),
    ("other inner", lambda s: set_value(s, "inner/t", 3, 0.7), r"'p4' has inner/t 0\.69.* in the column, 0\.4 in"),
    ("no inner", lambda s: edit(s, "p4", lambda e: e.update(inner={})), "'p4': it has no inner product with t"),
    (
        "negative norm",
        lambda s: (edit(s, "p4", lambda e: e.update(gradient_norm=-1.0)), set_value(s, "gradient_norm", 3, -1.0)),
        r"index\.jsonl:5: 'gradient_norm' must be a number that is not negative",
    ),
    (
        "cosine beyond one",
        lambda s: (edit(s, "p4", lambda e: e["inner"].update(t=99.0)), set_value(s, "inner/t", 3, 99.0)),
        r"'p4' has an inner product of 99\.0 \(t\)",
    ),
    (
        "cosine of a half beyond one",
        lambda s: edit(s, "p4", lambda e: e["halves"][0]["inner"].update(t=4.6)),
        r"'p4' has an inner product of 4\.6 \(t, half 1\) between vectors of norm 3\.0 and 1\.5",
    ),
    ("no halves", lambda s: edit(s, "p4", lambda e: e.pop("halves")), "'p4' has 0 halves, the store 2"),
    (
        "one half",
        lambda s: edit(s, "p4", lambda e: e["halves"].pop()),
        r"index\.jsonl:5: 'halves' must be a list of two",
    ),
    (
        "half without a product",
        lambda s: edit(s, "p4", lambda e: e["halves"][1]["inner"].clear()),
        "'p4': it has no inner product with t",
    ),
]


@pytest.mark.parametrize(("harm", "words"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damage_is_named(store: Path, harm: Callable[[Path], object], words: str) -> None:
    """In a store without checksums, where each number is compared with another."""
    unseal(store)
    assert not check_store(store)["checksums"]
    harm(store)
    with pytest.raises(InputError, match=words) as caught:
        check_store(store)
    assert "\n" not in str(caught.value)


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != FOLDER_MANIFEST)


def test_every_flipped_bit_is_found(store: Path) -> None:
    """In every file, at its ends and between: rows, columns, checksums, index, metadata (policy, layout, seed, norms of means)."""
    draw = np.random.default_rng(0)
    assert {file.name for file in files(store)} == {"0", "zarr.json", "index.jsonl", "checksums.json"}
    for file in files(store):
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *draw.integers(0, len(whole), 6)}:
            harmed = bytearray(whole)
            harmed[place] ^= 1 << int(draw.integers(8))
            file.write_bytes(harmed)
            with pytest.raises(InputError) as caught:
                check_store(store)
            assert str(store) in str(caught.value), file
        file.write_bytes(whole)
        check_store(store)


def test_swapped_chunks_and_rows_are_found(store: Path) -> None:
    """Chunks that agree with their own checksums in the place of others; rows swapped by a program that renews these."""
    one, other = (store / "vector" / "c" / str(number) / "0" for number in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    for read in (check_store, lambda path: list(Store(path).blocks())):
        with pytest.raises(InputError, match="not the chunk that was written there"):
            read(store)
    one.write_bytes(first)
    other.write_bytes(second)
    check_store(store)
    rows = array(store, "vector")
    rows[0:2] = np.asarray(rows[0:2])[::-1]
    with pytest.raises(InputError, match="not the chunk that was written there"):
        check_store(store)


def test_edited_metadata_is_found_by_every_reader(store: Path) -> None:
    group = zarr.open_group(str(store), mode="r+")
    for key, value in (("policy", "another"), ("against", {"t": {**MEANS["t"], "norm": 3.0}}), ("seed", 1)):
        before = dict(group.attrs)
        group.attrs[key] = value
        with pytest.raises(InputError, match=r"zarr\.json: was changed since the store was made"):
            Store(store)
        group.attrs.put(before)
    check_store(store)


def test_healthy_raw_rows_of_many_coordinates_pass(tmp_path: Path) -> None:
    """Squares of 100,000 coordinates, one of them large, lose much of their sum in float32."""
    layout = Layout((("w", (400, 250)),))
    raw = ProjectionSpec.create("none", layout, None)
    rows = np.random.default_rng(0).normal(size=(3, raw.dim)).astype(np.float32)
    rows[:, 0] = 3e3
    make_store(tmp_path / "raw.zarr", list(rows), raw)
    assert check_store(tmp_path / "raw.zarr")["live"] == 3


def test_reading_alone_does_not_find_it_all(store: Path) -> None:
    """What the check is for: a reader takes the columns and never compares them with the index."""
    unseal(store)
    set_value(store, "gradient_norm", 3, 7.0)
    assert Store(store).column("gradient_norm")[3] == 7.0
