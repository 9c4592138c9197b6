"""The sketches against golden values and a naive twin; `test_sketch_variance.py` holds them against theory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys

import naive_sketch
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.sketches.projection import Sketcher, fold, project_rows, sketch_vector
from cropi_tools.sketches.spec import Layout, ProjectionSpec

Tensors = dict[str, NDArray[np.float32]]

SHAPES = [("one", (1,)), ("head.weight", (63,)), ("scalar", ()), ("a", (2047,)), ("b", (2049,)), ("c", (3, 2048))]
LAYOUT = Layout(tuple(SHAPES))


def random_tensors(layout: Layout = LAYOUT, seed: int = 0) -> Tensors:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in layout.entries}


def whole_tensors(layout: Layout = LAYOUT) -> Tensors:
    """Small whole numbers, so that float32 sums are exact in any order."""
    return {
        name: ((np.arange(math.prod(shape)) * 7 + 3) % 31 - 15).reshape(shape).astype(np.float32)
        for name, shape in layout.entries
    }


def naive(spec: ProjectionSpec, tensors: Tensors) -> NDArray[np.float64]:
    if spec.method == "countsketch":
        assert spec.hash_dim is not None
        assert spec.segment is not None
        return naive_sketch.countsketch(tensors, spec.seed, spec.dim, spec.hash_dim, spec.segment)
    if spec.method == "sjlt":
        assert spec.nonzeros is not None
        return naive_sketch.sjlt(tensors, spec.seed, spec.dim, spec.nonzeros)
    assert spec.keep is not None
    sparse = naive_sketch.sparse_jl if spec.method == "sparse-jl" else naive_sketch.sparse_gaussian
    return sparse(tensors, spec.seed, spec.dim, spec.keep)


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float64] | NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


# The definition


def test_the_hash_is_splitmix64() -> None:
    # The published first outputs of SplitMix64 for the seeds 0 and 1234567.
    assert naive_sketch.mix64(naive_sketch.ITEM_STEP) == 0xE220A8397B1DCDAF
    assert naive_sketch.mix64(1234567 + naive_sketch.ITEM_STEP) == 6457827717110365317


def test_golden_keys() -> None:
    key = naive_sketch.tensor_key(0, "model.embed_tokens.weight")
    assert key == GOLDEN_TENSOR_KEY
    assert naive_sketch.item_key(key, 0) == GOLDEN_ITEM_KEY
    assert "".join("-" if naive_sketch.sign(naive_sketch.item_key(key, 0), j) < 0 else "+" for j in range(72)) == (
        GOLDEN_SIGNS
    )


@pytest.mark.parametrize(
    ("method", "dim", "seed", "keep"),
    [
        ("countsketch", 64, 0, None),
        ("countsketch", 4096, 1, None),
        ("countsketch", 65536, 2**63 - 1, None),
        ("sparse-jl", 64, 0, 0.25),
        ("sparse-jl", 256, 5, 1.0),
        ("sjlt", 64, 0, None),
        ("sjlt", 65536, 2**63 - 1, None),
        ("sparse-gaussian", 64, 0, 0.25),
        ("sparse-gaussian", 192, 5, 0.02),
    ],
)
def test_golden_sketches(method: str, dim: int, seed: int, keep: float | None) -> None:
    spec = ProjectionSpec.create(method, LAYOUT, dim, seed, keep)
    sketch = sketch_vector(spec, LAYOUT, whole_tensors())
    assert sketch.dtype == np.float32
    assert sketch.shape == (dim,)
    scale = math.sqrt(keep * dim) if keep else 2.0 if method == "sjlt" else 1.0
    start = [round(value * scale, 1 if method == "sparse-gaussian" else None) for value in sketch[:6].tolist()]
    digest = hashlib.sha256(sketch.astype("<f4").tobytes()).hexdigest()[:16]
    assert (start, digest) == GOLDEN_SKETCHES[method, dim, seed, keep]


def test_golden_layout_and_spec() -> None:
    layout = Layout.of(torch.nn.Linear(3, 2).named_parameters())
    assert layout.to_json() == [["weight", [2, 3]], ["bias", [2]]]
    assert layout.sha256 == hashlib.sha256(b'[["weight",[2,3]],["bias",[2]]]').hexdigest()
    spec = ProjectionSpec.create("countsketch", layout, 4096, seed=3).folded(1024)
    assert spec.to_json() == {
        "method": "countsketch",
        "dim": 1024,
        "seed": 3,
        "layout": layout.sha256,
        "segment": 2048,
        "hash_dim": 4096,
        "version": 1,
    }


# Against the naive twin


@pytest.mark.parametrize("dim", [64, 192, 1024, 2048, 8192])
def test_countsketch_equals_the_naive_twin(dim: int) -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, dim, seed=11)
    assert spec.segment == min(2048, dim)
    tensors = random_tensors()
    assert relative_error(sketch_vector(spec, LAYOUT, tensors), naive(spec, tensors)) < 1e-6


@pytest.mark.parametrize("size", [1, 31, 32, 33, 63, 64, 65, 255, 256, 257, 2047, 2048, 2049])
@pytest.mark.parametrize("dim", [64, 4096])
def test_every_length_of_a_last_segment(size: int, dim: int) -> None:
    layout = Layout((("w", (size,)),))
    spec = ProjectionSpec.create("countsketch", layout, dim)
    tensors = whole_tensors(layout)
    assert np.array_equal(sketch_vector(spec, layout, tensors), naive(spec, tensors))


@pytest.mark.parametrize("dim", [64, 192, 8192])
def test_sjlt_equals_the_naive_twin(dim: int) -> None:
    spec = ProjectionSpec.create("sjlt", LAYOUT, dim, seed=11)
    assert spec.to_json()["nonzeros"] == 4
    tensors = random_tensors()
    assert relative_error(sketch_vector(spec, LAYOUT, tensors), naive(spec, tensors)) < 1e-6
    exact = whole_tensors()
    assert np.array_equal(sketch_vector(spec, LAYOUT, exact), naive(spec, exact))


@pytest.mark.parametrize("method", ["sparse-jl", "sparse-gaussian"])
@pytest.mark.parametrize(("dim", "keep"), [(64, 0.1), (192, 0.02), (128, 1.0), (1088, 0.02), (64, 1e-9)])
def test_sparse_sketches_equal_the_naive_twin(method: str, dim: int, keep: float) -> None:
    layout = Layout((("a", (1,)), ("b", (40, 50)), ("c", (301,))))
    spec = ProjectionSpec.create(method, layout, dim, seed=4, keep=keep)
    tensors = random_tensors(layout)
    expected = naive(spec, tensors)
    found = sketch_vector(spec, layout, tensors)
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
    assert np.any(expected) == (keep > 1e-6)


def test_none_is_the_gradient_itself() -> None:
    spec = ProjectionSpec.create("none", LAYOUT)
    assert (spec.dim, spec.seed) == (LAYOUT.size, 0)
    tensors = random_tensors()
    backwards = dict(reversed(tensors.items()))
    expected = np.concatenate([tensors[name].reshape(-1) for name, _ in SHAPES])
    assert np.array_equal(sketch_vector(spec, LAYOUT, backwards), expected)


@pytest.mark.parametrize("dim", [64, 512, 2048, 4096])
def test_folding_equals_the_smaller_sketch(dim: int) -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, 8192, seed=9)
    folded = spec.folded(dim)
    assert (folded.dim, folded.segment, folded.hash_dim) == (dim, 2048, 8192)
    tensors = whole_tensors()
    expected = naive_sketch.countsketch(tensors, 9, dim, 8192, 2048)
    whole = sketch_vector(spec, LAYOUT, tensors)
    assert np.array_equal(fold(whole, dim), expected)
    assert np.array_equal(fold(np.stack([whole, -whole]), dim), np.stack([expected, -expected]))
    assert np.array_equal(sketch_vector(folded, LAYOUT, tensors), expected)
    assert spec.folded(4096).folded(64) == spec.folded(64)


SPECS = [
    ("countsketch", 1024, None),
    ("sjlt", 1024, None),
    ("sparse-jl", 128, 0.3),
    ("sparse-gaussian", 128, 0.1),
    ("none", None, None),
]


@pytest.mark.parametrize(("method", "dim", "keep"), SPECS)
def test_rows_of_a_raw_store(method: str, dim: int | None, keep: float | None) -> None:
    spec = ProjectionSpec.create(method, LAYOUT, dim, keep=keep)
    several = [random_tensors(seed=seed) for seed in range(3)]
    rows = np.stack([np.concatenate([part.reshape(-1) for part in tensors.values()]) for tensors in several])
    expected = np.stack([sketch_vector(spec, LAYOUT, tensors) for tensors in several])
    assert np.array_equal(project_rows(spec, LAYOUT, rows), expected)
    with pytest.raises(InputError, match="do not fit"):
        project_rows(spec, LAYOUT, rows[:, 1:])


# The same whatever the circumstances; the number of threads is in test_threads.py


@pytest.mark.parametrize(("method", "dim", "keep"), SPECS)
def test_order_and_repetition(method: str, dim: int | None, keep: float | None) -> None:
    spec = ProjectionSpec.create(method, LAYOUT, dim, keep=keep)
    tensors = random_tensors()
    sketcher = Sketcher(spec, LAYOUT)
    expected = sketch_vector(spec, LAYOUT, tensors)
    for _ in range(2):  # the second round shows that nothing of the first is left
        sketcher.begin()
        for name in reversed(tensors):
            sketcher.add(name, tensors[name])
        assert relative_error(sketcher.finish(), expected) < 1e-6
    kept = sketcher.finish()
    sketcher.add("c", tensors["c"])  # a second backward pass adds to the first
    once_more = sketch_vector(spec, LAYOUT, {"c": tensors["c"]})  # and what is never added is zero
    assert relative_error(sketcher.finish(), expected + once_more) < 1e-6
    assert relative_error(kept, expected) < 1e-6
    sketcher.begin()
    assert not sketcher.finish().any()


def test_keys_follow_names_not_places() -> None:
    swapped = Layout(tuple(reversed(SHAPES)))
    tensors = whole_tensors()
    for method, dim, keep in SPECS[:3]:  # in the others a sum of whole numbers is not exact, or places count
        here = sketch_vector(ProjectionSpec.create(method, LAYOUT, dim, keep=keep), LAYOUT, tensors)
        there = sketch_vector(ProjectionSpec.create(method, swapped, dim, keep=keep), swapped, tensors)
        assert np.array_equal(here, there)


@pytest.mark.parametrize(("method", "dim", "keep"), SPECS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_of_torch(method: str, dim: int | None, keep: float | None, kind: torch.dtype) -> None:
    spec = ProjectionSpec.create(method, LAYOUT, dim, keep=keep)
    tensors = {name: torch.from_numpy(value).to(kind).requires_grad_() for name, value in random_tensors().items()}
    upcast = {name: value.detach().to(torch.float32).numpy() for name, value in tensors.items()}
    assert np.array_equal(sketch_vector(spec, LAYOUT, tensors), sketch_vector(spec, LAYOUT, upcast))
    if kind in (torch.float16, torch.float64):
        of_numpy = {name: value.detach().numpy() for name, value in tensors.items()}
        assert np.array_equal(sketch_vector(spec, LAYOUT, of_numpy), sketch_vector(spec, LAYOUT, upcast))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["countsketch", "sjlt"])
def test_every_half_precision_number_is_read_exactly(method: str, kind: torch.dtype) -> None:
    """All patterns of 16 bits, subnormal ones too, in a sketch so wide that few share a place."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(kind)
    numbers = numbers[numbers.abs() < 2.0**120]  # no NaN, and no sum beyond float32
    layout = Layout((("w", (numbers.numel(),)),))
    spec = ProjectionSpec.create(method, layout, 2**20)
    expected = sketch_vector(spec, layout, {"w": numbers.to(torch.float64).numpy().astype(np.float32)})
    assert np.count_nonzero(expected) > 0.9 * numbers.count_nonzero()
    assert np.array_equal(sketch_vector(spec, layout, {"w": numbers}), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_order_does_not_matter(kind: torch.dtype) -> None:
    layout = Layout((("w", (70, 33)),))
    spec = ProjectionSpec.create("countsketch", layout, 128)
    stored = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(kind)
    expected = sketch_vector(spec, layout, {"w": stored.T.contiguous()})
    assert np.array_equal(sketch_vector(spec, layout, {"w": stored.T}), expected)
    values = stored.to(torch.float32).numpy().T
    assert np.array_equal(sketch_vector(spec, layout, {"w": values}), expected)
    assert np.array_equal(sketch_vector(spec, layout, {"w": values.astype(">f4")}), expected)
    assert np.array_equal(sketch_vector(spec, layout, {"w": np.repeat(values.reshape(-1), 2)[::2]}), expected)


PLAIN = """
import json, sys
import numpy as np
from cropi_tools.sketches.projection import sketch_vector
from cropi_tools.sketches.spec import Layout, ProjectionSpec
layout = Layout((("w", (333,)),))
gradient = np.arange(333) % 13 - 6
print(json.dumps([
    sketch_vector(
        ProjectionSpec.create(method, layout, 64, keep=keep), layout, {"w": gradient.astype(kind)}
    ).tolist()
    for method, keep in (("countsketch", None), ("sparse-jl", 0.25), ("sjlt", None), ("sparse-gaussian", 0.25))
    for kind in (np.float32, np.float16)
]))
"""


def test_the_uncompiled_kernels_agree() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", PLAIN],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    layout = Layout((("w", (333,)),))
    tensors = {"w": np.arange(333, dtype=np.float32) % 13 - 6}
    methods = (("countsketch", None), ("sparse-jl", 0.25), ("sjlt", None), ("sparse-gaussian", 0.25))
    compiled = [method for method in methods for _ in ("float32", "float16")]
    for found, (method, keep) in zip(json.loads(run.stdout), compiled, strict=True):
        spec = ProjectionSpec.create(method, layout, 64, keep=keep)
        assert np.array_equal(np.array(found, np.float32), sketch_vector(spec, layout, tensors))


# What is refused


@pytest.mark.parametrize(("method", "dim", "keep"), SPECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_hidden(
    method: str, dim: int | None, keep: float | None, value: float
) -> None:
    spec = ProjectionSpec.create(method, LAYOUT, dim, keep=keep)
    for place in (0, 1, 2, 3, 2046):
        tensors: dict[str, NDArray[np.float32] | torch.Tensor] = {**random_tensors()}
        broken = torch.from_numpy(random_tensors()["a"])
        broken[place] = value
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            tensors["a"] = broken.to(kind)
            with pytest.raises(InputError, match="not finite"):
                sketch_vector(spec, LAYOUT, tensors)


def test_tensors_that_do_not_fit() -> None:
    sketcher = Sketcher(ProjectionSpec.create("countsketch", LAYOUT, 64), LAYOUT)
    with pytest.raises(InputError, match="nowhere is not among"):
        sketcher.add("nowhere", np.zeros(3, np.float32))
    with pytest.raises(InputError, match="a has 2046 coordinates, 2047 expected"):
        sketcher.add("a", np.zeros(2046, np.float32))
    with pytest.raises(InputError, match="type int64"):
        sketcher.add("one", np.zeros(1, np.int64))
    with pytest.raises(InputError, match=r"type torch\.int64"):
        sketcher.add("one", torch.zeros(1, dtype=torch.int64))
    other = Layout((("one", (2,)),))
    with pytest.raises(InputError, match="made for other parameters"):
        Sketcher(sketcher.spec, other)


@pytest.mark.parametrize("dim", [0, 1, 63, 65, 100, -64, 2**31 + 64])
def test_dimensions_out_of_range(dim: int) -> None:
    for method, _, keep in SPECS[:4]:
        with pytest.raises(UsageError, match=f"dimension {dim} cannot"):
            ProjectionSpec.create(method, LAYOUT, dim, keep=keep)


def test_specs_that_make_no_sense() -> None:
    assert ProjectionSpec.create("countsketch", LAYOUT, 2**31).dim == 2**31
    for keep in (None, 0.0, -0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="sparse-jl keeps"):
            ProjectionSpec.create("sparse-jl", LAYOUT, 64, keep=keep)
        with pytest.raises(UsageError, match="sparse-gaussian keeps"):
            ProjectionSpec.create("sparse-gaussian", LAYOUT, 64, keep=keep)
    for method in ("countsketch", "sjlt", "none"):
        with pytest.raises(
            UsageError, match=f"keep belongs to sparse-jl and sparse-gaussian; leave it out for {method}"
        ):
            ProjectionSpec.create(method, LAYOUT, None if method == "none" else 64, keep=0.5)
    with pytest.raises(UsageError, match="nonzeros is 4 for sjlt"):
        ProjectionSpec("sjlt", 64, 0, LAYOUT.sha256, nonzeros=2)
    with pytest.raises(UsageError, match="left out for all else, not 4"):
        ProjectionSpec("sparse-jl", 64, 0, LAYOUT.sha256, keep=0.5, nonzeros=4)
    with pytest.raises(UsageError, match="unknown sketch 'jl'"):
        ProjectionSpec.create("jl", LAYOUT, 64)
    with pytest.raises(UsageError, match="needs a dimension"):
        ProjectionSpec.create("countsketch", LAYOUT)
    with pytest.raises(UsageError, match="leave the dimension out"):
        ProjectionSpec.create("none", LAYOUT, 64)
    for seed in (-1, 2**63):
        with pytest.raises(UsageError, match="seed"):
            ProjectionSpec.create("countsketch", LAYOUT, 64, seed=seed)
    spec = ProjectionSpec.create("countsketch", LAYOUT, 1024)
    with pytest.raises(UsageError, match="1024 dimensions cannot be folded to 192"):
        spec.folded(192)
    with pytest.raises(UsageError, match="cannot be folded to 2048"):
        fold(np.zeros((2, 1024), np.float32), 2048)
    with pytest.raises(UsageError, match="only a countsketch"):
        ProjectionSpec.create("sparse-jl", LAYOUT, 128, keep=0.5).folded(64)
    with pytest.raises(UsageError, match="only a countsketch can be folded, not sjlt"):
        ProjectionSpec.create("sjlt", LAYOUT, 128).folded(64)
    with pytest.raises(InputError, match="names a parameter twice"):
        Layout((("a", (1,)), ("a", (2,))))
    with pytest.raises(InputError, match="no coordinates"):
        Layout((("a", (0,)),))


@pytest.mark.parametrize(("method", "dim", "keep"), SPECS)
def test_json_round_trip(method: str, dim: int | None, keep: float | None) -> None:
    spec = ProjectionSpec.create(method, LAYOUT, dim, keep=keep)
    stored = json.loads(json.dumps([spec.to_json(), LAYOUT.to_json()]))
    assert ProjectionSpec.from_json(stored[0]) == spec
    assert Layout.from_json(stored[1]) == LAYOUT
    assert Layout.from_json(stored[1]).sha256 == LAYOUT.sha256
    for damaged in ({}, {**stored[0], "extra": 1}, {**stored[0], "version": 2}, {**stored[0], "method": "fjlt"}):
        with pytest.raises(InputError, match="projection spec"):
            ProjectionSpec.from_json(damaged)
    for not_a_layout in (3, [["a"]], [["a", 5]], [["a", ["x"]]]):
        with pytest.raises(InputError, match="layout"):
            Layout.from_json(not_a_layout)


def test_difference() -> None:
    spec = ProjectionSpec.create("sparse-jl", LAYOUT, 8192, seed=0, keep=0.1)
    assert spec.difference(ProjectionSpec.create("sparse-jl", LAYOUT, 8192, seed=0, keep=0.1)) is None
    other = ProjectionSpec.create("sparse-jl", LAYOUT, 4096, seed=1, keep=0.1)
    assert spec.difference(other) == "dim 8192 against 4096, seed 0 against 1"
    elsewhere = ProjectionSpec.create("sparse-jl", Layout((("a", (1,)),)), 8192, seed=0, keep=0.2)
    phrase = spec.difference(elsewhere)
    assert phrase is not None
    assert phrase.startswith(f"layout {LAYOUT.sha256[:12]} against ")
    assert phrase.endswith(", keep 0.1 against 0.2")
    wide, narrow = (ProjectionSpec.create("countsketch", LAYOUT, dim) for dim in (4096, 2048))
    assert wide.folded(2048).difference(narrow) == "hash_dim 4096 against 2048"


# What a second implementation must reproduce: changing any of it needs a new version of the projection.

GOLDEN_TENSOR_KEY = 0xF74186D77C6CF961
GOLDEN_ITEM_KEY = 0xF43ED3E2E9F9D06C
GOLDEN_SIGNS = "++-++---------+-+---+---++++-++-+++-+-+--+--++++-+++-+--++--+-+----+-+++"
GOLDEN_SKETCHES: dict[tuple[str, int, int, float | None], tuple[list[float], str]] = {
    ("countsketch", 64, 0, None): ([361, -8, 22, -85, 104, -18], "3abaa97ea026dc2a"),
    ("countsketch", 4096, 1, None): ([-3, 13, -18, 17, 13, 13], "960a0eea6db45698"),
    ("countsketch", 65536, 2**63 - 1, None): ([0, 0, 0, 0, 0, 0], "88ce31d5c01ee497"),
    ("sparse-jl", 64, 0, 0.25): ([584, -798, 12, 470, -404, -516], "fabeb6f1bbf45531"),
    ("sparse-jl", 256, 5, 1.0): ([652, -436, -1238, 846, -920, 2012], "c2e374fc145a6ee8"),
    ("sjlt", 64, 0, None): ([-236, -61, 172, -143, -234, -69], "038afecff2a22c94"),
    ("sjlt", 65536, 2**63 - 1, None): ([0, 0, 0, 6, 0, 12], "4a71ffcf1d23c476"),
    ("sparse-gaussian", 64, 0, 0.25): ([118.3, -223.1, -123.3, -528.7, -442.5, -540.8], "a08aae7839193718"),
    ("sparse-gaussian", 192, 5, 0.02): ([-221.4, 95.5, 158.1, -199.6, 41.6, 221.8], "3afc8a0c01172287"),
}
