"""How near the countsketch comes to reading the gradient at all, and how far ahead of index tables it is.

One thread, one run, all on the same 32M float32 coordinates, best of several interleaved rounds:

* sum: `numpy.sum` of the float32 vector, the plain way to read it all once.
* compiled sum: the same by numba, additions reordered freely; about what one core can read at all. Shown, not a goal.
* countsketch of the vector as float32 and as bfloat16, compared by the bytes read a second.
* index_add: the same kind of sketch as it is usually written in torch, a precomputed bucket and sign a coordinate.
* sparse-jl at keep 0.1, for its cost next to the countsketch. Shown, not a goal.

Busy neighbours lower all figures, though not equally: compare runs on a quiet machine.

    python benchmarks/sketch.py                # a table
    python benchmarks/sketch.py --json         # one object a goal
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from cropi_tools.influence.projection import Layout, ProjectionSpec, Sketcher

ROUNDS = 15
GOAL_FLOAT32, GOAL_BFLOAT16, GOAL_INDEX_ADD = 0.80, 0.60, 5.0


@numba.njit(fastmath={"reassoc", "nsz"})  # type: ignore[misc,unused-ignore]
def compiled_sum(values: NDArray[np.float32]) -> np.float32:
    total = np.float32(0)
    for place in range(values.size):
        total += values[place]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="The countsketch against a plain sum and against torch index_add.")
    parser.add_argument("--size", type=int, default=1 << 25, help="coordinates of the gradient")
    parser.add_argument("--dim", type=int, default=65536, help="dimensions of the sketch")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    numba.set_num_threads(1)
    torch.set_num_threads(1)

    size, dim = options.size, options.dim
    layout = Layout((("w", (size,)),))
    values = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    vector = torch.from_numpy(values)
    half = vector.to(torch.bfloat16)
    countsketch = Sketcher(ProjectionSpec.create("countsketch", layout, dim), layout)
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(dim, (size,), generator=generator)
    signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1
    signed, out = torch.empty(size), torch.zeros(dim)

    fast = {
        "sum": lambda: values.sum(),
        "compiled sum": lambda: compiled_sum(values),
        "countsketch float32": lambda: countsketch.add("w", vector),
        "countsketch bfloat16": lambda: countsketch.add("w", half),
    }
    seconds = best_seconds(fast, ROUNDS)
    slow = {"index_add": lambda: out.index_add_(0, buckets, torch.mul(signs, vector, out=signed))}
    seconds |= best_seconds(slow, 3)
    # On a part of the vector: the time of a sparse sketch is proportional to the coordinates, and long.
    part = min(size, 1 << 18)
    small = Layout((("w", (part,)),))
    sparse = Sketcher(ProjectionSpec.create("sparse-jl", small, dim, keep=0.1), small)
    seconds |= best_seconds({"sparse-jl keep 0.1": lambda: sparse.add("w", vector[:part])}, 1)

    width = {"countsketch bfloat16": 2}
    counted = {"sparse-jl keep 0.1": part}
    rates = {name: width.get(name, 4) * counted.get(name, size) / spent / 1e9 for name, spent in seconds.items()}
    device = f"{platform.processor() or platform.machine()}, 1 of {os.cpu_count()} cores"
    goals = [
        ("sketch-float32-to-sum", rates["countsketch float32"] / rates["sum"], GOAL_FLOAT32, "numpy.sum, float32"),
        ("sketch-bfloat16-to-sum", rates["countsketch bfloat16"] / rates["sum"], GOAL_BFLOAT16, "numpy.sum, float32"),
        (
            "sketch-to-index-add",
            rates["countsketch float32"] / rates["index_add"],
            GOAL_INDEX_ADD,
            "torch.index_add with index tables",
        ),
    ]
    if options.json:
        for name, value, goal, peer in goals:
            record = {"name": name, "value": round(value, 3), "goal": goal, "met": value >= goal, "peer": peer}
            print(json.dumps({**record, "device": device}))
        return
    print(f"{size} coordinates, {dim} dimensions, {device}")
    for name, rate in rates.items():
        print(f"{name:22} {rate:9.3f} GB/s read   {rate / rates['sum']:8.4f} of a sum")
    for name, value, goal, peer in goals:
        print(f"{name:24} {value:7.2f}   goal {goal:.2f} {'met' if value >= goal else 'MISSED':6}  against {peer}")


def best_seconds(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest time of each task over `rounds` rounds through all of them, after one that is not counted."""
    best = dict.fromkeys(tasks, float("inf"))
    for count in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if count:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
