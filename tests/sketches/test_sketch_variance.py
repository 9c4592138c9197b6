"""The inner products of sketches against the mean and variance of theory, and which coordinates are kept."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from numpy.typing import NDArray

from cropi_tools.sketches.projection import Sketcher, project_rows
from cropi_tools.sketches.spec import Layout, ProjectionSpec

needs_compiler = pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT", "0") != "0", reason="too many sketches for uncompiled kernels"
)

SIDE = 96


def matrices(kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two unit vectors, [2 * SIDE, SIDE] flattened, of cosine about one half, of a kind that gradients are."""
    generator = np.random.default_rng(7)
    shape = (2 * SIDE, SIDE)
    if kind == "gaussian":
        first, other = generator.standard_normal((2, *shape))
    elif kind == "student t":
        first, other = generator.standard_t(2.5, (2, *shape))
    elif kind == "lognormal":
        first, other = generator.lognormal(0, 2, (2, *shape)) * generator.choice([-1, 1], (2, *shape))
    elif kind == "hot channels":
        scales = np.ones(SIDE)
        scales[[5, 37, 80]] = 60
        first, other = generator.standard_normal((2, *shape)) * scales
    else:
        rows, columns = generator.standard_normal((2, shape[0])), generator.standard_normal((2, shape[1]))
        columns[:, 11] *= 30
        first, other = rows[0][:, None] * columns[0], rows[1][:, None] * columns[1]
    g = first.reshape(-1) / np.linalg.norm(first)
    v = 0.5 * g + math.sqrt(0.75) * other.reshape(-1) / np.linalg.norm(other)
    return g, v / np.linalg.norm(v)


KINDS = ["gaussian", "student t", "lognormal", "hot channels", "rank one"]


@needs_compiler
@pytest.mark.parametrize(
    ("method", "dim", "keep", "seeds"),
    [
        ("countsketch", 64, None, 2500),
        ("countsketch", 512, None, 3000),
        ("sjlt", 64, None, 1500),
        ("sparse-jl", 64, 0.2, 2000),
        ("sparse-gaussian", 64, 0.05, 1500),
    ],
)
def test_inner_products_have_the_variance_of_theory(method: str, dim: int, keep: float | None, seeds: int) -> None:
    """Mean within 4 standard errors of the true inner product, variance within a quarter of the formula."""
    layout = Layout((("up", (SIDE, SIDE)), ("down", (SIDE, SIDE))))
    pairs = [matrices(kind) for kind in KINDS]
    rows = np.concatenate([np.stack(pair) for pair in pairs]).astype(np.float32)
    products = np.empty((seeds, len(KINDS)))
    for seed in range(seeds):
        sketches = project_rows(ProjectionSpec.create(method, layout, dim, seed, keep), layout, rows).astype(float)
        products[seed] = (sketches[0::2] * sketches[1::2]).sum(axis=1)
    for (g, v), kind, found in zip(pairs, KINDS, products.T, strict=True):
        cosine, shared = float(g @ v), float(np.sum(g**2 * v**2))
        kept = (1 / keep - 1) * shared if keep else 0.0
        entries = 2 * kept if method == "sparse-gaussian" else -2 * shared
        variance = (1 + cosine**2 + entries) / dim + kept
        assert abs(found.mean() - cosine) < 4 * math.sqrt(variance / seeds), kind
        assert 0.8 < found.var() / variance < 1.25, (kind, found.var() / variance)


def chi_square(counts: NDArray[np.float64], sizes: NDArray[np.float64], keep: float) -> float:
    return float(np.sum((counts - keep * sizes) ** 2 / (keep * (1 - keep) * sizes)))


@needs_compiler
def test_kept_coordinates_are_spread_over_all_parameters() -> None:
    """By tensor, and by block within each tensor; keeping only the first coordinates fails."""
    layout = Layout((("embed", (100, 60)), ("norm", (400,)), ("up", (50, 80)), ("down", (80, 50)), ("bias", (200,))))
    keep, block = 0.15, 200
    spec = ProjectionSpec.create("sparse-jl", layout, 64, seed=1, keep=keep)
    kept = np.zeros(layout.size)
    sketcher = Sketcher(spec, layout)
    for name, place in layout.places.items():
        for offset in range(place.stop - place.start):
            unit = np.zeros(place.stop - place.start, np.float32)
            unit[offset] = 1
            sketcher.begin()
            sketcher.add(name, unit)
            norm = float(np.square(sketcher.finish()).sum())
            assert norm == pytest.approx(0) or norm == pytest.approx(1 / keep)
            kept[place.start + offset] = norm > 0
    first = (np.arange(layout.size) < keep * layout.size).astype(float)
    sizes = np.array([place.stop - place.start for place in layout.places.values()], float)
    for groups in (sizes, np.full(layout.size // block, float(block))):  # tensors are whole numbers of blocks
        edges = np.concatenate([[0], np.cumsum(groups)[:-1]]).astype(int)
        bound = len(groups) + 4 * math.sqrt(2 * len(groups))
        assert chi_square(np.add.reduceat(kept, edges), groups, keep) < bound
        assert chi_square(np.add.reduceat(first, edges), groups, keep) > 10 * bound
