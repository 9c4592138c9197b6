"""How near the countsketch on a GPU comes to reading the gradient at all.

One run, on a gradient whose tensors have the shapes of Qwen2.5-1.5B's. Medians; rates are the bytes of the gradient a second.

* copy: a device copy of one flat tensor of the same bytes. It reads and writes, and both are counted: the goal is a share of it.
* sum: torch's sum of that tensor, a plain read.
* countsketch: all that the device does for `add` of every tensor by the Triton kernel, the host's part hidden behind other work.
* torch: the same by torch operations.
* Sketcher: `begin`, `add` of every tensor and `finish`, by the clock on the wall, with nothing else to hide behind.
* products: squared norm and inner products with two float32 means of every tensor; the means' bytes are counted too.
* index_add: the same kind of sketch as it is usually written in torch, a precomputed bucket and sign a coordinate, on a part.

    python benchmarks/gpu_sketch.py                         # a table: float32 and bfloat16, 32768 and 65536 dimensions
    python benchmarks/gpu_sketch.py --json                  # one object a goal
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch
from goals import Goal, print_json, print_lines

from cropi_tools.sketches import countsketch_torch
from cropi_tools.sketches import device as device_module
from cropi_tools.sketches.device import DeviceCountsketch, device_kernels, device_products
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
    """The embedding and as many layers as make about `size` coordinates."""
    of_layer = sum(math.prod(shape) for _, shape in LAYER)
    layers = max(1, round((size - math.prod(EMBEDDING[1])) / of_layer))
    return Layout((EMBEDDING, *((f"{number}.{name}", shape) for number in range(layers) for name, shape in LAYER)))


def device_seconds(task: Callable[[], object], rounds: int = 20) -> float:
    """The median time the device takes for a task, after three that are not counted; the task must not wait for the device."""
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


def wall_seconds(task: Callable[[], object], rounds: int = 20) -> float:
    """The median time of a task that ends with the device idle, after three that are not counted."""
    found = []
    for count in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        task()
        if count >= 3:
            found.append(time.perf_counter() - start)
    return median(found)


def plain_rates(size: int, kind: torch.dtype) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and of a sum."""
    flat = torch.randn(size, device="cuda").to(kind)
    target = torch.empty_like(flat)
    size_in_bytes = size * kind.itemsize
    return {
        "copy": 2 * size_in_bytes / device_seconds(lambda: target.copy_(flat)),
        "sum": size_in_bytes / device_seconds(lambda: flat.sum()),
    }


def sketch_rates(layout: Layout, kind: torch.dtype, dim: int) -> dict[str, float]:
    """Bytes of the gradient a second of the countsketch in both backends, of the whole Sketcher and of index_add."""
    gradient = {name: torch.randn(shape, device="cuda").to(kind) for name, shape in layout.entries}
    keys = {name: np.uint64(number) for number, name in enumerate(gradient)}
    device = torch.device("cuda", torch.cuda.current_device())
    sketches = {
        name: DeviceCountsketch(kernels, keys, dim, min(2048, dim), device)
        for name, kernels in (("countsketch", device_kernels(device)), ("torch", countsketch_torch))
        if kernels is not None
    }
    sketcher = Sketcher(ProjectionSpec.create("countsketch", layout, dim), layout)

    def added(sketch: DeviceCountsketch) -> None:
        for name, tensor in gradient.items():
            sketch.add(name, tensor)

    def whole() -> None:
        sketcher.begin()
        for name, tensor in gradient.items():
            sketcher.add(name, tensor)
        sketcher.finish()

    part = torch.randn(PART, device="cuda").to(kind)
    buckets = torch.randint(dim, (PART,), device="cuda")
    signs = torch.randint(2, (PART,), device="cuda").float() * 2 - 1
    out = torch.zeros(dim, device="cuda")
    size_in_bytes = layout.size * kind.itemsize
    return {
        **{name: size_in_bytes / device_seconds(partial(added, sketch)) for name, sketch in sketches.items()},
        "Sketcher": size_in_bytes / wall_seconds(whole),
        "index_add": PART * kind.itemsize / device_seconds(lambda: out.index_add_(0, buckets, signs * part), 5),
    }


def products_rate(layout: Layout, kind: torch.dtype) -> float:
    """Bytes read a second, of the gradient and of two float32 means."""
    sizes = [math.prod(shape) for _, shape in layout.entries]
    gradient = [torch.randn(size, device="cuda").to(kind) for size in sizes]
    means = [[torch.randn(size, device="cuda") for size in sizes] for _ in range(2)]
    products = device_products(gradient[0].device)
    assert products is not None

    def every() -> None:
        for tensor, *others in zip(gradient, *means, strict=True):
            products(tensor, others)

    return layout.size * (kind.itemsize + 8) / device_seconds(every)


def main() -> None:
    device_module.ENABLED = True
    parser = argparse.ArgumentParser(description="The countsketch on a GPU against a device copy and torch index_add.")
    parser.add_argument("--size", type=int, default=1_540_000_000, help="coordinates of the gradient, about")
    parser.add_argument("--dims", type=int, nargs="+", default=[32768, 65536], help="dimensions of the sketch")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_sketch.py: no CUDA device is available")
    if find_spec("triton") is None:
        sys.exit("gpu_sketch.py: Triton is not installed")

    layout = layout_of(options.size)
    device = torch.cuda.get_device_name()
    rates: dict[str, float] = {}
    goals = []
    for kind in (torch.float32, torch.bfloat16):
        label = str(kind).removeprefix("torch.")
        plain = plain_rates(layout.size, kind)
        rates.update({f"{name} {label}": rate for name, rate in plain.items()})
        rates[f"products {label}"] = products_rate(layout, kind)
        for dim in options.dims:
            found = sketch_rates(layout, kind, dim)
            rates.update({f"{name} {label} {dim}": rate for name, rate in found.items()})
            ours = found["countsketch"]
            goals += [
                Goal(f"gpu-sketch-to-copy-{label}-{dim}", ours / plain["copy"], GOAL_COPY, "a device copy, both ways"),
                Goal(
                    f"gpu-sketch-to-index-add-{label}-{dim}",
                    ours / found["index_add"],
                    GOAL_INDEX_ADD,
                    "torch.index_add",
                ),
            ]
    if options.json:
        print_json(goals, device)
        return
    print(f"{layout.size} coordinates in {len(layout.entries)} tensors, {device}")
    for name, rate in rates.items():
        print(f"{name:28} {rate / 1e9:9.1f} GB/s")
    print_lines(goals)


if __name__ == "__main__":
    main()
