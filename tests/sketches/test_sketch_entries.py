"""The entries of sparse-gaussian, the tails of sjlt, and where the variances of the sketches differ."""

from __future__ import annotations

import hashlib
import math

import naive_sketch
import numpy as np
import pytest
from numpy.typing import NDArray

from cropi_tools.sketches.projection import project_rows
from cropi_tools.sketches.sparse_numba import normal_table
from cropi_tools.sketches.spec import Layout, ProjectionSpec

LAYOUT = Layout((("w", (8,)),))


def products(method: str, keep: float | None, dim: int, pairs: NDArray[np.float64], seeds: int) -> NDArray[np.float64]:
    """The sketched inner products [seeds, pairs] of the unit vectors `pairs` [pairs, 2, 8]."""
    rows = pairs.reshape(-1, LAYOUT.size).astype(np.float32)
    found = np.empty((seeds, len(pairs)))
    for seed in range(seeds):
        sketches = project_rows(ProjectionSpec.create(method, LAYOUT, dim, seed, keep), LAYOUT, rows).astype(float)
        found[seed] = (sketches[0::2] * sketches[1::2]).sum(axis=1)
    return found


def test_the_table_is_of_normal_quantiles() -> None:
    table = normal_table()
    assert table.shape == (2**16,)
    assert np.array_equal(table, naive_sketch.quantiles().astype(np.float32))
    # Changing a bit of it needs a new version of the projection.
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()[:16] == "8babbcaf96568f10"
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) > 0).all()


def test_how_gaussian_the_entries_are() -> None:
    """The figures of the definition and of docs/method.md."""
    entries = normal_table().astype(np.float64)
    assert (entries**2).mean() == pytest.approx(1, abs=1e-8)
    assert (entries**4).mean() == pytest.approx(2.9992, abs=1e-4)
    assert (entries**6).mean() == pytest.approx(15, rel=0.003)
    assert 4.324 < entries.max() < 4.325


def test_entries_are_independent_and_all_used() -> None:
    """Those of one coordinate over its rows, from a sketch of a single coordinate with value one."""
    dim = 2**18
    layout = Layout((("a", (1,)), ("b", (1,))))
    spec = ProjectionSpec.create("sparse-gaussian", layout, dim, keep=1.0)
    first, second = project_rows(spec, layout, np.eye(2, dtype=np.float32)).astype(np.float64) * math.sqrt(dim)
    positions = np.searchsorted(normal_table(), first.astype(np.float32) - 1e-6)
    counts = np.bincount(positions // 256, minlength=256)[:256]
    expected = dim / 256
    assert np.sum((counts - expected) ** 2 / expected) < 255 + 4 * math.sqrt(2 * 255)
    bound = 4 / math.sqrt(dim)
    for lag in range(1, 9):  # within a word of four and across words
        assert abs((first[lag:] * first[:-lag]).mean()) < bound
    assert abs((first * second).mean()) < bound
    for values in (first, second):
        assert abs(values.mean()) < bound
        assert (values**2).mean() == pytest.approx(1, abs=4 * math.sqrt(2 / dim))


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_variance_of_peaked_vectors(keep: float) -> None:
    """Few coordinates share all the weight: here the variance with Gaussians is far from the one with signs."""
    same = np.zeros(8)
    same[:2] = math.sqrt(0.5)
    tilted = np.array([0.9, 0, 0, 0, math.sqrt(0.19), 0, 0, 0])
    pairs = np.stack([[same, same], [same, tilted]])
    dim, seeds = 64, 2500
    cosines, shared = (pairs[:, 0] * pairs[:, 1]).sum(1), (pairs[:, 0] ** 2 * pairs[:, 1] ** 2).sum(1)
    kept = (1 / keep - 1) * shared
    signs = (1 + cosines**2 - 2 * shared) / dim + kept
    gaussian = (1 + cosines**2 + 2 * kept) / dim + kept
    for method, variance in (("sparse-jl", signs), ("sparse-gaussian", gaussian)):
        found = products(method, keep, dim, pairs, seeds)
        assert (abs(found.mean(0) - cosines) < 4 * np.sqrt(variance / seeds)).all(), method
        assert (abs(found.var(0) / variance - 1) < 0.15).all(), (method, found.var(0) / variance)
    if keep == 1:
        assert (gaussian > 1.5 * signs).all()  # so that the bound tells the two apart


def test_more_places_thin_the_tails() -> None:
    """Two coordinates with all the weight: a countsketch is right or off by one, an sjlt off by quarters."""
    vector = np.zeros(8)
    vector[:2] = math.sqrt(0.5)
    pairs = np.stack([[vector, vector]])
    dim, seeds = 64, 2500
    variance = (1 + 1 - 2 * 0.5) / dim
    layout = Layout((("a", (1,)), ("b", (1,))))  # two segments: within one no two coordinates of a countsketch collide
    rows = np.full((1, 2), math.sqrt(0.5), np.float32)
    single = np.array(
        [
            np.square(project_rows(ProjectionSpec.create("countsketch", layout, dim, seed), layout, rows)).sum()
            for seed in range(seeds)
        ]
    )
    several = products("sjlt", None, dim, pairs, seeds)[:, 0]
    for found in (single, several):
        assert abs(found.mean() - 1) < 4 * math.sqrt(variance / seeds)
        assert 0.7 < found.var() / variance < 1.3
    assert set(np.round(4 * single).astype(int)) == {0, 4, 8}
    assert {3, 4, 5} <= set(np.round(4 * several).astype(int)) <= {1, 2, 3, 4, 5, 6, 7}
    assert np.mean((several - 1) ** 4) < 0.15 * np.mean((single - 1) ** 4)


def test_an_sjlt_goes_to_each_quarter_once() -> None:
    dim = 256
    spec = ProjectionSpec.create("sjlt", LAYOUT, dim, seed=3)
    sketches = project_rows(spec, LAYOUT, np.eye(LAYOUT.size, dtype=np.float32))
    assert ((sketches != 0).reshape(LAYOUT.size, 4, dim // 4).sum(-1) == 1).all()
    assert set(abs(sketches[sketches != 0]).tolist()) == {0.5}
    assert (sketches < 0).any()
