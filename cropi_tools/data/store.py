"""The gradient store: one row a prompt, in Zarr, with an index in JSON lines. The only module that knows zarr.

    X.zarr/vector          (rows, d)  unit rows; float16 for sketches, float32 for raw gradients
    X.zarr/sketch_norm     (rows,)    float32 norm of each row before scaling
    X.zarr/gradient_norm   (rows,)    float32 exact norm of the whole gradient
    X.zarr/inner/NAME      (rows,)    float32 inner product with the mean gradient NAME
    X.zarr/index.jsonl     one line a prompt, in input order: id, source, status, row (null without a gradient), pass rate, drift ...
    X.zarr/manifest.json   written last

Unscaled float16 underflows, hence unit rows with a norm. While rows are computed, their scalars stand in the index, which only grows;
the scalar arrays are written at the end. Unwritten rows read as NaN, and readers refuse NaN.

A store whose `projection` is None holds inner products alone (forward mode): no vector, no norms. Readers stream the index and the
rows; only prompt ids are ever held for a whole store, while shards are compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from cropi_tools.data.jsonl import Record, dump_line
from cropi_tools.data.jsonl_output import open_cut
from cropi_tools.data.manifest import FOLDER_MANIFEST, Input, file_digest, folder_digest, read_manifest, refuse_newer
from cropi_tools.data.metadata import COUNT, checked
from cropi_tools.data.output import Output
from cropi_tools.data.records import STORE_INDEX
from cropi_tools.data.store_chunks import CHECKSUMS, Chunks, read_checksums, write_checksums
from cropi_tools.data.store_shapes import ATTRIBUTES, REMEDY, check_live, numbered_entries
from cropi_tools.runtime.errors import CropiError, InputError, first_line

CHUNK_BYTES = 8 << 20
CHUNK_ROWS = 64
SCHEMA = 1


class StoreWriter:
    """Fills a store inside an opened `Output` folder, resuming after its last commit.

    capacity: rows at most (a bound; the store is cut to the rows written). dim: coordinates of a row. attributes: the projection,
    layout, policy and objective, and for each mean its norm and hash under `against`. With projection None the store has no vectors:
    dim counts for nothing, and live prompts come by `add_scalars`.
    """

    def __init__(self, output: Output, capacity: int, dim: int, attributes: Mapping[str, Any]) -> None:
        self._output = output
        self._dim = dim
        self._means = list(attributes["against"])
        projection = attributes["projection"]
        dtype = np.dtype(np.float32 if projection and projection["method"] == "none" else np.float16)
        self.chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (dim * dtype.itemsize))) if projection else CHUNK_ROWS
        state = output.state
        if not state:
            self._group = zarr.create_group(
                store=str(output.part), overwrite=False, attributes={"schema": SCHEMA, **attributes}
            )
            if projection:
                _array(self._group, "vector", (capacity, dim), (self.chunk_rows, dim), dtype)
        else:
            for torn in output.part.rglob("*.partial"):  # zarr renames what it has written whole; a kill came before
                torn.unlink()
            state = output.resumed({"records": COUNT, "rows": COUNT, "bytes": COUNT})
            with _opening(output.part, "remove it to start again"):
                self._group = zarr.open_group(str(output.part), mode="r+")
                if projection:
                    array = _checked_array(self._group, "vector", 2, (dtype.name,), (capacity, dim))
                    laid_out = Chunks(output.part, array)
                    if not laid_out.direct or laid_out.file_bytes == laid_out.chunk_bytes:
                        raise ValueError("vector has another layout than is written here")
        self._vector: Any = self._group["vector"] if projection else None
        self.records: int = state.get("records", 0)
        self.rows: int = state.get("rows", 0)
        self._committed_rows = self.rows
        self._index = open_cut(output.part / STORE_INDEX, state.get("bytes", 0), output.part)
        self._buffer: list[NDArray[Any]] = []

    def add(self, entry: Record, row: NDArray[np.float32] | None) -> None:
        """Add one prompt: its index entry and, if it has a gradient, its vector (float32 [dim], not yet scaled).

        The entry of a prompt with a vector must hold `gradient_norm`, and `inner` {name: value} for every mean; it may hold `halves`.
        """
        if row is None:
            self._write({**entry, "row": None})
            return
        norm = float(np.linalg.norm(row.astype(np.float64)))
        unit = row / np.float32(norm) if norm > 0 else row
        self._buffer.append(unit.astype(self._vector.dtype))
        self._write({**entry, "row": self.rows, "sketch_norm": norm})
        self.rows += 1

    def add_scalars(self, entry: Record) -> None:
        """Add one live prompt to a store without vectors: its entry holds `inner`; its gradient has no known norm."""
        self._write({**entry, "row": self.rows, "gradient_norm": None})
        self.rows += 1

    def _write(self, entry: Record) -> None:
        self._index.write(dump_line(entry) + "\n")
        self.records += 1

    @property
    def chunk_full(self) -> bool:
        """Whether a commit now would end on a whole chunk."""
        return self.rows > self._committed_rows and self.rows % self.chunk_rows == 0

    def commit(self, counters: Mapping[str, Any]) -> None:
        """Make everything added durable: rows first, then the index, then the word that they count."""
        if self._buffer:
            self._vector[self.rows - len(self._buffer) : self.rows] = np.stack(self._buffer)
            self._buffer = []
        self._committed_rows = self.rows
        self._index.flush()
        os.fsync(self._index.fileno())
        self._output.commit(
            {"records": self.records, "rows": self.rows, "bytes": self._index.tell(), "counters": dict(counters)}
        )

    def finish(self, counters: Mapping[str, Any], **described: Any) -> None:
        """Write the scalar columns and give the store its name."""
        self.commit(counters)
        self._index.close()
        norms = [] if self._vector is None else ["sketch_norm", "gradient_norm"]
        columns = {name: np.empty(self.rows, np.float32) for name in [*norms, *(f"inner/{n}" for n in self._means)]}
        records = rows = 0
        for entry in numbered_entries(self._output.part / STORE_INDEX):
            records += 1
            if entry["row"] is not None and entry["row"] < self.rows:
                rows += 1
                check_live(entry, self._output.part, self._means)
                if not entry.keys() >= set(norms):
                    remedy = f"remove {self._output.part} to start again"
                    raise InputError(f"{self._output.part}: the entry of prompt '{entry['id']}' has no norms; {remedy}")
                for name, values in columns.items():
                    mean = name.removeprefix("inner/")
                    values[entry["row"]] = entry[name] if mean == name else entry["inner"][mean]
        if (records, rows) != (self.records, self.rows):
            raise InputError(f"{self._output.part / STORE_INDEX}: is not what was written; remove {self._output.part}")
        if self._vector is not None:
            self._vector.resize((self.rows, self._dim))
        for name, values in columns.items():
            self._column(name, values)
        part = self._output.part
        write_checksums(part)
        described_by = [str(path.relative_to(part)) for path in part.rglob("zarr.json")]
        self._output.finish(rows=self.records, content=[STORE_INDEX, CHECKSUMS, *described_by], **described)

    def _column(self, name: str, values: NDArray[np.float32]) -> None:
        if name in self._group:
            del self._group[name]
        array = _array(self._group, name, (len(values),), (max(len(values), 1),), np.dtype(np.float32))
        if len(values):
            array[:] = values


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype) -> Any:
    # float16 barely compresses (8-10 %) and compression costs four times the reading time
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=np.nan,
        compressors=[Crc32cCodec()],  # no compression: a checksum behind each chunk, as Zarr has it
        config={"write_empty_chunks": True},
    )


class Store:
    """A finished store, opened for reading: `prompts` in its index, `rows` of them live.

    seen: ids and the store they are in, to check and to add to. InputError: no store, unfinished, its parts do not fit together, or a
    prompt is there twice.
    """

    def __init__(self, path: str | Path, seen: dict[str, Path] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{path}: no such store")
        manifest = read_manifest(self.path)
        if manifest is None:
            raise InputError(
                f"{path}: has no {FOLDER_MANIFEST}, so it is unfinished or not a store; run the command that writes it again"
            )
        self.manifest = manifest
        checksums = self._unchanged_checksums()
        with _opening(self.path, "make it again"):
            self._group: Any = zarr.open_group(str(self.path), mode="r")
            self.attributes: dict[str, Any] = dict(self._group.attrs)
        refuse_newer(self.attributes, self.path)
        checked(self.attributes, ATTRIBUTES, f"{path}: its attributes are damaged", REMEDY)
        self._chunks = self._open_rows(checksums.get("vector")) if self.attributes["projection"] else None
        self.prompts, self.rows = self._survey({} if seen is None else seen)
        if self.prompts != manifest["rows"] or self.rows != self._length():
            raise InputError(
                f"{path}: index has {self.prompts} prompts and {self.rows} rows, expected {manifest['rows']} and "
                f"{self._length()}; the store is damaged, make it again"
            )

    def _open_rows(self, checksums: list[str] | None) -> Chunks:
        projection = self.attributes["projection"]
        with _opening(self.path, "make it again"):
            array = _checked_array(self._group, "vector", 2, ("float16", "float32", "float64"))
            found = Chunks(self.path, array, checksums)
        if found.dim != projection["dim"]:
            raise InputError(f"{self.path}: its rows have {found.dim} coordinates, not {projection['dim']}; {REMEDY}")
        if checksums is not None and len(checksums) != found.count:
            raise InputError(
                f"{self.path / CHECKSUMS}: has {len(checksums)} checksums for {found.count} chunks; {REMEDY}"
            )
        return found

    def _unchanged_checksums(self) -> dict[str, list[str]]:
        """The checksums of the chunks by array, empty of a store without. InputError: they or the metadata are not what the manifest says."""
        for name, made in self.manifest["outputs"].items():
            if name == STORE_INDEX:
                continue  # hashed where it is an input, and by a check of the whole store
            if not (self.path / name).is_file():
                raise InputError(f"{self.path / name}: is missing; the store is damaged, make it again")
            if file_digest(self.path / name) != made["sha256"]:
                raise InputError(f"{self.path / name}: was changed since the store was made; make the store again")
        return read_checksums(self.path) or {}

    def _survey(self, seen: dict[str, Path]) -> tuple[int, int]:
        """Prompts and rows by the index, its rows checked to be numbered in order and its ids to be new."""
        prompts = rows = 0
        for entry in numbered_entries(self.path / STORE_INDEX):
            identity = entry["id"]
            if identity in seen:
                raise InputError(f"{self.path}: prompt '{identity}' is in {seen[identity]} too; rows must be unique")
            seen[identity] = self.path
            prompts += 1
            rows += entry["row"] is not None
        return prompts, rows

    def _length(self) -> int:
        """The rows of the arrays; of a store without any array, those of the index."""
        if self._chunks is not None:
            return self._chunks.rows
        return next((self._column_array(f"inner/{name}").shape[0] for name in self.attributes["against"]), self.rows)

    def entries(self) -> Iterator[Record]:
        """The index, streamed: one entry a prompt, in input order; `row` of those with a gradient counts up from 0."""
        return numbered_entries(self.path / STORE_INDEX)

    @property
    def has_vectors(self) -> bool:
        """Whether there are rows beside the scalars."""
        return self._chunks is not None

    @property
    def chunks(self) -> Chunks:
        """The rows as they lie on disk. InputError: a store of forward mode, which has none."""
        if self._chunks is None:
            raise InputError(
                f"{self.path}: was made by forward mode and holds inner products alone, no gradients or sketches; "
                "make a store with cropi-grad without --method jvp"
            )
        return self._chunks

    @property
    def dim(self) -> int:
        """Coordinates of a row. InputError as `chunks`."""
        return self.chunks.dim

    def column(self, name: str) -> NDArray[np.float32]:
        """A scalar column, float32 [rows]: sketch_norm, gradient_norm or inner/NAME. NaN is an InputError with the prompt's id."""
        if name.endswith("_norm") and not self.has_vectors:
            raise InputError(
                f"{self.path}: was made by forward mode and holds no norms: score it with --similarity dot, or give the norms of "
                "another store of the same prompts with --norms"
            )
        array = self._column_array(name)
        if array.shape[0] != self.rows:  # before room is made for them
            raise InputError(
                f"{self.path / name}: has {array.shape[0]} rows, expected {self.rows}; make the store again"
            )
        with _opening(self.path, REMEDY, f"column {name} does not read"):
            values = np.asarray(array[:])
        self.refuse_not_finite(values, 0, name)
        return values

    def _column_array(self, name: str) -> Any:
        with _opening(self.path, REMEDY, f"column {name} does not read"):
            return _checked_array(self._group, name, 1, ("float32",))

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (first row, unit rows float32 [n, dim]), a chunk at a time. NaN or infinity is an InputError with the prompt's id."""
        if not self.rows:
            return
        chunks = self.chunks
        buffer = chunks.buffer()
        for number in range(chunks.count):
            block = chunks.read(number, buffer).astype(np.float32)
            start = number * chunks.chunk_rows
            # one sum a row, since a row of length one cannot overflow it, and NaN or infinity stays in it
            with np.errstate(invalid="ignore"):  # infinity less infinity, say
                sums = block.sum(axis=1)
            self.refuse_not_finite(sums, start, "vector")
            yield start, block

    def refuse_not_finite(self, values: NDArray[Any], start: int, what: str) -> None:
        """InputError with the id of the first row whose number is not finite; values: one number a row, from row `start`."""
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InputError(
                f"{self.path}: {what} of prompt '{self.prompt_of(start + int(bad[0]))}' is not finite or was never written; "
                "make the store again"
            )

    def prompt_of(self, row: int) -> str:
        """The id of the prompt a row belongs to, looked up in the index; for messages."""
        return str(next(entry["id"] for entry in self.entries() if entry["row"] == row))


@contextlib.contextmanager
def _opening(store: Path, remedy: str, what: str = "does not open as a gradient store") -> Iterator[None]:
    """Around zarr's reading of a store's metadata and columns. InputError: whatever it raised; damaged metadata can make it any exception."""
    try:
        yield
    except CropiError:
        raise
    except Exception as error:
        raise InputError(f"{store}: {what} ({first_line(error)[:200]}); {remedy}") from None


def _checked_array(
    group: Any, name: str, dimensions: int, formats: Sequence[str], shape: tuple[int, ...] | None = None
) -> Any:
    """An array of a store. ValueError: it is a group, has another shape or number format, or chunks of nothing."""
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name} is no array")
    if len(array.shape) != dimensions or shape not in (None, array.shape):
        raise ValueError(f"{name} has the shape {list(array.shape)}")
    if array.dtype.name not in formats or min(array.chunks, default=0) < 1:
        raise ValueError(f"{name} has the number format {array.dtype} in chunks of {list(array.chunks)}")
    return array


def store_input(path: str | Path) -> Input:
    """A store as an input: by its index and what its manifest says of its making, not by its gigabytes."""
    store = Path(path)
    manifest = read_manifest(store) if store.is_dir() else None
    if manifest is None:
        Store(store)  # says what is wrong
        raise AssertionError("unreachable: a store without a manifest does not open")
    made = folder_digest({"fingerprint": str(manifest["fingerprint"]), STORE_INDEX: file_digest(store / STORE_INDEX)})
    return Input(str(path), made)


def open_stores(paths: Sequence[str | Path]) -> list[Store]:
    """Open several stores (shards) as one set of rows. InputError: they differ in projection, policy or objective, or share a prompt."""
    seen: dict[str, Path] = {}
    stores = []
    for path in paths:
        stores.append(Store(path, seen))
        same_kind(stores[0], stores[-1])
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
