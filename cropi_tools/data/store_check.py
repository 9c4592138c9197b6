"""Whether a store is whole: everything in it read once, and everything that is there twice compared.

What opening a store checks for every reader (a manifest, an index in order, counts that agree) comes first; then the hash of the index,
every chunk file, every row and every scalar. The first thing found wrong ends the check.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cropi_tools.data.jsonl import Record
from cropi_tools.data.manifest import file_digest
from cropi_tools.data.records import STORE_INDEX
from cropi_tools.data.store import Store
from cropi_tools.data.store_chunks import checksums_of, read_checksums
from cropi_tools.data.store_shapes import check_live
from cropi_tools.runtime.errors import InputError

# What a row's length may miss 1 by: half a unit in the last of float16's 11 digits, or of float32's 24, in every coordinate.
UNIT_ERROR = {2: 1e-3, 4: 1e-5, 8: 1e-5}
ROUNDING = 1e-3  # by which an inner product may pass the product of the norms


def check_store(path: str | Path) -> dict[str, Any]:
    """Read all of a store. InputError: the first thing wrong, with the file or the prompt; else a summary.

    The summary: `prompts`, `live` (those with a gradient), `by_status` (counts), `projection` (its method, or null), `dim` (null without
    vectors), `sets` (names of the means its inner products are with), `halves` (whether it holds half against half), `checksums` (whether
    its chunks have some: a store made before there were is compared with itself alone), `bytes` on disk.
    """
    store = Store(path)
    described = store.manifest["outputs"].get(STORE_INDEX, {})
    checksums = read_checksums(store.path)
    if described.get("sha256") != file_digest(store.path / STORE_INDEX):
        raise InputError(f"{store.path / STORE_INDEX}: was changed since the store was made; make the store again")
    against: Mapping[str, Mapping[str, Any]] = store.attributes["against"]
    norms = ("sketch_norm", "gradient_norm") if store.has_vectors else ()
    columns = {name: store.column(name) for name in (*norms, *(f"inner/{name}" for name in against))}
    for name in columns:
        _check_checksums(store, name, checksums)
    statuses: Counter[str] = Counter()
    for entry in store.entries():
        statuses[str(entry["status"])] += 1
        if (entry["row"] is None) == (entry["status"] == "ok"):
            _damaged(store, entry, f"has status {entry['status']} and row {entry['row']}")
        if entry["row"] is not None:
            check_live(entry, store.path, against)
            _check_scalars(store, entry, columns, against)
    if store.has_vectors:
        _check_vectors(store, columns["sketch_norm"])
        _check_checksums(store, "vector", checksums)
    return {
        "prompts": store.prompts,
        "live": store.rows,
        "by_status": dict(sorted(statuses.items())),
        "projection": store.attributes["projection"]["method"] if store.has_vectors else None,
        "dim": store.dim if store.has_vectors else None,
        "sets": sorted(against),
        "halves": _has_halves(against),
        "checksums": checksums is not None,
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
    }


def _check_checksums(store: Store, name: str, checksums: Mapping[str, list[str]] | None) -> None:
    """An array's chunks agree with their own checksums and are the ones that were written."""
    if checksums is not None and checksums_of(store.path / name) != checksums.get(name, []):
        raise InputError(f"{store.path / name}: is not what was written there; the store is damaged, make it again")


def _check_scalars(
    store: Store,
    entry: Record,
    columns: Mapping[str, NDArray[np.float32]],
    against: Mapping[str, Mapping[str, Any]],
) -> None:
    """The columns hold what the index says, norms are positive, and no inner product is larger than its norms allow."""
    for name, values in columns.items():
        key = name.removeprefix("inner/")
        said = entry.get(name) if name == key else (entry.get("inner") or {}).get(key)
        found = float(values[entry["row"]])
        if not _is_finite(said) or not math.isclose(np.float32(said), found, rel_tol=1e-6):
            _damaged(store, entry, f"has {name} {found} in the column, {said} in the index")
    # a sparse sketch may miss all that a gradient has, but what has no gradient has no row
    if store.has_vectors and not (entry["gradient_norm"] > 0 and entry["sketch_norm"] >= 0):
        _damaged(store, entry, f"has norms {entry['gradient_norm']} and {entry['sketch_norm']}")
    for name, mean in against.items():
        _check_bound(store, entry, name, entry["inner"][name], entry["gradient_norm"], mean["norm"])
    halves = entry.get("halves")
    if (halves is not None) != _has_halves(against) or len(halves or (0, 0)) != 2:
        _damaged(store, entry, f"has {len(halves or ())} halves, the store {2 * _has_halves(against)}")
    for place, half in enumerate(halves or ()):
        for name, mean in against.items() if half is not None else ():
            inner, norm = half.get("inner", {}).get(name), half.get("gradient_norm")
            if not _is_finite(inner) or not (norm is None or (_is_finite(norm) and norm > 0)):
                _damaged(store, entry, f"has inner/{name} {inner} and norm {norm} in half {place + 1}")
            _check_bound(store, entry, f"{name}, half {place + 1}", inner, norm, mean["halves"][place])
            groups, count = half.get("groups", {}).get(name), mean["groups"][place] if "groups" in mean else None
            if (None if groups is None else len(groups)) != count or not all(map(_is_finite, groups or ())):
                _damaged(store, entry, f"has not {count} numbers for the groups of {name} in half {place + 1}")


def _has_halves(against: Mapping[str, Mapping[str, Any]]) -> bool:
    return bool(against) and all("halves" in mean for mean in against.values())


def _check_bound(store: Store, entry: Record, what: str, inner: float, norm: float | None, mean: float) -> None:
    if norm is not None and abs(inner) > norm * mean * (1 + ROUNDING):
        _damaged(store, entry, f"has an inner product of {inner} ({what}) between vectors of norm {norm} and {mean}")


def _check_vectors(store: Store, norms: NDArray[np.float32]) -> None:
    """Every chunk file is there and whole, and every row is finite and of length one (zero, if its sketch is zero)."""
    chunks = store.chunks
    for number in range(chunks.count if chunks.direct else 0):
        file = chunks.path(number)
        size = file.stat().st_size if file.is_file() else None
        if size != chunks.file_bytes:
            found = "is missing" if size is None else f"has {size} bytes, expected {chunks.file_bytes}"
            raise InputError(f"{file}: {found}; the store is damaged, make it again")
    for start, block in store.blocks():
        # in float64: the squares of a raw gradient's many coordinates add up to less than one otherwise
        length = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64))
        wanted = norms[start : start + len(block)] > 0
        bad = np.flatnonzero(np.abs(length - wanted) > UNIT_ERROR[chunks.dtype.itemsize])
        if len(bad):
            raise InputError(
                f"{store.path}: the row of prompt '{store.prompt_of(start + int(bad[0]))}' has length {length[bad[0]]:.6g}, expected "
                f"{int(wanted[bad[0]])}; the store is damaged, make it again"
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _damaged(store: Store, entry: Record, what: str) -> None:
    raise InputError(f"{store.path}: prompt '{entry['id']}' {what}; the store is damaged, make it again")
