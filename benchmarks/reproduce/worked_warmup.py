"""The starting policy of bed (c): a Qwen2 of 6.6 million parameters, trained from scratch on worked answers, then on half mistaken ones.

    python benchmarks/reproduce/worked_warmup.py warmup.jsonl -o P0

As with the demo's, the second part is made for the purpose: a policy that has learned plausible mistakes is what reinforcement learning can
improve within a hundred steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny"))
import warmup

from cropi_tools import runtime
from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.data.manifest import Fingerprint, file_input
from cropi_tools.data.output import Output

CONTEXT, WIDTH, LAYERS, INNER = 128, 384, 4, 1024
LEARNING_RATE, BATCH = 1.5e-3, 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the starting policy of bed (c) from scratch.")
    parser.add_argument("prompts", help="prompts of worked_tasks.py")
    parser.add_argument("-o", "--output", required=True, help="the policy folder to write")
    parser.add_argument("--steps", type=int, default=1500, help="steps on right solutions")
    parser.add_argument("--mistaken-steps", type=int, default=150, help="then steps with half mistaken ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    options = {name: getattr(given, name) for name in ("steps", "mistaken_steps", "seed", "threads")}
    inputs = {"prompts": file_input(given.prompts)}
    output = Output(
        given.output, Fingerprint.of("worked_warmup", options, inputs), inputs, folder=True, force=given.force
    )
    if not output.open():
        runtime.notify(f"{given.output}: up to date")
        return
    tokenizer = warmup.make_tokenizer(CONTEXT)
    model = warmup.make_model(tokenizer, WIDTH, LAYERS, INNER)
    found = [record for _, record in read_jsonl(given.prompts)]
    right = [(record["prompt"], record["extra"]["worked"]) for record in found]
    mistaken = [(record["prompt"], record["extra"]["mistaken"]) for record in found]
    phases = [
        (warmup.encode(right, tokenizer), given.steps),
        (warmup.encode(right + mistaken, tokenizer), given.mistaken_steps),
    ]
    output.begin_work()
    model.model.compile(dynamic=True)
    warmup.train(model, phases, given.seed, LEARNING_RATE, BATCH)
    warmup.save(model, tokenizer, output, len(found), given.steps + given.mistaken_steps)


if __name__ == "__main__":
    main()
