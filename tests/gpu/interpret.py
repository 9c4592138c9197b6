"""The Triton kernels without a GPU: run in Triton's interpreter on tensors of the CPU, and compiled for an H100 or H200.

Not part of the test suite, which has no Triton. By hand, in an environment that has this project, Triton 3.6 and, for the interpreter,
a numpy before 2.4:

    TRITON_INTERPRET=1 python -m pytest -W ignore::DeprecationWarning tests/gpu/interpret.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import naive_sketch
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cropi_tools.sketches import countsketch_triton, projection
from cropi_tools.sketches.kernel_trial import disagreement
from cropi_tools.sketches.projection import Sketcher, sketch_vector
from cropi_tools.sketches.spec import Layout, ProjectionSpec

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"one": 1, "a": 63, "b": 2047, "c": 2048, "d": 6151, "e": 9001}
LAYOUT = Layout(tuple((name, (size,)) for name, size in SIZES.items()))
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cropi_tools.sketches import countsketch_triton as kernels

def compiled(kernel, warps, signature, constants):
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    program = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert len(program.asm["cubin"]) > 1000

for kind in ("fp32", "bf16", "fp16", "fp64"):
    tables = dict.fromkeys(("keys", "order", "bounds"), "*i64")
    for segment in (64, 192, 2048):
        given = {"gradient": "*" + kind, "size": "i32", **tables, "sums": "*fp32", "hash_dim": "i32"}
        compiled(kernels._countsketch, 1, given, {"SEGMENT": segment, "TILE": kernels.TILE})
    for means in range(3):
        given = {"gradient": "*" + kind, "means": ("*fp32",) * means, "size": "i64", "out": "*fp32"}
        compiled(kernels._products, 8, given, {"BLOCK": kernels.PRODUCT_BLOCK})
"""


def gradients(kind: torch.dtype, seed: int = 0, moved: int = 0) -> dict[str, torch.Tensor]:
    """Tensors that begin `moved` coordinates behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size + moved, generator=generator).to(kind)[moved:] for name, size in SIZES.items()}


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "device_kernels", lambda *_: countsketch_triton)


@pytest.mark.parametrize("moved", [0, 3])
@pytest.mark.parametrize("dim", [64, 192, 512, 4096, 65536])
@pytest.mark.parametrize("kind", [*FLOATS, torch.float64], ids=str)
def test_the_sketch_equals_the_definition(kind: torch.dtype, dim: int, moved: int) -> None:
    given = gradients(kind, moved=moved)
    values = {name: tensor.float().numpy() for name, tensor in given.items()}
    expected = naive_sketch.countsketch(values, 5, dim, dim, min(2048, dim))
    found = sketch_vector(ProjectionSpec.create("countsketch", LAYOUT, dim, seed=5), LAYOUT, given)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_a_larger_sketch_equals_numba_and_repeats(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((("a", (60_001,)), ("b", (7, 1000))))
    spec = ProjectionSpec.create("countsketch", layout, 4096, seed=3).folded(512)
    given = {"a": torch.randn(60_001).to(kind), "b": torch.randn(7, 1000).to(kind)}

    def sketched(sketcher: Sketcher) -> NDArray[np.float32]:
        sketcher.begin()
        for name in ("b", "a", "b"):
            sketcher.add(name, given[name])
        return sketcher.finish()

    sketcher = Sketcher(spec, layout)
    found = sketched(sketcher)
    assert np.array_equal(sketched(sketcher), found)
    monkeypatch.setattr(projection, "device_kernels", lambda *_: None)
    assert relative_error(found, sketched(Sketcher(spec, layout))) < 1e-6


def test_values_that_are_not_finite_are_seen() -> None:
    given = gradients(torch.bfloat16)
    given["e"][-1] = float("nan")
    with pytest.raises(projection.InputError, match="not finite"):
        sketch_vector(ProjectionSpec.create("countsketch", LAYOUT, 192), LAYOUT, given)


@pytest.mark.parametrize("means", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_products_equal_float64(kind: torch.dtype, means: int) -> None:
    others = [gradients(torch.float32, seed=7 + mean, moved=mean) for mean in range(means)]
    for name, gradient in gradients(kind, moved=1).items():
        against = [other[name] for other in others]
        found = countsketch_triton.products(gradient, against)
        assert found.dtype == torch.float64
        expected = [float(gradient.double() @ other.double()) for other in [gradient, *against]]
        # an inner product of random vectors is a small difference of large sums: its scale is the product of the norms
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7 * expected[0])


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_the_trial_finds_them_right(kind: torch.dtype) -> None:
    assert disagreement(countsketch_triton, torch.device("cpu"), kind) is None


def test_the_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
