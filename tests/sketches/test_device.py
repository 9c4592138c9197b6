"""The countsketch in torch operations, on tensors of the CPU, against the definition and against numba; where gradients on a GPU go."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import naive_sketch
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches import countsketch_numba, countsketch_torch, device, projection
from cropi_tools.sketches.device import DeviceCountsketch
from cropi_tools.sketches.projection import Sketcher, sketch_vector
from cropi_tools.sketches.spec import Layout, ProjectionSpec

SIZES = {"one": 1, "a": 63, "b": 2047, "none": 0, "c": 2048, "d": 6150, "e": 30_011}
LAYOUT = Layout(tuple((name, (size,)) for name, size in SIZES.items()))
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def gradients(kind: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator).to(kind) for name, size in SIZES.items()}


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device whose gradients stay where they are."""
    monkeypatch.setattr(projection, "device_kernels", lambda *_: countsketch_torch)


def test_the_hash_equals_the_compiled_one() -> None:
    states = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    expected = [naive_sketch.mix64(int(state)) for state in states]
    assert countsketch_torch.mix64(torch.from_numpy(states.view(np.int64))).numpy().view(np.uint64).tolist() == expected


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("group", [4096, countsketch_torch.GROUP])
@pytest.mark.parametrize("dim", [64, 192, 4096, 65536])
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_the_sketch_equals_the_definition(
    kind: torch.dtype, dim: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(countsketch_torch, "GROUP", group)
    given = gradients(kind)
    values = {name: tensor.float().numpy() for name, tensor in given.items()}
    expected = naive_sketch.countsketch(values, 5, dim, dim, min(2048, dim))
    found = sketch_vector(ProjectionSpec.create("countsketch", LAYOUT, dim, seed=5), LAYOUT, given)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_the_sketch_of_ten_million_equals_numba_and_repeats(kind: torch.dtype) -> None:
    size, dim, key = 10_000_019, 32768, np.uint64(2**64 - 12345)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(kind)
    expected = np.zeros((countsketch_numba.PARTIALS, dim + 2048), np.float32)
    countsketch_numba.countsketch_add(gradient.float().numpy().view(np.uint32), key, dim, 2048, expected)
    sketch = DeviceCountsketch(countsketch_torch, {"g": key}, dim, 2048, CPU)
    sketch.add("g", gradient)
    found = sketch.total()
    assert relative_error(found, expected.sum(0, dtype=np.float64)) < 1e-6
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    sketch.begin()
    sketch.add("g", gradient)
    torch.set_num_threads(threads)
    assert np.array_equal(sketch.total(), found)


@pytest.mark.parametrize(("size", "dim"), [(1, 64), (300_001, 64), (3_000_001, 8192), (500_000, 2**20)])
def test_segments_in_a_row_never_overlap_and_rows_are_full(size: int, dim: int) -> None:
    segment = min(2048, dim)
    plan = countsketch_torch.plan(77, size, dim, segment, CPU)
    assert len(plan.places) == -(-size // segment)
    assert len(plan.rows) == 1
    ordered = plan.places.sort().values
    row, start = ordered // (dim + segment), ordered % (dim + segment)
    assert (ordered.diff() >= segment).all()
    assert (start < dim).all()
    assert int(row.max()) == plan.rows[0] - 1
    # no fewer rows would do: so many segments do overlap somewhere
    reach = torch.zeros(dim + segment + 1, dtype=torch.int64)
    reach.index_add_(0, start, torch.ones_like(start)).index_add_(0, start + segment, -torch.ones_like(start))
    assert int(reach.cumsum(0).max()) == plan.rows[0]


@pytest.mark.usefixtures("torch_backend")
def test_folded_mixed_missing_doubled_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, 4096, seed=5).folded(256)
    found, wide = gradients(), gradients(torch.bfloat16, seed=1)
    calls = [
        ("e", found["e"]),
        ("a", wide["a"]),
        ("e", wide["e"]),
        ("d", found["d"].reshape(123, 50).T),
        ("b", found["b"].double()),
        ("c", torch.stack([found["c"], found["c"]], 1)[:, 0].requires_grad_()),
    ]

    def sketched(sketcher: Sketcher) -> NDArray[np.float32]:
        sketcher.begin()
        for name, gradient in calls:
            freed = gradient.clone()
            sketcher.add(name, freed)
            freed.detach().fill_(float("nan"))
        return sketcher.finish()

    on_device = Sketcher(spec, LAYOUT)
    on_device.add("one", found["one"])  # forgotten by the next begin
    result = sketched(on_device)
    assert np.array_equal(sketched(on_device), result)
    monkeypatch.setattr(projection, "device_kernels", lambda *_: None)
    assert relative_error(result, sketched(Sketcher(spec, LAYOUT))) < 1e-6


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    given = gradients()
    given["e"][-1] = bad
    with pytest.raises(InputError, match="not finite"):
        sketch_vector(ProjectionSpec.create("countsketch", LAYOUT, 192), LAYOUT, given)


@pytest.mark.usefixtures("torch_backend")
def test_other_methods_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ProjectionSpec.create("sparse-jl", LAYOUT, 128, keep=0.5)
    monkeypatch.setattr(countsketch_torch, "countsketch_add", None)
    expected = naive_sketch.sparse_jl({"a": gradients()["a"].numpy()}, 0, 128, 0.5)
    assert relative_error(sketch_vector(spec, LAYOUT, {"a": gradients()["a"]}), expected) < 1e-6


def test_what_sketches_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    device._triton.cache_clear()
    for kind in FLOATS:
        assert device.device_kernels(CPU, kind) is None
        assert device.device_kernels(GPU, kind) is countsketch_torch
        assert device.device_products(GPU, kind) is None
    device._triton.cache_clear()


def test_kernels_of_several_types_share_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels for one type failed their trial and those for another did not, a gradient is sketched by both."""
    other = ModuleType("other")
    other.__dict__.update(vars(countsketch_torch))
    by_type = {torch.float32: countsketch_torch, torch.bfloat16: other}
    spec, mixed = ProjectionSpec.create("countsketch", LAYOUT, 192, seed=5), gradients()
    mixed["a"] = mixed["a"].bfloat16()
    expected = sketch_vector(spec, LAYOUT, mixed)
    monkeypatch.setattr(projection, "device_kernels", lambda _, kind: by_type[kind])
    sketcher = Sketcher(spec, LAYOUT)
    for _ in range(2):
        sketcher.begin()
        for name, tensor in mixed.items():
            sketcher.add(name, tensor)
        assert relative_error(sketcher.finish(), expected) < 1e-6
