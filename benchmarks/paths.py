"""The three ways to an exact inner product, on random prompts of given lengths: one prompt a pass, several prompts a pass, forward mode.

All in one process, best of several interleaved rounds, seconds a prompt. The reference path and the fast path take norm, products with one
mean and a countsketch, which forward mode does not give; forward mode goes along that mean. Beside them stand `rows`, the model's own
loss and backward pass with a row for every response, as trainers do it, and `products`, the matrix products of the linear layers alone,
three a layer (output, gradient of the input, gradient of the weight) on as many packed tokens: no exact gradient can be had in less.
Equality of the inner products is checked, relative to |g||v|.

    python benchmarks/paths.py                        # tiny: the goals at 8 x 32 tokens
    python benchmarks/paths.py --width 32 --layers 2  # smaller still
    python benchmarks/paths.py --json                 # one object a goal
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from goals import Goal, print_json, print_lines
from gradient import SHAPES, name_of, random_policy, write_random_mean

from cropi_tools.data.records import Rollout, Sample
from cropi_tools.gradients.accumulator import Direction, Measure
from cropi_tools.gradients.batching import batches
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.per_sample import FastGradients
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.policy.loading import Policy
from cropi_tools.sketches.spec import Layout, ProjectionSpec

SAMPLES = 8
LENGTHS = ((16, 8), (16, 32), (32, 32), (64, 32))
GOALS_AT = (16, 32)
GOAL_FAST, GOAL_FORWARD, GOAL_EQUAL = 3.0, 0.6, 1e-4
SETTINGS = GradientSettings()


def main() -> None:
    parser = argparse.ArgumentParser(description="Reference path, fast path and forward mode on random prompts.")
    parser.add_argument("--width", type=int, default=SHAPES["tiny"]["hidden_size"], help="hidden size")
    parser.add_argument("--layers", type=int, default=SHAPES["tiny"]["num_hidden_layers"])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": options.layers}
    SHAPES["asked"] = {**SHAPES["tiny"], **shape}
    policy = random_policy("asked", torch.device("cpu"), torch.float32)
    layout = Layout.of(policy.model.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mean.safetensors"
        write_random_mean(file, layout, 0)
        found = {lengths: measured(options, policy, layout, Direction(file), *lengths) for lengths in LENGTHS}
    report(options, found, layout.size)


def measured(
    options: argparse.Namespace, policy: Policy, layout: Layout, mean: Direction, prompt: int, response: int
) -> dict[str, float]:
    """Seconds a prompt of each way, and the largest difference of an inner product from the reference path's."""
    draw = torch.Generator().manual_seed(prompt)

    def ids(count: int) -> list[int]:
        return torch.randint(policy.vocabulary, (count,), generator=draw).tolist()

    rollouts = []
    for number in range(options.prompts):
        samples = [Sample(ids(response), [-3.0] * response, float(place % 2)) for place in range(SAMPLES)]
        rollouts.append(Rollout(f"p{number}", "random", ids(prompt), samples, {}))
    reference, fast = ReferenceGradients(policy, SETTINGS), FastGradients(policy, SETTINGS)
    forward = ForwardMode(policy, SETTINGS, {"v": mean})
    measure = Measure(layout, ProjectionSpec.create("countsketch", layout, 65536), {"v": mean}, policy.device)
    inner: dict[str, list[float]] = {}
    scale = [1.0]

    def backward(name: str, path: ReferenceGradients | FastGradients) -> None:
        values, squares = [], []
        for batch in batches(iter(rollouts), SETTINGS, path.room_for):
            measure.begin(len(batch.tasks))
            path.compute(batch.tasks, measure.add)
            for one in measure.finish():
                values.append(one.inner["v"])
                squares.append(one.square)
        inner[name] = values
        scale[:] = [max(squares) ** 0.5 * norm]

    def by_forward() -> None:
        together = batches(iter(rollouts), SETTINGS, forward.room_for)
        inner["forward"] = [one.inner["v"] for batch in together for one in forward.compute(batch.tasks)]

    norm = sum(float(mean.get(name, policy.device).square().sum()) for name in layout.places) ** 0.5  # type: ignore[union-attr]
    ways: dict[str, Callable[[], None]] = {
        "rows": lambda: rows(
            policy, [task for r in rollouts if isinstance(task := prepare(r, SETTINGS), GradientTask)]
        ),
        "reference": lambda: backward("reference", reference),
        "fast": lambda: backward("fast", fast),
        "forward": by_forward,
        "products": lambda: products(policy, rollouts[0], options.prompts),
    }
    best = dict.fromkeys(ways, float("inf"))
    for count in range(options.rounds + 1):  # the first is not counted
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if count:
                best[name] = min(best[name], (time.perf_counter() - start) / options.prompts)
    for name in ("fast", "forward"):
        pairs = zip(inner[name], inner["reference"], strict=True)
        best[f"{name} differs by"] = max(abs(one - other) for one, other in pairs) / scale[0]
    return best


def rows(policy: Policy, tasks: Sequence[GradientTask]) -> None:
    """The model's own loss with a row for every response, and its backward pass, a prompt at a time."""
    for task in tasks:
        ids = torch.tensor([task.prompt + response for response in task.responses])
        labels = ids.clone()
        labels[:, : len(task.prompt)] = -100
        policy.model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        for parameter in policy.model.parameters():
            parameter.grad = None


def products(policy: Policy, rollout: Rollout, prompts: int) -> None:
    """The matrix products of the linear layers for so many prompts, eight at a time: packed tokens, the head on response tokens."""
    response = sum(len(sample.token_ids) for sample in rollout.samples)
    packed = len(rollout.prompt_token_ids) + response - len(rollout.samples)
    head = policy.model.get_output_embeddings()
    with torch.no_grad():
        for _ in range(prompts // 8):
            for module in policy.model.modules():
                if isinstance(module, torch.nn.Linear):
                    states = torch.zeros(8 * (response if module is head else packed), module.in_features)
                    out = states @ module.weight.T
                    out @ module.weight
                    out.T @ states


def report(options: argparse.Namespace, found: dict[tuple[int, int], dict[str, float]], size: int) -> None:
    """Print the table, or the goals."""
    device = name_of(torch.device("cpu"))
    at = found[GOALS_AT]
    shape = f"{SAMPLES} x {GOALS_AT[1]} tokens, prompt {GOALS_AT[0]}, {size} parameters"
    goals = [
        Goal("fast-to-reference", at["reference"] / at["fast"], GOAL_FAST, "the reference path"),
        Goal("forward-to-fast", at["forward"] / at["fast"], GOAL_FORWARD, "the fast path", at_most=True),
        Goal(
            "forward-difference",
            at["forward differs by"],
            GOAL_EQUAL,
            "the reference path's inner products",
            at_most=True,
        ),
    ]
    if options.json:
        print_json(goals, f"{device}; {shape}")
        return
    print(f"{size} parameters, {SAMPLES} responses, {options.prompts} prompts, {device}; ms a prompt")
    print(
        f"{'prompt':>6} {'response':>8} {'rows':>9} {'reference':>9} {'fast':>9} {'forward':>9}   reference/fast forward/fast"
    )
    for (prompt, response), one in found.items():
        times = " ".join(f"{1000 * one[name]:9.2f}" for name in ("rows", "reference", "fast", "forward", "products"))
        ratios = f"{one['reference'] / one['fast']:14.2f} {one['forward'] / one['fast']:12.2f}"
        print(f"{prompt:6} {response:8} {times}   {ratios}")
    print(f"at {shape}:")
    print_lines(goals)


if __name__ == "__main__":
    main()
