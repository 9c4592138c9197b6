"""On a GPU: the kernels against the CPU's; gradients, sampling, training, and the chain of commands with --device cuda."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive_policy
import numpy as np
import pytest
import tiny_policy
import torch
from numpy.typing import NDArray

from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.influence import device as device_module
from cropi_tools.influence.device import DeviceProducts, triton_kernels
from cropi_tools.influence.gradients import GradientComputer, GradientSettings
from cropi_tools.influence.projection import Layout, ProjectionSpec, Sketcher
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import response_logprobs, sequence_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels under test, off elsewhere until these tests have passed on a GPU."""
    monkeypatch.setattr(device_module, "ENABLED", True)


REPOSITORY = Path(__file__).parents[2]
SHAPES = {"a": (4_000_037,), "b": (3000, 2000), "one": (1,), "odd": (2049,), "scalar": (), "short": (31,)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
LAYOUT = Layout(tuple(SHAPES.items()))
SAMPLED = "--max-tokens 6 --verifier parity.py:reward"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def gradients(kind: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(kind) for name, shape in SHAPES.items()}


def sketched(spec: ProjectionSpec, tensors: dict[str, torch.Tensor], device: str) -> NDArray[np.float32]:
    sketcher = Sketcher(spec, LAYOUT)
    for name, tensor in tensors.items():
        sketcher.add(name, tensor.to(device))
    return sketcher.finish()


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def on_gpu(policy: Policy) -> Policy:
    return policy._replace(model=copy.deepcopy(policy.model).to("cuda"))


# The kernels


def test_the_kernels_are_used() -> None:
    assert triton_kernels(torch.device("cuda")) is not None


@pytest.mark.parametrize("dim", [64, 192, 512, 8192, 65536])
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_the_sketch_equals_the_cpu_and_repeats(kind: torch.dtype, dim: int) -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, dim, seed=3)
    tensors = gradients(kind)
    found = sketched(spec, tensors, "cuda")
    assert relative_error(found, sketched(spec, tensors, "cpu")) < 1e-6
    assert np.array_equal(sketched(spec, tensors, "cuda"), found)


def test_a_folded_sketch_equals_the_cpu() -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, 65536, seed=3).folded(4096)
    tensors = gradients(torch.bfloat16)
    assert relative_error(sketched(spec, tensors, "cuda"), sketched(spec, tensors, "cpu")) < 1e-6


def test_mixed_types_missing_doubled_and_not_contiguous() -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, 8192, seed=3)
    full, half = gradients(torch.float32), gradients(torch.bfloat16, seed=1)
    calls = [("a", full["a"]), ("odd", half["odd"]), ("a", half["a"]), ("b", full["b"].reshape(2000, 3000).T)]
    found, expected = Sketcher(spec, LAYOUT), Sketcher(spec, LAYOUT)
    found.add("short", full["short"].cuda())
    found.begin()
    for name, gradient in calls:
        found.add(name, gradient.cuda())
        expected.add(name, gradient)
    assert relative_error(found.finish(), expected.finish()) < 1e-6


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_products_equal_float64_and_repeat(kind: torch.dtype) -> None:
    device = torch.device("cuda")
    tensors = {name: tensor.to(device) for name, tensor in gradients(kind).items()}
    means = [{name: tensor.to(device) for name, tensor in gradients(torch.float32, seed=5 + k).items()} for k in (0, 1)]
    products = DeviceProducts(triton_kernels(device), SIZES, means, device)
    found = products.measure(tensors)
    every = [{name: tensor.float() for name, tensor in tensors.items()}, *means]
    expected = [sum(float((tensors[n].double() * other[n].double()).sum()) for n in tensors) for other in every]
    # an inner product of random vectors is a small difference of large sums: its scale is the product of the norms
    assert found == pytest.approx(expected, abs=1e-7 * expected[0])
    assert products.measure(tensors) == found


# The policy


def test_the_gradient_equals_the_cpu() -> None:
    policy, rollout = naive_policy.policy(), naive_policy.rollout(1)
    found, expected = (GradientComputer(p, GradientSettings()) for p in (on_gpu(policy), policy))
    assert found.compute(rollout).status == expected.compute(rollout).status == "ok"
    on_cpu = {name: gradient.cpu() for name, gradient in found.gradients()}
    assert naive_policy.relative_error(on_cpu, dict(expected.gradients())) < 1e-4


def test_sampled_logprobs_equal_a_forward_pass() -> None:
    policy = on_gpu(naive_policy.policy())
    prompts = [[5 + number, 6, 7][: 1 + number % 3] for number in range(24)]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    found = TransformersEngine(policy).sample(requests, Sampling(16, 0.7))
    batch = sequence_batch([(r.prompt_token_ids, c.token_ids) for r, c in zip(requests, found, strict=True)], "cuda")
    with torch.no_grad():
        expected, _ = response_logprobs(policy.model, batch, 0.7)
    assert [value for c in found for value in c.logprobs or []] == pytest.approx(expected.tolist(), abs=1e-4)


# The commands


def records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(path)]


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], None]:
    """Run a command line in the test's folder, which holds the policy P0, prompts.jsonl and parity.py."""
    tiny_policy.save(tmp_path / "P0")
    tiny_policy.write_jsonl(tmp_path / "prompts.jsonl", tiny_policy.prompts(12))
    (tmp_path / "parity.py").write_bytes((REPOSITORY / "tests" / "parity.py").read_bytes())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}

    def call(line: str) -> None:
        name, *words = line.split()
        program = f"from cropi_tools.cli.{name.removeprefix('cropi-')} import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{line}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"

    return call


def test_the_chain_of_commands(command: Callable[[str], None], tmp_path: Path) -> None:
    command(f"cropi-rollout --model P0 prompts.jsonl -n 16 {SAMPLED} --device cuda -o r.jsonl")
    for device in ("cuda", "cpu"):
        command(f"cropi-grad --model P0 r.jsonl --mean --dtype float32 --device {device} -o {device}.safetensors")
        against = f"--against target={device}.safetensors --dim 1024"
        command(f"cropi-grad --model P0 r.jsonl {against} --dtype float32 --device {device} -o {device}.zarr")
        command(f"cropi-score {device}.zarr -o {device}.jsonl")
    scores = {device: records(tmp_path / f"{device}.jsonl") for device in ("cuda", "cpu")}
    assert len(scores["cuda"]) == 12
    assert sum(record["status"] == "ok" for record in scores["cuda"]) > 6
    for found, expected in zip(scores["cuda"], scores["cpu"], strict=True):
        assert (found["id"], found["status"]) == (expected["id"], expected["status"])
        if found["status"] == "ok":
            assert found["scores"]["target"] == pytest.approx(expected["scores"]["target"], abs=1e-4)


def test_training_and_its_policy_on_a_cpu(command: Callable[[str], None], tmp_path: Path) -> None:
    command(f"cropi-train --model P0 prompts.jsonl --steps 2 --batch 4 -n 8 {SAMPLED} --device cuda -o P1")
    assert [record["step"] for record in records(tmp_path / "P1" / "metrics.jsonl")] == [1, 2]
    command(f"cropi-rollout --model P1 prompts.jsonl -n 2 {SAMPLED} --device cpu -o after.jsonl")
    assert len(records(tmp_path / "after.jsonl")) == 12
