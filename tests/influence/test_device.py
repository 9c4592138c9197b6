"""What is laid out for a GPU, its kernels replaced by plain loops over the same arguments: the CPU's sketch results."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cropi_tools.influence import device, projection
from cropi_tools.influence.device import RUN, DeviceCountsketch, DeviceProducts
from cropi_tools.influence.projection import Layout, ProjectionSpec, Sketcher, sketch_vector

SIZES = {"one": 1, "a": 63, "b": 2047, "c": 2048, "d": 6150, "e": 70_000}
LAYOUT = Layout(tuple((name, (size,)) for name, size in SIZES.items()))


def at_address(anchor: torch.Tensor, runs: int, count: int) -> NDArray[np.float64]:
    """`count` runs of RUN coordinates of the anchor's type, `runs` runs behind the anchor."""
    width = anchor.element_size()
    place = anchor.data_ptr() + runs * RUN * width
    raw = ctypes.string_at(place, count * RUN * width)
    return torch.frombuffer(bytearray(raw), dtype=anchor.dtype).double().numpy()


class PlainKernels:
    """The two launches, cell by cell and segment by segment in float64."""

    PRODUCT_BLOCK = 1024

    @staticmethod
    def countsketch(
        anchor: torch.Tensor,
        addresses: torch.Tensor,
        lengths: torch.Tensor,
        shifts: torch.Tensor,
        words: torch.Tensor,
        signs: torch.Tensor,
        bounds: torch.Tensor,
        sums: torch.Tensor,
    ) -> None:
        parts, remainders, tiles, width = sums.shape
        bits = (signs.numpy().view(np.uint32)[:, None] >> np.arange(RUN, dtype=np.uint32)) & 1
        for cell in range(remainders * tiles):
            start = cell % tiles * (width // RUN)
            low, high = bounds[cell].tolist()
            for place in range(low, high):
                length, shift, word = int(lengths[place]), int(shifts[place]), int(words[place])
                first, last = max(start - shift, 0), min(start - shift + width // RUN, length)
                if first >= last:
                    assert length == 0 or shift + length <= start, "a segment was listed for a cell it does not reach"
                    continue
                values = at_address(anchor, int(addresses[place]) + first, last - first)
                signed = np.where(bits[word + first : word + last].reshape(-1) == 1, -values, values)
                part = (place - low) * parts // (high - low)
                at = (first + shift - start) * RUN
                sums[part, cell // tiles, cell % tiles, at : at + len(signed)] += torch.from_numpy(signed)

    @staticmethod
    def products(
        anchor: torch.Tensor,
        offsets: torch.Tensor,
        sizes: torch.Tensor,
        mean_anchor: torch.Tensor,
        mean_offsets: torch.Tensor,
        tensors: torch.Tensor,
        starts: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros(1 + len(mean_offsets), dtype=torch.float64)
        for tensor, start in zip(tensors.tolist(), starts.tolist(), strict=True):
            count = min(PlainKernels.PRODUCT_BLOCK // RUN, int(sizes[tensor]) - start)
            if count > 0:
                values = at_address(anchor, int(offsets[tensor]) + start, count)
                total[0] += np.dot(values, values)
                for mean, places in enumerate(mean_offsets):
                    total[mean + 1] += np.dot(values, at_address(mean_anchor, int(places[tensor]) + start, count))
        return total


def gradients(kind: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator).to(kind) for name, size in SIZES.items()}


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture
def plain_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device with kernels."""
    monkeypatch.setattr(projection, "triton_kernels", lambda _: PlainKernels)


@pytest.mark.parametrize("dim", [64, 192, 512, 2048, 8192])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_layout_gives_the_sketch(dim: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, dim, seed=5)
    expected = sketch_vector(spec, LAYOUT, gradients(kind))
    monkeypatch.setattr(projection, "triton_kernels", lambda _: PlainKernels)
    assert relative_error(sketch_vector(spec, LAYOUT, gradients(kind)), expected) < 1e-6


@pytest.mark.usefixtures("plain_device")
def test_folded_mixed_missing_and_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, 4096, seed=5).folded(256)
    found, wide = gradients(), gradients(torch.bfloat16, seed=1)
    calls = [
        ("e", found["e"]),
        ("a", wide["a"]),
        ("e", wide["e"]),
        ("d", found["d"].reshape(123, 50).T),
        ("b", found["b"].double()),
    ]

    def sketched(sketcher: Sketcher) -> NDArray[np.float32]:
        sketcher.begin()
        for name, gradient in calls:
            sketcher.add(name, gradient)
        return sketcher.finish()

    on_device = Sketcher(spec, LAYOUT)
    on_device.add("c", found["c"])  # forgotten by the next begin
    result = sketched(on_device)
    assert np.array_equal(sketched(on_device), result)
    monkeypatch.setattr(projection, "triton_kernels", lambda _: None)
    assert relative_error(result, sketched(Sketcher(spec, LAYOUT))) < 1e-6


def test_sums_are_never_wanting_for_programs() -> None:
    for dim in (64, 4096, 65536):
        keys = {"e": np.uint64(3)}
        sketch = DeviceCountsketch(PlainKernels, keys, {"e": 70_000}, dim, min(2048, dim), torch.device("cpu"))
        parts, remainders, tiles, _ = sketch._sums.shape
        assert parts * remainders * tiles >= device.PROGRAMS


@pytest.mark.parametrize("means", [0, 1, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_products(means: int, kind: torch.dtype) -> None:
    given = gradients(kind)
    against = [gradients(seed=7 + mean) for mean in range(means)]
    products = DeviceProducts(PlainKernels, SIZES, against, torch.device("cpu"))
    assert len(given.pop("b")) == 2047
    expected = [
        sum(float(gradient.double() @ other[name].double()) for name, gradient in given.items())
        for other in [{name: value.float() for name, value in given.items()}, *against]
    ]
    assert products.measure(given) == pytest.approx(expected, rel=1e-6)
    assert products.measure({}) == [0.0] * (1 + means)


def test_tensors_that_do_not_start_at_a_run_are_copied() -> None:
    base = torch.arange(1000.0)
    moved = device.aligned(base[3:900])
    assert moved.data_ptr() % 128 == 0
    assert device.aligned(moved) is moved
    assert moved.numel() % RUN == 0
    assert torch.equal(moved[:897], base[3:900])
    assert not moved[897:].any()


def test_no_kernels_on_a_cpu() -> None:
    assert device.triton_kernels(torch.device("cpu")) is None
