"""The fast products of rows with vectors against float64 matrix products of what was stored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gradient_stores import make_store, spec, unseal

from cropi_tools.data import store as store_room
from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError
from cropi_tools.scores import row_products as room
from cropi_tools.scores.row_products import row_products
from cropi_tools.scores.row_products_numba import few_products, widen


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """45 rows of 1088 coordinates in chunks of 8, small blocks, and no plain way for small stores."""
    monkeypatch.setattr(store_room, "CHUNK_ROWS", 8)
    monkeypatch.setattr(room, "BLOCK_BYTES", 3 * 8 * 1088 * 2)
    monkeypatch.setattr(room, "PLAIN_BELOW", 0)
    draw = np.random.default_rng(0)
    return make_store(tmp_path / "s.zarr", list(draw.normal(size=(45, 1088)).astype(np.float32)), spec(dim=1088))


def stored(store: Store) -> np.ndarray:
    return np.concatenate([block for _, block in store.blocks()]).astype(np.float64)


@pytest.mark.parametrize("sets", [1, 2, 5, 6, 15, 16, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_equal_float64(store: Store, sets: int, threads: int) -> None:
    vectors = np.random.default_rng(1).normal(size=(sets, 1088)).astype(np.float32)
    found = list(row_products(store, vectors, threads))
    assert [start for start, _ in found] == [0, 24]
    products = np.concatenate([block for _, block in found])
    assert products.dtype == np.float32
    np.testing.assert_allclose(products, stored(store) @ vectors.T.astype(np.float64), atol=1e-5)


def test_the_plain_way_of_small_stores(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(1).normal(size=(6, 1088)).astype(np.float32)
    fast = np.concatenate([block for _, block in row_products(store, vectors)])
    monkeypatch.setattr(room, "PLAIN_BELOW", 1 << 60)
    plain = np.concatenate([block for _, block in row_products(store, vectors)])
    np.testing.assert_allclose(fast, plain, atol=2e-6)


def test_raw_rows_in_float32(tmp_path: Path) -> None:
    projection = spec("none")
    draw = np.random.default_rng(0)
    made = make_store(tmp_path / "r.zarr", list(draw.normal(size=(9, projection.dim)).astype(np.float32)), projection)
    vectors = draw.normal(size=(2, projection.dim)).astype(np.float32)
    ((_, found),) = row_products(made, vectors)
    np.testing.assert_allclose(found, stored(made) @ vectors.T, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sets", [3, 20])
def test_what_is_not_finite_is_named(store: Store, value: float, sets: int) -> None:
    import zarr

    zarr.open_group(str(store.path), mode="r+")["vector"][29, 1087] = value  # type: ignore[index]
    store = unseal(store.path)
    vectors = np.ones((sets, 1088), np.float32)
    with pytest.raises(InputError, match="vector of prompt 'p29' is not finite"):
        list(row_products(store, vectors))


def test_a_lost_chunk_is_named(store: Store) -> None:
    store.chunks.path(3).unlink()
    with pytest.raises(InputError, match="vector of prompt 'p24' is not finite or was never written"):
        list(row_products(store, np.ones((2, 1088), np.float32)))


def test_reading_may_stop_early(store: Store) -> None:
    """As a stopped command does: no thread goes on."""
    found = row_products(store, np.ones((2, 1088), np.float32), threads=2)
    next(found)
    found.close()


def test_widening_is_exact_for_every_float16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    found = np.empty(1 << 16, np.float32)
    widen(bits, found)
    expected = bits.view(np.float16).astype(np.float32)
    assert (np.isnan(found) == np.isnan(expected)).all()
    numbers = ~np.isnan(expected)
    assert (found.view(np.uint32)[numbers] == expected.view(np.uint32)[numbers]).all()


@pytest.mark.parametrize(
    ("rows", "dim", "sets"), [(1, 1, 1), (2, 8191, 2), (3, 8192, 3), (4, 8193, 4), (6, 5, 5), (7, 16399, 6)]
)
def test_kernel_at_odd_sizes(rows: int, dim: int, sets: int) -> None:
    draw = np.random.default_rng(rows)
    given = draw.normal(size=(rows, dim)).astype(np.float16)
    vectors = draw.normal(size=(sets, dim)).astype(np.float32)
    out = np.full((rows, sets), np.nan, np.float32)
    few_products(given.view(np.uint16), vectors, out)
    np.testing.assert_allclose(out, given.astype(np.float64) @ vectors.T.astype(np.float64), atol=2e-3, rtol=1e-5)


def test_kernels_run_uncompiled() -> None:
    """As coverage runs them."""
    code = (
        "import numpy as np; from cropi_tools.scores.row_products_numba import few_products;"
        "rows = np.arange(12, dtype=np.float16).reshape(3, 4) / 8; out = np.empty((3, 1), np.float32);"
        "few_products(rows.view(np.uint16), np.ones((1, 4), np.float32), out);"
        "assert (out[:, 0] == rows.sum(1)).all()"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, check=True)
