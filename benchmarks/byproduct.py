"""What --against adds to an update of cropi-train: the same update observed and not, in turns in one process; the best time of each.

With one thread on a CPU time is that of the processor, so that what else runs there counts little; else it is the clock's.
An update is what `seconds_update` of timings.jsonl counts: forward and backward passes of all micro-batches, clipping, the step of AdamW,
and with --against the lines of influence.jsonl. Weights do not move (learning rate 0), every turn does the same work.

    python benchmarks/byproduct.py                    # a random policy of hidden size 512, and the demo's
    python benchmarks/byproduct.py --threads 2 --rounds 9 --json
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from goals import Goal, best_seconds, print_json, print_lines, processor
from transformers import Qwen2Config, Qwen2ForCausalLM

from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.data.means import write_mean
from cropi_tools.gradients.accumulator import Direction
from cropi_tools.gradients.pass_figures import PassFigures
from cropi_tools.gradients.prompt_objective import GradientSettings
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.influence import ByProduct
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.update import Updater

GOAL = 1.33
SAMPLES = 8
WIDE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

NARROW = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}


class Case(NamedTuple):
    """A policy and the rollouts of a step."""

    policy: Policy
    rollouts: list[dict[str, Any]]
    means: int


def main() -> None:
    parser = argparse.ArgumentParser(description="What --against adds to an update.")
    parser.add_argument("--rounds", type=int, default=5, help="turns that are counted (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--demo", default="runs/tiny", help="folder with the demo's P0 and start (default runs/tiny)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wide, narrow = random_policy(options.device), random_policy(options.device, **NARROW)
    cases = {
        "hidden 512, 64 tokens": Case(wide, random_rollouts(2, 64), 1),
        "hidden 512, 64 tokens, 4 means": Case(wide, random_rollouts(2, 64), 4),
        "hidden 128, 64 tokens": Case(narrow, random_rollouts(8, 64), 1),
        "hidden 512, 8 tokens": Case(wide, random_rollouts(16, 8), 1),
    }
    if (Path(options.demo) / "start").exists():
        cases["demo"] = demo(Path(options.demo), options.device)
        cases["demo, its 2 means"] = cases["demo"]._replace(means=2)
    alone = options.device == "cpu" and options.threads == 1
    clock = time.process_time if alone else time.perf_counter
    goals, seconds = [], {}
    for name, case in cases.items():
        found = best_seconds(tasks(case, options.device), options.rounds, clock)
        seconds[name] = found
        ratio = found["with"] / found["without"]
        goals.append(Goal(f"byproduct: {name}", ratio, GOAL, "the update without --against", at_most=True))
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor(options.threads)
    if options.json:
        print_json(goals, device, seconds=seconds)
        return
    print(f"{device}; seconds an update (best of {options.rounds})")
    for name, found in seconds.items():
        print(f"{name:32} without {found['without']:8.4f}   with {found['with']:8.4f}")
    print_lines(goals)


def tasks(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """The update observed and not, of the same policy."""
    options = TrainOptions(
        prompts=(), model="P0", output="P1", steps=1, learning_rate=0.0, aggregation="sequence", samples=SAMPLES
    )
    directions = {f"m{number}": direction(case.policy, number) for number in range(case.means)}
    settings = GradientSettings(aggregation="sequence")
    autocast = device == "cuda"
    precision = torch.bfloat16 if autocast else torch.float32
    figures = PassFigures(
        case.policy, directions, computing=lambda: torch.autocast(device, enabled=autocast), precision=precision
    )
    observer = ByProduct(figures, dict.fromkeys(directions, 1.0), settings)
    plain = Updater(case.policy, None, options, Ranks(), autocast)
    observed = Updater(case.policy, None, options, Ranks(), autocast, observer)

    def without() -> None:
        plain.step([case.rollouts], 0.0)

    def with_it() -> None:
        observed.step([case.rollouts], 0.0)
        assert sum(record["status"] == "ok" for record in observer.records(1, [case.rollouts])) > 0

    return {"without": without, "with": with_it}


def direction(policy: Policy, seed: int) -> Direction:
    """A mean gradient of random numbers, read from a file as those of cropi-grad are."""
    draw = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mean.safetensors"
        write_mean(path, {name: torch.randn(tensor.shape, generator=draw) for name, tensor in policy.trained}, {})
        return Direction(path)


def random_policy(device: str, **settings: int) -> Policy:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(**{**WIDE, **settings}, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    ).eval()
    return Policy(model.to(device), None, [1], "memory")


def random_rollouts(prompts: int, tokens: int) -> list[dict[str, Any]]:
    """Prompts of 16 to 32 tokens with responses of this length, every other one right."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(2, WIDE["vocab_size"]) for _ in range(count)]

    even = -math.log(WIDE["vocab_size"])  # about what a random policy would say of them
    return [
        {
            "id": f"p{number}",
            "source": "random",
            "prompt_token_ids": ids(draw.randrange(16, 33)),
            "samples": [
                {"token_ids": ids(tokens), "logprobs": [even] * tokens, "reward": place % 2, "finish_reason": "stop"}
                for place in range(SAMPLES)
            ],
        }
        for number in range(prompts)
    ]


def demo(folder: Path, device: str) -> Case:
    """The demo's starting policy and the rollouts of its first 32 prompts: about half have an advantage."""
    policy = load_policy(str(folder / "P0"), device, "float32")
    rollouts: list[dict[str, Any]] = []
    for _, record in read_jsonl(folder / "start" / "train.rollouts.jsonl"):
        rollouts.append({**record, "samples": record["samples"][:SAMPLES]})
        if len(rollouts) == 32:
            break
    return Case(policy, rollouts, 1)


if __name__ == "__main__":
    main()
