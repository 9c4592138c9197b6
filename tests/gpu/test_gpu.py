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
from training_runs import add_gradient, options_of

from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.gradients.prompt_objective import GradientSettings, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import response_logprobs, sequence_batch
from cropi_tools.sketches import countsketch_torch
from cropi_tools.sketches import device as device_module
from cropi_tools.sketches.device import DeviceCountsketch, device_kernels, device_products
from cropi_tools.sketches.kernel_trial import disagreement
from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loss_settings import LossSettings
from cropi_tools.training.update import Updater

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


REPOSITORY = Path(__file__).parents[2]
SHAPES = {"a": (4_000_037,), "b": (3000, 2000), "one": (1,), "odd": (2049,), "scalar": (), "short": (31,)}
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


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modules with the loops, whatever the trial of Triton's says."""
    force(request.param, monkeypatch)
    assert (device_kernels(torch.device("cuda"), torch.float32) is countsketch_torch) == (request.param == "torch")


def force(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = None if backend == "torch" else pytest.importorskip("cropi_tools.sketches.countsketch_triton")
    monkeypatch.setattr(device_module, "_triton", lambda *_: kernels)


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_the_trial_finds_the_triton_kernels_right(kind: torch.dtype) -> None:
    """On every device of this machine. Were it to fail, commands would go on with torch's: this is where that is seen."""
    kernels = pytest.importorskip("cropi_tools.sketches.countsketch_triton")
    for number in range(torch.cuda.device_count()):
        assert disagreement(kernels, torch.device("cuda", number), kind) is None
        assert device_kernels(torch.device("cuda", number), kind) is kernels


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dim", [512, 8192, 65536])
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_the_sketch_equals_the_cpu_and_repeats(kind: torch.dtype, dim: int) -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, dim, seed=3)
    tensors = gradients(kind)
    found = sketched(spec, tensors, "cuda")
    assert relative_error(found, sketched(spec, tensors, "cpu")) < 1e-6
    assert np.array_equal(sketched(spec, tensors, "cuda"), found)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dim", [64, 192, 4096])
def test_few_dimensions_short_tensors_and_folding(dim: int) -> None:
    layout = Layout((("a", (20_011,)), ("one", (1,)), ("odd", (2049,))))
    spec = ProjectionSpec.create("countsketch", layout, dim, seed=3).folded(64)
    found, expected = Sketcher(spec, layout), Sketcher(spec, layout)
    for name, shape in layout.entries:
        tensor = torch.randn(shape[0] + 3, generator=torch.Generator().manual_seed(2))[3:]
        found.add(name, tensor.cuda())
        expected.add(name, tensor)
    assert relative_error(found.finish(), expected.finish()) < 1e-6


@pytest.mark.usefixtures("backend")
def test_mixed_types_missing_doubled_moved_and_freed() -> None:
    spec = ProjectionSpec.create("countsketch", LAYOUT, 8192, seed=3)
    full, half = gradients(torch.float32), gradients(torch.bfloat16, seed=1)
    calls = [("a", full["a"]), ("odd", half["odd"]), ("a", half["a"]), ("b", full["b"].reshape(2000, 3000).T)]
    found, expected = Sketcher(spec, LAYOUT), Sketcher(spec, LAYOUT)
    found.add("short", full["short"].cuda())
    found.begin()
    for name, gradient in calls:
        buffer = torch.zeros(gradient.numel() + 3, dtype=gradient.dtype, device="cuda")
        moved = buffer[3:].copy_(gradient.reshape(-1))
        found.add(name, moved)
        buffer.fill_(float("nan"))
        del buffer, moved
        expected.add(name, gradient)
    assert relative_error(found.finish(), expected.finish()) < 1e-6


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_products_equal_float64_and_repeat(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    force("triton", monkeypatch)
    products = device_products(torch.device("cuda"), kind)
    assert products is not None
    means = [gradients(torch.float32, seed=5 + number) for number in range(2)]
    for name, tensor in gradients(kind).items():
        gradient = tensor.reshape(-1).cuda()
        against = [mean[name].reshape(-1).cuda() for mean in means]
        found = products(gradient, against)
        expected = [float(gradient.double() @ other.double()) for other in [gradient, *against]]
        # an inner product of random vectors is a small difference of large sums: its scale is the product of the norms
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7 * expected[0])
        assert torch.equal(products(gradient, against), found)


def test_the_sketch_needs_no_more_memory_than_it_says() -> None:
    size = 4 * countsketch_torch.GROUP
    gradient = torch.randn(size, device="cuda")
    sketch = DeviceCountsketch(countsketch_torch, {"g": np.uint64(1)}, 32768, 2048, gradient.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sketch.add("g", gradient)
    assert torch.cuda.max_memory_allocated() - before < 3e8


# The policy


def test_the_gradient_equals_the_cpu() -> None:
    policy, task = naive_policy.policy(), prepare(naive_policy.rollout(1), GradientSettings())
    assert not isinstance(task, str)
    found: list[dict[str, torch.Tensor]] = []
    for place in (on_gpu(policy), policy):
        gradient: dict[str, torch.Tensor] = {}
        (fact,) = ReferenceGradients(place, GradientSettings()).compute(
            [task], lambda name, rows, gradient=gradient: gradient.update({name: rows[0].cpu()})
        )
        assert fact.status == "ok"
        found.append(gradient)
    assert naive_policy.relative_error(*found) < 1e-4


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


@pytest.mark.parametrize("autocast", [False, True])
def test_an_update_is_that_of_the_cpu(autocast: bool) -> None:
    """Loss and gradient of a mini-batch with every term, in float32 and with bfloat16 products."""
    loss = LossSettings(0.9, (0.2, 0.28), 0.1, 0.05, "token", "group", 16, True, 2.0)
    records = [naive_policy.record(naive_policy.rollout(number)) for number in range(4)]
    gradients_on = {}
    for device in ("cpu", "cuda"):
        policy, reference = naive_policy.policy(), naive_policy.policy(seed=5)
        if device == "cuda":
            policy, reference = on_gpu(policy), on_gpu(reference)
        updater = Updater(policy, reference, options_of(loss), Ranks(), autocast and device == "cuda")
        figures = add_gradient(updater, records)
        parts = {name: parameter.grad.cpu() for name, parameter in policy.model.named_parameters()}
        gradients_on[device] = figures, parts
    (figures, expected), (found, mine) = gradients_on["cpu"], gradients_on["cuda"]
    assert naive_policy.relative_error(mine, expected) < (0.1 if autocast else 1e-4)
    assert found["loss"] == pytest.approx(
        figures["loss"], rel=0.1 if autocast else 1e-4, abs=1e-3 if autocast else 1e-6
    )
