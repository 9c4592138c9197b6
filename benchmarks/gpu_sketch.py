"""How near the countsketch on a GPU comes to reading the gradient at all.

One run, on a gradient whose tensors have the shapes of Qwen2.5-1.5B's. Medians; rates are the bytes of the gradient a second.

* copy: a device copy of one flat tensor of the same bytes. It reads and writes, and both are counted: the goal is a share of it.
* sum: torch's sum of that tensor, a plain read.
* countsketch: all that the device does for `add` of every tensor by the Triton kernel, the host's part hidden behind other work.
* torch: the same by torch operations.
* Sketcher: `begin`, `add` of every tensor and `finish`, by the clock on the wall, with nothing else to hide behind, by the kernels that
  its trial on this device chose.
* products: squared norm and inner products with two float32 means of every tensor, by the Triton kernel; the means' bytes are counted too.
* torch products: the same, a call of torch each.
* index_add: the same kind of sketch as it is usually written in torch, a precomputed bucket and sign a coordinate, on a part.

On a CPU (`--device cpu`), where there is no Triton, the torch operations stand in its place; that shows that the script runs, and no more.

    python benchmarks/gpu_sketch.py                         # a table: float32 and bfloat16, 32768 and 65536 dimensions
    python benchmarks/gpu_sketch.py --json                  # one object a goal
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from statistics import median
from types import ModuleType

import numpy as np
import torch
from goals import Goal, print_json, print_lines, processor

from cropi_tools.sketches import countsketch_torch
from cropi_tools.sketches.device import DeviceCountsketch, device_kernels
from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec

GOAL_COPY, GOAL_INDEX_ADD = 0.7, 5.0
PART = 1 << 26  # coordinates of the index_add: its tables take twelve bytes for each
HEAD_START = 200_000_000  # cycles the device is kept busy with nothing, while the host prepares what is timed
EMBEDDING = ("embedding", (151936, 1536))
LAYER: list[tuple[str, tuple[int, ...]]] = [
    ("q", (1536, 1536)),
    ("q.bias", (1536,)),
    ("k", (256, 1536)),
    ("k.bias", (256,)),
    ("v", (256, 1536)),
    ("v.bias", (256,)),
    ("o", (1536, 1536)),
    ("gate", (8960, 1536)),
    ("up", (8960, 1536)),
    ("down", (1536, 8960)),
    ("norm.1", (1536,)),
    ("norm.2", (1536,)),
]


def layout_of(size: int) -> Layout:
    """The embedding and as many layers as make about `size` coordinates; if these are fewer, a tensor of so many."""
    if size < math.prod(EMBEDDING[1]):
        return Layout((("part", (size,)),))
    of_layer = sum(math.prod(shape) for _, shape in LAYER)
    layers = max(1, round((size - math.prod(EMBEDDING[1])) / of_layer))
    return Layout((EMBEDDING, *((f"{number}.{name}", shape) for number in range(layers) for name, shape in LAYER)))


def device_seconds(device: torch.device, task: Callable[[], object], rounds: int) -> float:
    """The median time the device takes for a task, after three that are not counted; the task must not wait for the device."""
    if device.type == "cpu":
        return wall_seconds(device, task, rounds)
    found = []
    for count in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        start.record()
        task()
        end.record()
        torch.cuda.synchronize()
        if count >= 3:
            found.append(start.elapsed_time(end) / 1e3)
    return median(found)


def wall_seconds(device: torch.device, task: Callable[[], object], rounds: int) -> float:
    """The median time of a task that ends with the device idle, after three that are not counted."""
    found = []
    for count in range(rounds + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        task()
        if count >= 3:
            found.append(time.perf_counter() - start)
    return median(found)


class Rates:
    """Bytes a second on one device. triton: the kernels to measure, None on a CPU."""

    def __init__(self, device: torch.device, triton: ModuleType | None, layout: Layout, rounds: int) -> None:
        self._device, self._triton, self._layout = device, triton, layout
        self._seconds = partial(device_seconds, device, rounds=rounds)
        self._rounds = rounds

    def plain(self, kind: torch.dtype) -> dict[str, float]:
        """Of a copy, read and written, and of a sum."""
        flat = torch.randn(self._layout.size, device=self._device).to(kind)
        target = torch.empty_like(flat)
        return {
            "copy": 2 * flat.nbytes / self._seconds(lambda: target.copy_(flat)),
            "sum": flat.nbytes / self._seconds(lambda: flat.sum()),
        }

    def sketches(self, kind: torch.dtype, dim: int) -> dict[str, float]:
        """Of the gradient: the countsketch in both backends, the whole Sketcher, and index_add."""
        gradient = {name: torch.randn(shape, device=self._device).to(kind) for name, shape in self._layout.entries}
        keys = {name: np.uint64(number) for number, name in enumerate(gradient)}
        backends = {"torch": countsketch_torch, **({"countsketch": self._triton} if self._triton else {})}
        made = {
            name: DeviceCountsketch(kernels, keys, dim, min(2048, dim), self._device)
            for name, kernels in backends.items()
        }
        sketcher = Sketcher(ProjectionSpec.create("countsketch", self._layout, dim), self._layout)

        def added(sketch: DeviceCountsketch) -> None:
            for name, tensor in gradient.items():
                sketch.add(name, tensor)

        def whole() -> None:
            sketcher.begin()
            for name, tensor in gradient.items():
                sketcher.add(name, tensor)
            sketcher.finish()

        some = min(PART, self._layout.size)
        part = torch.randn(some, device=self._device).to(kind)
        buckets = torch.randint(dim, (some,), device=self._device)
        signs = torch.randint(2, (some,), device=self._device).float() * 2 - 1
        out = torch.zeros(dim, device=self._device)
        size = self._layout.size * kind.itemsize
        few = min(self._rounds, 5)
        return {
            **{name: size / self._seconds(partial(added, sketch)) for name, sketch in made.items()},
            "Sketcher": size / wall_seconds(self._device, whole, self._rounds),
            "index_add": part.nbytes
            / device_seconds(self._device, lambda: out.index_add_(0, buckets, signs * part), few),
        }

    def products(self, kind: torch.dtype) -> dict[str, float]:
        """Read, of the gradient and of two float32 means."""
        sizes = [math.prod(shape) for _, shape in self._layout.entries]
        gradient = [torch.randn(size, device=self._device).to(kind) for size in sizes]
        means = [[torch.randn(size, device=self._device) for size in sizes] for _ in range(2)]
        read = self._layout.size * (kind.itemsize + 8)

        def plainly(tensor: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
            wide = tensor.float()
            for other in (wide, *others):
                torch.dot(wide, other)

        def every(products: Callable[[torch.Tensor, Sequence[torch.Tensor]], object]) -> None:
            for tensor, *others in zip(gradient, *means, strict=True):
                products(tensor, others)

        ways = {"torch products": plainly, **({"products": self._triton.products} if self._triton else {})}
        return {name: read / self._seconds(partial(every, products)) for name, products in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="The countsketch on a GPU against a device copy and torch index_add.")
    parser.add_argument("--size", type=int, default=1_540_000_000, help="coordinates of the gradient, about")
    parser.add_argument("--dims", type=int, nargs="+", default=[32768, 65536], help="dimensions of the sketch")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each (default 20)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    triton = None
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("gpu_sketch.py: no CUDA device is available")
        if find_spec("triton") is None:
            sys.exit("gpu_sketch.py: Triton is not installed")
        from cropi_tools.sketches import countsketch_triton as triton

    device = torch.device("cuda", torch.cuda.current_device()) if triton else torch.device("cpu")
    layout = layout_of(options.size)
    measure = Rates(device, triton, layout, options.rounds)
    rates: dict[str, float] = {}
    goals = []
    chosen = {}
    for kind in (torch.float32, torch.bfloat16):
        label = str(kind).removeprefix("torch.")
        kernels = device_kernels(device, kind)
        chosen[label] = kernels.__name__.rpartition("_")[2] if kernels else "numba"
        plain = measure.plain(kind)
        rates.update({f"{name} {label}": rate for name, rate in (plain | measure.products(kind)).items()})
        for dim in options.dims:
            found = measure.sketches(kind, dim)
            rates.update({f"{name} {label} {dim}": rate for name, rate in found.items()})
            ours = found["countsketch" if triton else "torch"]
            goals += [
                Goal(f"gpu-sketch-to-copy-{label}-{dim}", ours / plain["copy"], GOAL_COPY, "a device copy, both ways"),
                Goal(
                    f"gpu-sketch-to-index-add-{label}-{dim}",
                    ours / found["index_add"],
                    GOAL_INDEX_ADD,
                    "torch.index_add",
                ),
            ]
    name = torch.cuda.get_device_name() if triton else processor()
    if options.json:
        print_json(goals, name, bytes_per_second=rates, kernels_chosen=chosen)
        return
    print(f"{layout.size} coordinates in {len(layout.entries)} tensors, {name}; kernels chosen: {chosen}")
    for label, rate in rates.items():
        print(f"{label:28} {rate / 1e9:9.1f} GB/s")
    print_lines(goals)


if __name__ == "__main__":
    main()
