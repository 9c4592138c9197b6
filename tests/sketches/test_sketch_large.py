"""The sketches of ten million coordinates against float64 sums over index tables, for every type of gradient."""

from __future__ import annotations

import os
from collections.abc import Callable

import naive_sketch
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cropi_tools.sketches import countsketch_numba
from cropi_tools.sketches.projection import sketch_vector
from cropi_tools.sketches.spec import Layout, ProjectionSpec

SIZE, NAME, SEED = 10_000_019, "model.layers.0.mlp.up_proj.weight", 12
LAYOUT = Layout(((NAME, (SIZE,)),))
ITEM_STEP, WORD_STEP = np.uint64(naive_sketch.ITEM_STEP), np.uint64(naive_sketch.WORD_STEP)

Words = NDArray[np.uint64]
Twin = Callable[[NDArray[np.float64]], NDArray[np.float64]]

needs_compiler = pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT", "0") != "0", reason="too many coordinates for uncompiled kernels"
)


def mix64(z: Words) -> Words:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keys(count: int) -> Words:
    start = np.uint64(naive_sketch.tensor_key(SEED, NAME))
    return mix64(start + np.arange(1, count + 1, dtype=np.uint64) * ITEM_STEP)


def words(of: Words, count: int) -> Words:
    """[n, count]"""
    return mix64(of[:, None] + np.arange(1, count + 1, dtype=np.uint64) * WORD_STEP)


def signs(of: Words, count: int) -> NDArray[np.float64]:
    """[n, count], in the order of the bits."""
    bits = np.unpackbits(words(of, count // 64).view(np.uint8), axis=1, bitorder="little")
    return 1 - 2.0 * bits


def countsketch(dim: int) -> Twin:
    segment = 2048
    segments = keys(-(-SIZE // segment))
    shifts = ((segments >> np.uint64(32)) * np.uint64(dim)) >> np.uint64(32)
    places = ((shifts[:, None] + np.arange(segment, dtype=np.uint64)) % np.uint64(dim)).reshape(-1)[:SIZE]
    table = signs(segments, segment).reshape(-1)[:SIZE]
    return lambda values: np.bincount(places.astype(np.int64), table * values, dim)


def sjlt(dim: int) -> Twin:
    draws = words(keys(SIZE), 2).view(np.uint32).reshape(SIZE, 4)  # the low half of each word first

    def project(values: NDArray[np.float64]) -> NDArray[np.float64]:
        result = []
        for draw in draws.T:
            places = (draw & np.uint32(2**31 - 1)).astype(np.int64) * (dim // 4) >> 31
            result.append(np.bincount(places, np.where(draw >> 31, -values, values), dim // 4))
        return np.concatenate(result) / 2

    return project


def sparse(dim: int, keep: float, entries: Callable[[Words], NDArray[np.float64]]) -> Twin:
    of = keys(SIZE)
    kept = np.flatnonzero(of < np.uint64(int(keep * 2**64)))
    matrix = entries(of[kept])
    return lambda values: values[kept] @ matrix / np.sqrt(keep * dim)


def gaussian(of: Words, dim: int) -> NDArray[np.float64]:
    return naive_sketch.quantiles()[words(of, dim // 4).view(np.uint16)]


@needs_compiler
@pytest.mark.parametrize(
    ("method", "dim", "keep"),
    [("countsketch", 32768, None), ("sjlt", 32768, None), ("sparse-jl", 512, 2e-4), ("sparse-gaussian", 512, 2e-4)],
)
def test_ten_million_coordinates_of_every_type(
    method: str, dim: int, keep: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if keep is None:
        twin = (countsketch if method == "countsketch" else sjlt)(dim)
    else:
        twin = sparse(dim, keep, lambda of: signs(of, dim) if method == "sparse-jl" else gaussian(of, dim))
    spec = ProjectionSpec.create(method, LAYOUT, dim, SEED, keep)
    gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)) * 1e-3
    for kind in (torch.float32, torch.bfloat16, torch.float16):  # 5 % of the last are subnormal
        values = gradient.to(kind)
        expected = twin(values.to(torch.float64).numpy())
        if kind != torch.float32:  # the build without threads, quicker to compile; test_threads.py says it is the same
            monkeypatch.setattr(countsketch_numba, "PARALLEL_FROM", 2**62)
        found = sketch_vector(spec, LAYOUT, {NAME: values})
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 1e-6, (kind, error)
