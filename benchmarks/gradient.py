"""What cropi-grad adds to the forward and backward pass it cannot do without.

The peer is the plain pass: the model's own cross-entropy loss over the same responses, and its backward. Against it
stands the work on one prompt: the importance-weighted objective and its gradient, the exact norm, exact inner products
with two means, and the countsketch. Weights are random, in the shapes of Qwen2.5; all in one process, best of several interleaved rounds.

    python benchmarks/gradient.py                                                    # tiny, on a CPU, seconds
    python benchmarks/gradient.py --shape 0.5b --samples 4 --tokens 128              # minutes and 12 GB on a CPU
    python benchmarks/gradient.py --shape 1.5b --device cuda --dtype bfloat16        # 20 GB on a GPU
    python benchmarks/gradient.py --json                                             # one object a goal
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import time
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from cropi_tools.data.records import Rollout, Sample
from cropi_tools.influence.gradients import GradientComputer, GradientSettings, Products
from cropi_tools.influence.projection import Layout, ProjectionSpec, Sketcher
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import response_logprobs, sequence_batch

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "vocab_size": 151936,
    },
}
PROMPT_TOKENS = 64
MEANS = 2
GOAL_RATIO, GOAL_SHARE = 1.15, 0.05


class Clock:
    """Shortest time of each named stage, waiting for the device before and after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.best: dict[str, float] = {}

    def time(self, stage: str, task: Any, counted: bool) -> Any:
        self._wait()
        start = time.perf_counter()
        result = task()
        self._wait()
        if counted:
            self.best[stage] = min(self.best.get(stage, float("inf")), time.perf_counter() - start)
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def main() -> None:
    parser = argparse.ArgumentParser(description="The work of cropi-grad against a plain forward and backward pass.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--samples", type=int, default=8, help="responses a prompt")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a response")
    parser.add_argument("--dim", type=int, default=65536, help="dimensions of the sketch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.manual_seed(0)
    policy = random_policy(options.shape, device, getattr(torch, options.dtype))
    rollout = random_rollout(policy, options.samples, options.tokens)
    computer = GradientComputer(policy, GradientSettings())
    layout = Layout.of(computer.parameters)
    means = {
        f"mean {number}": {name: torch.randn_like(p, dtype=torch.float32) for name, p in computer.parameters}
        for number in range(MEANS)
    }
    products = Products(means, layout, device)
    sketcher = Sketcher(ProjectionSpec.create("countsketch", layout, options.dim), layout)

    ids = torch.tensor([rollout.prompt_token_ids + sample.token_ids for sample in rollout.samples], device=device)
    labels = ids.clone()
    labels[:, :PROMPT_TOKENS] = -100  # no loss on the prompt

    def sketch(gradients: dict[str, torch.Tensor]) -> None:
        sketcher.begin()
        for name, gradient in gradients.items():
            sketcher.add(name, gradient)
        sketcher.finish()

    clock, peaks = Clock(device), {}

    def plain_pass(counted: bool) -> None:
        computer.clear()
        loss = clock.time(
            "plain forward", lambda: policy.model(input_ids=ids, labels=labels, use_cache=False).loss, counted
        )
        clock.time("plain backward", loss.backward, counted)

    def cropi_grad(counted: bool) -> None:
        clock.time("gradient", lambda: computer.compute(rollout), counted)
        gradients = dict(computer.gradients())
        clock.time("norm and products", lambda: products.measure(gradients), counted)
        clock.time("sketch", lambda: sketch(gradients), counted)
        computer.clear()

    for count in range(options.rounds + 1):  # the first is not counted
        for work in (plain_pass, cropi_grad):
            start_peak(device)
            work(count > 0)
            peaks[work.__name__.replace("_", " ")] = peak(device)
    report(options, clock.best, peaks, layout.size, name_of(device))


def random_policy(shape: str, device: torch.device, kind: torch.dtype) -> Policy:
    """A Qwen2 model of the shape with random weights and tied embeddings."""
    config = Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SHAPES[shape])
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(kind).eval()
    return Policy(model, None, [0], shape)


def random_rollout(policy: Policy, samples: int, tokens: int) -> Rollout:
    """One prompt with random responses, sampled by nobody, with the policy's own log-probabilities."""
    draw = random.Random(0)
    sequences = [[draw.randrange(policy.vocabulary) for _ in range(PROMPT_TOKENS + tokens)] for _ in range(samples)]
    prompt = sequences[0][:PROMPT_TOKENS]
    found = []
    for number, sequence in enumerate(sequences):
        response = sequence[PROMPT_TOKENS:]
        with torch.no_grad():
            logprobs, _ = response_logprobs(policy.model, sequence_batch([(prompt, response)], policy.device))
        found.append(Sample(response, logprobs.tolist(), float(number % 2)))
    return Rollout("random", "random", prompt, found, {})


def start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float:
    """Highest memory in GB: of the device since `start_peak`, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def report(
    options: argparse.Namespace, seconds: dict[str, float], peaks: dict[str, float], size: int, device: str
) -> None:
    """Print the table, or the goals."""
    plain = seconds["plain forward"] + seconds["plain backward"]
    added = seconds["norm and products"] + seconds["sketch"]
    ratio, share = (seconds["gradient"] + added) / plain, added / seconds["plain backward"]
    if options.device != "cpu":
        goals = [("gradient-added-to-backward", share, GOAL_SHARE, "the plain pass's backward")]
    else:
        goals = [("gradient-to-plain-pass", ratio, GOAL_RATIO, "the model's own loss and backward")]
    setting = f"{options.shape}, {options.dtype}, {options.samples} x {options.tokens} tokens"
    if options.json:
        for name, value, goal, peer in goals:
            record = {"name": name, "value": round(value, 4), "goal": goal, "met": value <= goal, "peer": peer}
            print(json.dumps({**record, "device": f"{device}; {setting}"}))
        return
    print(f"{setting}, {size} parameters, sketch of {options.dim}, {MEANS} means, {device}")
    for stage, spent in seconds.items():
        print(f"{stage:20} {1000 * spent:10.2f} ms   {spent / plain:7.4f} of the plain pass")
    print(f"{'cropi-grad':20} {1000 * ratio * plain:10.2f} ms   {ratio:7.4f} of the plain pass")
    print(f"{1 / (ratio * plain):.2f} prompts a second; {share:.4f} of the plain backward added")
    for work, highest in peaks.items():
        print(f"peak memory up to the end of {work}: {highest:.2f} GB")
    for name, value, goal, peer in goals:
        print(f"{name:28} {value:7.3f}   goal {goal:.2f} {'met' if value <= goal else 'MISSED':6}  against {peer}")


if __name__ == "__main__":
    main()
