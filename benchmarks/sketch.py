"""How near the countsketch comes to reading the gradient at all, and how far ahead of other projections it is.

One thread, all in one run, best of several interleaved rounds. At full length (32M coordinates):

* numpy.sum of the float32 vector, the plain way to read it all once, and the same sum compiled by numba with additions
  reordered freely, about what one core can read at all. The goals are against the first; the second is shown.
* countsketch of the vector as float32, bfloat16 and float16, compared by the bytes read a second.

Slower ones on the beginning of the vector, compared by the coordinates a second:

* scatter: the same kind of sketch as it is usually written, a precomputed bucket and sign a coordinate: torch
  `index_add_` and `scatter_add_`, and a sparse matrix of scipy (CSR) times the vector. The fastest is the peer.
* BasicProjector of traker, Rademacher signs on the CPU: a dense projection, its matrix made anew block by block, which
  is shared here by a batch of 8 vectors. At fewer dimensions, because its time grows with them, and the countsketch,
  one vector at a time, at the same.
* sjlt, and sparse-jl and sparse-gaussian at keep 0.1, for their cost next to the countsketch. Shown, not a goal.

Busy neighbors lower all figures, though not equally: compare runs on a quiet machine.

    python benchmarks/sketch.py                # a table
    python benchmarks/sketch.py --json         # one object a goal
    pip install --no-deps traker==0.3.2        # for BasicProjector; without it that goal is left out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numba
import numpy as np
import torch
from goals import Goal, best_seconds, print_json, print_lines, processor
from numpy.typing import NDArray
from scipy.sparse import csr_array

from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec

ROUNDS = 15
GOAL_FLOAT32, GOAL_BFLOAT16, GOAL_SCATTER, GOAL_PROJECTOR = 0.80, 0.60, 5.0, 100.0
SCATTER_SIZE, SPARSE_SIZE, PROJECTOR_SIZE = 1 << 22, 1 << 17, 1 << 14  # coordinates for the slow ones
PROJECTOR_DIM, PROJECTOR_BATCH = 8192, 8
SUM, COMPILED = "numpy.sum float32", "compiled sum float32"
SCATTERS = ("torch index_add_", "torch scatter_add_", "scipy CSR")

Task = Callable[[], object]


@numba.njit(fastmath={"reassoc", "nsz"})  # type: ignore[misc,unused-ignore]
def compiled_sum(values: NDArray[np.float32]) -> np.float32:
    total = np.float32(0)
    for place in range(values.size):
        total += values[place]
    return total


def sketching(method: str, gradient: torch.Tensor, dim: int, keep: float | None = None) -> Task:
    """What sketches the flat gradient."""
    layout = Layout((("w", tuple(gradient.shape)),))
    sketcher = Sketcher(ProjectionSpec.create(method, layout, dim, keep=keep), layout)
    return lambda: sketcher.add("w", gradient)


def scattering(gradient: torch.Tensor, dim: int) -> dict[str, Task]:
    """The three usual ways to a sketch with a bucket and a sign a coordinate, tables made beforehand."""
    size = len(gradient)
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(dim, (size,), generator=generator)
    signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1
    signed, out = torch.empty(size), torch.zeros(dim)
    matrix = csr_array((signs.numpy(), (buckets.numpy(), np.arange(size))), shape=(dim, size))
    values = gradient.numpy()
    return {
        SCATTERS[0]: lambda: out.index_add_(0, buckets, torch.mul(signs, gradient, out=signed)),
        SCATTERS[1]: lambda: out.scatter_add_(0, buckets, torch.mul(signs, gradient, out=signed)),
        SCATTERS[2]: lambda: matrix @ values,
    }


def projecting(gradient: torch.Tensor, dim: int) -> Task:
    """What projects a batch of copies of the flat gradient by traker's BasicProjector."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(len(gradient), dim, 0, ProjectionType.rademacher, "cpu")
    batch = gradient.repeat(PROJECTOR_BATCH, 1)
    return lambda: projector.project(batch, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description="The countsketch against a plain sum and against other projections.")
    parser.add_argument("--size", type=int, default=1 << 25, help="coordinates of the gradient")
    parser.add_argument("--dim", type=int, default=65536, help="dimensions of the sketch")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    size, dim = options.size, options.dim
    values = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    vector = torch.from_numpy(values)
    kinds = {"float32": vector, "bfloat16": vector.to(torch.bfloat16), "float16": vector.to(torch.float16)}

    rates: dict[str, float] = {}  # coordinates a second

    def measure(count: int, tasks: Mapping[str, Task], rounds: int) -> None:
        rates.update({name: count / spent for name, spent in best_seconds(tasks, rounds).items()})

    sketches = {f"countsketch {kind}": sketching("countsketch", vector, dim) for kind, vector in kinds.items()}
    measure(size, {SUM: values.sum, COMPILED: lambda: compiled_sum(values), **sketches}, ROUNDS)
    part = vector[: min(size, SCATTER_SIZE)]
    same = {"countsketch, as scatter": sketching("countsketch", part, dim)}
    measure(len(part), {**same, **scattering(part, dim), "sjlt": sketching("sjlt", part, dim)}, 5)
    part = vector[: min(size, SPARSE_SIZE)]
    sparse = {f"{method} 0.1": sketching(method, part, dim, 0.1) for method in ("sparse-jl", "sparse-gaussian")}
    measure(len(part), sparse, 1)
    have_projector = find_spec("trak") is not None
    if have_projector:
        part = vector[: min(size, PROJECTOR_SIZE)]
        narrow = {f"countsketch {PROJECTOR_DIM}": sketching("countsketch", vector, PROJECTOR_DIM)}
        measure(size, narrow, 3)
        measure(PROJECTOR_BATCH * len(part), {f"BasicProjector {PROJECTOR_DIM}": projecting(part, PROJECTOR_DIM)}, 1)
    else:
        print("BasicProjector left out: trak is not installed (pip install --no-deps traker==0.3.2)", file=sys.stderr)

    device = processor(1)
    scatter = max(SCATTERS, key=lambda name: rates[name])
    goals = [
        Goal("sketch-float32-to-sum", rates["countsketch float32"] / rates[SUM], GOAL_FLOAT32, SUM),
        Goal("sketch-bfloat16-to-sum", rates["countsketch bfloat16"] / rates[SUM] / 2, GOAL_BFLOAT16, SUM),
        Goal("sketch-to-scatter", rates["countsketch, as scatter"] / rates[scatter], GOAL_SCATTER, scatter),
    ]
    if have_projector:
        narrow_name, projector_name = f"countsketch {PROJECTOR_DIM}", f"BasicProjector {PROJECTOR_DIM}"
        goals.append(
            Goal(
                "sketch-to-projector",
                rates[narrow_name] / rates[projector_name],
                GOAL_PROJECTOR,
                "traker BasicProjector",
            )
        )
    if options.json:
        print_json(goals, device)
        return
    print(f"{size} coordinates, {dim} dimensions, {device}")
    for name, rate in rates.items():
        read = rate * (2 if name.endswith("float16") else 4) / 1e9
        print(f"{name:24} {rate / 1e9:9.3g} Gcoord/s {read:9.3g} GB/s read {read / rates[SUM] / 4e-9:9.2g} of {SUM}")
    print_lines(goals)


if __name__ == "__main__":
    main()
