"""The gradient store: what is written is read, at any commit; what is damaged is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from forward_stores import Unfinished, forward_store
from gradient_stores import make_store, matrix, open_output, spec, unseal

from cropi_tools.data import store as room
from cropi_tools.data.means import read_facts, read_tensors, write_mean
from cropi_tools.data.store import Store, StoreWriter, store_input
from cropi_tools.runtime.errors import InputError


def rows(count: int, dim: int = 64) -> list[np.ndarray | None]:
    draw = np.random.default_rng(0)
    return [
        None if n % 5 == 2 else (draw.normal(size=dim) * 10.0 ** draw.integers(-12, 12)).astype(np.float32)
        for n in range(count)
    ]


@pytest.mark.parametrize(("method", "tolerance"), [("countsketch", 1e-3), ("none", 1e-6)])
def test_rows_read_back_whatever_their_norm(tmp_path: Path, method: str, tolerance: float) -> None:
    """Norms from 1e-11 to 1e13: unscaled float16 would be zero or infinite."""
    projection = spec(method)
    given = rows(150, projection.dim)
    store = make_store(tmp_path / "s.zarr", given, projection)
    live = np.stack([row for row in given if row is not None]).astype(np.float64)
    norms = np.linalg.norm(live, axis=1)
    np.testing.assert_allclose(store.column("sketch_norm"), norms, rtol=1e-6)
    np.testing.assert_allclose(matrix(store) / norms[:, None], live / norms[:, None], atol=tolerance)
    assert [entry["row"] for entry in list(store.entries())[:6]] == [0, 1, None, 2, 3, 4]
    assert store.dim == projection.dim
    assert zarr.open_group(str(store.path), mode="r")["vector"].dtype == (
        np.float16 if method == "countsketch" else np.float32
    )


def test_a_row_of_zeros(tmp_path: Path) -> None:
    """A sparse projection may miss everything: the row is zero, not NaN."""
    store = make_store(tmp_path / "s.zarr", [np.zeros(64, np.float32)], spec(), norms=[1.0])
    assert (matrix(store) == 0).all()


@pytest.mark.parametrize("commit_at", [1, 3, 8, 9, 17, 39, 40])
def test_resumed_after_any_commit_equals_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit_at: int
) -> None:
    monkeypatch.setattr(room, "CHUNK_ROWS", 8)
    given, path = rows(40), tmp_path / "s.zarr"
    whole = make_store(tmp_path / "whole.zarr", given, spec())

    def add(writer: StoreWriter, stop: int) -> None:
        for place in range(writer.records, stop):
            row = given[place]
            entry: dict[str, Any] = {
                "id": f"p{place}",
                "source": "s",
                "pass_rate": 0.5,
                "status": "zero-advantage" if row is None else "ok",
            }
            writer.add(
                entry if row is None else {**entry, "gradient_norm": float(np.linalg.norm(row)), "inner": {}}, row
            )

    output = open_output(path)
    writer = StoreWriter(output, len(given), 64, dict(zarr.open_group(str(whole.path)).attrs))
    add(writer, commit_at)
    writer.commit({})
    add(writer, min(commit_at + 3, 40))  # what is added after the commit is lost in a kill
    writer._index.close()
    output._release_lock()

    output = open_output(path)
    assert output.state["records"] == commit_at
    writer = StoreWriter(output, len(given), 64, dict(zarr.open_group(str(whole.path)).attrs))
    add(writer, 40)
    writer.finish({}, skipped={})
    store = Store(path)
    assert (path / "index.jsonl").read_bytes() == (whole.path / "index.jsonl").read_bytes()
    assert (matrix(store) == matrix(whole)).all()
    assert (store.column("gradient_norm") == whole.column("gradient_norm")).all()


def test_blocks_cover_all_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK_ROWS", 8)
    store = make_store(tmp_path / "s.zarr", rows(40), spec())
    assert [(start, len(block)) for start, block in store.blocks()] == [(0, 8), (8, 8), (16, 8), (24, 8)]


def big_store(path: Path) -> Store:
    """35 rows in chunks of 8, the last one short."""
    draw = np.random.default_rng(1)
    return make_store(path, list(draw.normal(size=(35, 64)).astype(np.float32)), spec())


def test_chunk_files_read_as_zarr_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK_ROWS", 8)
    store = big_store(tmp_path / "s.zarr")
    whole: Any = zarr.open_group(str(store.path), mode="r")["vector"]
    assert store.chunks.direct
    monkeypatch.setattr(type(whole), "__getitem__", None)  # Zarr is not asked
    found = [block for _, block in store.blocks()]
    monkeypatch.undo()
    assert [len(block) for block in found] == [8, 8, 8, 8, 3]
    assert (np.concatenate(found) == np.asarray(whole[:]).astype(np.float32)).all()


@pytest.mark.parametrize("how", ["compressed", "big-endian", "another separator", "other chunks", "float64"])
def test_other_layouts_are_read_through_zarr(tmp_path: Path, how: str) -> None:
    """The same rows laid out otherwise, as another program might: read as well, only slower."""
    store = big_store(tmp_path / "s.zarr")
    expected = matrix(store)
    rows = np.asarray(zarr.open_group(str(store.path), mode="r")["vector"][:])  # type: ignore[index]
    settings: dict[str, Any] = {
        "compressed": {"compressors": "auto"},
        "big-endian": {"serializer": zarr.codecs.BytesCodec(endian="big")},
        "another separator": {"chunk_key_encoding": {"name": "default", "separator": "."}},
        "other chunks": {"chunks": (16, 32)},
        "float64": {"dtype": np.float64},
    }[how]
    group = zarr.open_group(str(store.path), mode="r+")
    del group["vector"]
    plain = {"shape": rows.shape, "chunks": (16, 64), "dtype": np.float16, "compressors": None, **settings}
    group.create_array("vector", **plain)[:] = rows
    again = unseal(store.path)
    assert not again.chunks.direct
    assert (matrix(again) == expected).all()


def test_columns_and_index_of_forward_mode(tmp_path: Path) -> None:
    """Inner products alone: no rows and no norms, whose absence is explained."""
    store = forward_store(tmp_path / "s.zarr", 5)
    assert (store.prompts, store.rows, store.has_vectors) == (5, 4, False)
    assert store.column("inner/t").tolist() == [0.0, 1.0, 3.0, 4.0]
    assert [entry["row"] for entry in store.entries() if entry["row"] is not None] == [0, 1, 2, 3]
    assert not (store.path / "vector").exists()
    for read in (lambda: store.column("gradient_norm"), lambda: store.column("sketch_norm")):
        with pytest.raises(InputError, match=r"forward mode and holds no norms: .*--similarity dot, .*--norms"):
            read()
    for ask in (lambda: list(store.blocks()), lambda: store.dim):
        with pytest.raises(InputError, match=r"forward mode and holds inner products alone"):
            ask()


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_forward_mode_resumes(tmp_path: Path, stop_at: int) -> None:
    whole = forward_store(tmp_path / "whole.zarr", 5)
    with pytest.raises(Unfinished):
        forward_store(tmp_path / "s.zarr", 5, stop_at)
    found = forward_store(tmp_path / "s.zarr", 5)
    assert (found.path / "index.jsonl").read_bytes() == (whole.path / "index.jsonl").read_bytes()
    assert (found.column("inner/t") == whole.column("inner/t")).all()


def test_an_index_out_of_order_is_refused(tmp_path: Path) -> None:
    """Rows are found by counting along the index, so its order is part of what a store is."""
    path = make_store(tmp_path / "s.zarr", rows(4), spec()).path
    index = path / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"index.jsonl:1: has row 1, expected 0 or null"):
        Store(path)
    index.write_text("".join([lines[0], lines[1].replace('"p1"', '"p0"'), *lines[2:]]))
    with pytest.raises(InputError, match=r"prompt 'p0' is in .*s\.zarr too"):
        Store(path)


def test_a_store_without_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", [None, None], spec(), against={"t": {"norm": 1.0, "sha256": "x"}})
    assert list(store.blocks()) == []
    assert len(store.column("inner/t")) == 0


def damage(folder: Path, how: str) -> None:
    if how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "index too short":
        lines = (folder / "index.jsonl").read_text().splitlines(keepends=True)
        (folder / "index.jsonl").write_text("".join(lines[:-1]))
    elif how == "broken index":
        (folder / "index.jsonl").write_text((folder / "index.jsonl").read_text()[:-5])
    elif how == "no chunk":
        shutil.rmtree(folder / "vector" / "c")
    elif how == "no vector":
        shutil.rmtree(folder / "vector")
    elif how == "no column":
        shutil.rmtree(folder / "sketch_norm")
    elif how == "torn chunk":
        chunk = next(path for path in sorted((folder / "vector" / "c").rglob("*")) if path.is_file())
        chunk.write_bytes(chunk.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no manifest", "has no manifest.json"),
        ("index too short", "index has 9 prompts and 7 rows, expected 10 and 8"),
        ("broken index", r"index.jsonl:10: broken JSON"),
        ("no chunk", "vector of prompt 'p0' is not finite or was never written"),
        ("no vector", "does not open as a gradient store"),
        ("no column", "column sketch_norm does not read"),
        ("torn chunk", "rows from 0 do not read"),
    ],
)
def test_damage_is_refused(tmp_path: Path, how: str, words: str) -> None:
    made = make_store(tmp_path / "s.zarr", rows(10), spec())
    damage(made.path, how)
    with pytest.raises(InputError, match=words) as caught:
        matrix(unseal(made.path) if how != "no manifest" else Store(made.path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [("no vector", r"vector/zarr\.json: is missing"), ("no column", r"sketch_norm/zarr\.json: is missing")],
)
def test_what_the_manifest_names_is_missed_first(tmp_path: Path, how: str, words: str) -> None:
    made = make_store(tmp_path / "s.zarr", rows(10), spec())
    damage(made.path, how)
    with pytest.raises(InputError, match=words):
        Store(made.path)


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such store"):
        Store(tmp_path / "none.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="unfinished or not a store"):
        store_input(tmp_path / "folder")


def test_a_store_as_input_is_known_by_its_making(tmp_path: Path) -> None:
    first = make_store(tmp_path / "a.zarr", rows(4), spec())
    same, other = make_store(tmp_path / "b.zarr", rows(4), spec()), make_store(tmp_path / "c.zarr", rows(5), spec())
    assert store_input(first.path).sha256 == store_input(same.path).sha256 != store_input(other.path).sha256


def test_means_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    write_mean(tmp_path / "m.safetensors", tensors, {"norm": 2.5, "policy": "P"})
    assert read_facts(tmp_path / "m.safetensors") == {"norm": 2.5, "policy": "P"}
    assert all(torch.equal(value, tensors[name]) for name, value in read_tensors(tmp_path / "m.safetensors").items())


def test_what_is_not_a_mean(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="no such file"):
        read_facts(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="is not a mean gradient; make one with cropi-grad --mean"):
        read_facts(tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text(json.dumps({"no": 1}))
    with pytest.raises(InputError, match="does not open as safetensors"):
        read_facts(tmp_path / "text.safetensors")
