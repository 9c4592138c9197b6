"""The kernels' threads and torch's are the same pool: starting the one must not resize the other."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
torch.set_num_threads(1)
from cropi_tools.influence.projection import Layout, ProjectionSpec, Sketcher
layout = Layout((("a", (2**18,)),))
sketcher = Sketcher(ProjectionSpec.create("countsketch", layout, 64), layout)
print(torch.get_num_threads())
sketcher.add("a", torch.ones(2**18))
sketcher.finish()
print(torch.get_num_threads())
"""


def test_the_first_sketch_leaves_torch_its_threads() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
