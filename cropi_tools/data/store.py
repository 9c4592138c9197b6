"""The gradient store: one row a prompt, in Zarr, with an index in JSON lines. The only module that knows zarr.

    X.zarr/vector          (rows, d)  unit rows; float16 for sketches, float32 for raw gradients
    X.zarr/sketch_norm     (rows,)    float32 norm of each row before scaling
    X.zarr/gradient_norm   (rows,)    float32 exact norm of the whole gradient
    X.zarr/inner/NAME      (rows,)    float32 inner product with the mean gradient NAME
    X.zarr/index.jsonl     one line a prompt, in input order: id, source, status, row (null without a gradient), pass rate, drift ...
    X.zarr/manifest.json   written last

Unscaled float16 underflows, hence unit rows with a norm. While rows are computed, their scalars stand in the index, which only grows;
the scalar arrays are written at the end. Unwritten rows read as NaN, and readers refuse NaN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from cropi_tools.data.errors import InputError
from cropi_tools.data.jsonl import Record, dump_line, read_jsonl
from cropi_tools.data.manifest import FOLDER_MANIFEST, Input, file_digest, folder_digest, read_manifest
from cropi_tools.data.output import Output

CHUNK_BYTES = 8 << 20
CHUNK_ROWS = 64
INDEX = "index.jsonl"
SCHEMA = 1


class StoreWriter:
    """Fills a store inside an opened `Output` folder, resuming after its last commit.

    capacity: rows at most (a bound; the store is cut to the rows written). attributes: the projection, layout, policy and
    objective, and for each mean its norm and hash under `against`.
    """

    def __init__(self, output: Output, capacity: int, dim: int, attributes: Mapping[str, Any]) -> None:
        self._output = output
        self._dim = dim
        self._means = list(attributes["against"])
        dtype = np.dtype(np.float32 if attributes["projection"]["method"] == "none" else np.float16)
        self.chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (dim * dtype.itemsize)))
        state = output.state
        if not state:
            self._group = zarr.create_group(
                store=str(output.part), overwrite=False, attributes={"schema": SCHEMA, **attributes}
            )
            self._vector: Any = _array(self._group, "vector", (capacity, dim), (self.chunk_rows, dim), dtype)
        else:
            for torn in output.part.rglob("*.partial"):  # zarr renames what it has written whole; a kill came before
                torn.unlink()
            self._group = zarr.open_group(str(output.part), mode="r+")
            self._vector = self._group["vector"]
        self.records: int = state.get("records", 0)
        self.rows: int = state.get("rows", 0)
        self._index = open(output.part / INDEX, "a", encoding="utf-8")
        self._index.truncate(state.get("bytes", 0))
        self._index.seek(0, os.SEEK_END)
        self._buffer: list[np.ndarray] = []

    def add(self, entry: Record, row: np.ndarray | None) -> None:
        """Add one prompt: its index entry and, if it has a gradient, its vector (float32 [dim], not yet scaled).

        The entry of a prompt with a vector must hold `gradient_norm` and may hold `inner` {name: value}.
        """
        if row is None:
            entry = {**entry, "row": None}
        else:
            norm = float(np.linalg.norm(row.astype(np.float64)))
            unit = row / np.float32(norm) if norm > 0 else row
            entry = {**entry, "row": self.rows, "sketch_norm": norm}
            self._buffer.append(unit.astype(self._vector.dtype))
            self.rows += 1
        self._index.write(dump_line(entry) + "\n")
        self.records += 1

    @property
    def chunk_full(self) -> bool:
        """Whether a commit now would end on a whole chunk."""
        return len(self._buffer) > 0 and self.rows % self.chunk_rows == 0

    def commit(self, counters: Mapping[str, Any]) -> None:
        """Make everything added durable: rows first, then the index, then the word that they count."""
        if self._buffer:
            self._vector[self.rows - len(self._buffer) : self.rows] = np.stack(self._buffer)
            self._buffer = []
        self._index.flush()
        os.fsync(self._index.fileno())
        self._output.commit(
            {"records": self.records, "rows": self.rows, "bytes": self._index.tell(), "counters": dict(counters)}
        )

    def finish(self, counters: Mapping[str, Any], **described: Any) -> None:
        """Write the scalar columns and give the store its name."""
        self.commit(counters)
        self._index.close()
        live = [entry for _, entry in read_jsonl(self._output.part / INDEX) if entry["row"] is not None]
        self._vector.resize((self.rows, self._dim))
        self._column("sketch_norm", [entry["sketch_norm"] for entry in live])
        self._column("gradient_norm", [entry["gradient_norm"] for entry in live])
        for name in self._means:
            self._column(f"inner/{name}", [entry["inner"][name] for entry in live])
        self._output.finish(rows=self.records, content=[INDEX], **described)

    def _column(self, name: str, values: Sequence[float]) -> None:
        if name in self._group:
            del self._group[name]
        array = _array(self._group, name, (len(values),), (max(len(values), 1),), np.dtype(np.float32))
        if values:
            array[:] = np.array(values, dtype=np.float32)


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype) -> Any:
    # float16 barely compresses (8-10 %) and compression costs four times the reading time
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=np.nan,
        compressors=None,
        config={"write_empty_chunks": True},
    )


class Store:
    """A finished store, opened for reading. InputError: no store, unfinished, or its parts do not fit together."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{path}: no such store")
        self.manifest = read_manifest(self.path)
        if self.manifest is None:
            raise InputError(
                f"{path}: has no {FOLDER_MANIFEST}, so it is unfinished or not a store; run the command that writes it again"
            )
        try:
            self._group: Any = zarr.open_group(str(self.path), mode="r")
            self._vector = cast(Any, self._group["vector"])
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise InputError(f"{path}: does not open as a gradient store ({error}); make it again") from None
        self.attributes: dict[str, Any] = dict(self._group.attrs)
        self.index: list[Record] = [entry for _, entry in read_jsonl(self.path / INDEX)]
        self.live: list[Record] = [entry for entry in self.index if entry["row"] is not None]
        if len(self.index) != self.manifest["rows"] or len(self.live) != self._vector.shape[0]:
            raise InputError(
                f"{path}: index has {len(self.index)} prompts and {len(self.live)} rows, expected {self.manifest['rows']} and "
                f"{self._vector.shape[0]}; the store is damaged, make it again"
            )

    @property
    def dim(self) -> int:
        return self._vector.shape[1]

    def column(self, name: str) -> np.ndarray:
        """A scalar column, float32 [rows]: sketch_norm, gradient_norm or inner/NAME. NaN is an InputError with the prompt's id."""
        try:
            values = np.asarray(self._group[name][:])
        except (KeyError, FileNotFoundError, ValueError) as error:
            raise InputError(
                f"{self.path}: column {name} does not read ({error}); the store is damaged, make it again"
            ) from None
        self._refuse_nan(values[:, None], 0, name)
        return values

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, unit rows float32 [n, dim]), a chunk at a time. NaN or infinity is an InputError with the prompt's id."""
        step = self._vector.chunks[0]
        for start in range(0, self._vector.shape[0], step):
            try:
                block = np.asarray(self._vector[start : start + step]).astype(np.float32)
            except (ValueError, OSError, FileNotFoundError) as error:
                raise InputError(
                    f"{self.path}: rows from {start} do not read ({error}); the store is damaged, make it again"
                ) from None
            self._refuse_nan(block, start, "vector")
            yield start, block

    def _refuse_nan(self, block: np.ndarray, start: int, what: str) -> None:
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            identity = self.live[start + int(bad[0])]["id"]
            raise InputError(
                f"{self.path}: {what} of prompt '{identity}' is not finite or was never written; make the store again"
            )


def store_input(path: str | Path) -> Input:
    """A store as an input: by its index and what its manifest says of its making, not by its gigabytes."""
    store = Path(path)
    manifest = read_manifest(store) if store.is_dir() else None
    if manifest is None:
        Store(store)  # says what is wrong
        raise AssertionError("unreachable: a store without a manifest does not open")
    made = folder_digest({"fingerprint": str(manifest["fingerprint"]), INDEX: file_digest(store / INDEX)})
    return Input(str(path), made)


def open_stores(paths: Sequence[str | Path]) -> list[Store]:
    """Open several stores (shards) as one set of rows. InputError: they differ in projection, policy or objective, or share a prompt."""
    stores = [Store(path) for path in paths]
    seen: dict[str, Path] = {}
    for store in stores:
        same_kind(stores[0], store)
        for entry in store.index:
            if entry["id"] in seen:
                raise InputError(
                    f"{store.path}: prompt '{entry['id']}' is in {seen[entry['id']]} too; rows must be unique"
                )
            seen[entry["id"]] = store.path
    return stores


def same_kind(first: Store, second: Store) -> None:
    """InputError that names the difference when the rows of two stores cannot be compared."""
    for key, what in (("projection", "projections"), ("policy", "policies"), ("objective", "objectives")):
        mine, other = first.attributes.get(key), second.attributes.get(key)
        if mine != other:
            raise InputError(
                f"{first.path} and {second.path} have different {what}: {_difference(mine, other)}; they do not mix"
            )


def _difference(first: Any, second: Any) -> str:
    if isinstance(first, dict) and isinstance(second, dict):
        names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        return ", ".join(f"{name} {_brief(first.get(name))} against {_brief(second.get(name))}" for name in names)
    return f"{_brief(first)} against {_brief(second)}"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
