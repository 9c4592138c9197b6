"""The kernels' threads and torch's are the same pool: starting the one must not resize the other.

And a sketch has the same bits whatever their number.
"""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch
torch.set_num_threads(1)
from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec
layout = Layout((("a", (2**18,)),))
sketcher = Sketcher(ProjectionSpec.create("countsketch", layout, 64), layout)
print(torch.get_num_threads())
sketcher.add("a", torch.ones(2**18))
sketcher.finish()
print(torch.get_num_threads())
"""

LARGE = """
import hashlib, numba, torch
from cropi_tools.sketches import countsketch_numba
from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec
size = 10_000_019
layout = Layout((("a", (size,)),))
gradient = torch.randn(size, generator=torch.Generator().manual_seed(0))
for method, dim, keep in (
    ("countsketch", 8192, None), ("sjlt", 8192, None), ("sparse-jl", 256, 1e-4), ("sparse-gaussian", 256, 1e-4)
):
    sketcher = Sketcher(ProjectionSpec.create(method, layout, dim, 0, keep), layout)
    digests = []
    for threads, countsketch_numba.PARALLEL_FROM in ((1, 0), (2, 0), (2, 0), (1, 2**62)):  # the last is the build without threads
        numba.set_num_threads(threads)
        sketcher.begin()
        sketcher.add("a", gradient)
        digests.append(hashlib.sha256(sketcher.finish().tobytes()).hexdigest()[:16])
    print(method, *digests)
"""


def run(program: str, **environment: str) -> list[str]:
    """The lines a program prints, in a process of its own."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_first_sketch_leaves_torch_its_threads() -> None:
    assert run(PROGRAM) == ["1", "1"]


def test_ten_million_coordinates_with_one_thread_and_with_two() -> None:
    lines = [line.split() for line in run(LARGE, NUMBA_NUM_THREADS="2", NUMBA_DISABLE_JIT="0")]
    assert len(lines) == 4
    for method, *digests in lines:
        assert len(set(digests)) == 1, method
    assert len({line[1] for line in lines}) == 4  # the sketches do differ where they should
