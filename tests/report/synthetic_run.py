"""A small run made in code, with figures simple enough to work out by hand.

Two evaluation sets, `gcd` and `reverse`, of 200 prompts x 2 samples, evaluated every 10 steps of two stages of 20
steps. Accuracy is linear: `gcd` and `reverse` lie .1 below and above their mean, which rises from .40 by RISE a step,
plus a shift per seed. Every training step takes 1 s sampling, 2 s update, generates 1000 and trains on 500 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RISE = {"random": 0.002, "full": 0.004, "cropi": 0.008}
SHIFT = {"1": 0.0, "2": 0.01, "3": -0.02}
WOBBLE = {"1": 0.0, "2": 0.01, "3": -0.004}  # of cropi only, so that its differences to random vary
STAGE_STEPS = 20
START_SECONDS = {"cropi-rollout": 30.0, "cropi-grad": 50.0, "cropi-score": 2.0}


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_manifest(path: Path, command: str, ledger: Mapping[str, Any], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": 1,
        "command": command,
        "argv": [command, "-o", path.name],
        "options": {},
        "inputs": {},
        "outputs": {path.name: {"sha256": "ab" * 32}},
        "rows": 1,
        "skipped": {},
        "ledger": dict(ledger),
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        **more,
    }
    path.write_text(json.dumps(content))


def write_start(folder: Path) -> None:
    """The shared first stage: 30 s and 9000 tokens of sampling, 52 s and 7000 tokens of scoring."""
    rollout, grad, score = START_SECONDS.values()
    write_manifest(
        folder / "train.rollouts.jsonl.manifest.json", "cropi-rollout", {"seconds": rollout, "tokens_generated": 9000}
    )
    for shard in (1, 2):
        ledger = {"seconds": grad / 2, "tokens_scored": 3500}
        write_manifest(folder / f"grads.{shard}-of-2.zarr" / "manifest.json", "cropi-grad", ledger)
    write_manifest(folder / "scores.jsonl.manifest.json", "cropi-score", {"seconds": score})


def accuracy(arm: str, seed: str, step: int) -> float:
    """The mean target accuracy of the synthetic run. All arms of a seed share their start."""
    wobble = WOBBLE[seed] if arm == "cropi" and step else 0.0
    return 0.40 + RISE.get(arm, 0.003) * step + SHIFT[seed] + wobble


def write_selected(folder: Path, arm: str, stage: int) -> None:
    """Ten prompts: six of reverse and four of gcd at pass rates 0, .5, 1 and unknown; `full` has twenty."""
    size = 20 if arm == "full" else 10
    rates = [0.0, 0.5, 1.0, None, 0.5]
    records = [
        {
            "id": f"p{index + 5 * (stage - 1)}",
            "prompt": "x",
            "answer": "y",
            "source": "gcd" if index % 5 < 2 else "reverse",
            "rank": index + 1,
            "score": None,
            "pass_rate": rates[index % 5],
        }
        for index in range(size)
    ]
    write_lines(folder / "selected.jsonl", records)
    inputs = {"prompts": {"path": "train.jsonl", "sha256": "cd" * 32}}
    if arm not in ("random", "full"):
        inputs["scores"] = {"path": "../../../start/scores.jsonl", "sha256": "ef" * 32}
    write_manifest(
        folder / "selected.jsonl.manifest.json", "cropi-select", {"seconds": 1.0}, inputs=inputs, options={"by": arm}
    )


def write_stage(
    folder: Path, arm: str, seed: str, stage: int, *, sets: Sequence[str] = ("gcd", "reverse"), steps: int | None = None
) -> None:
    """One stage; with `steps` it is unfinished after so many, and the last line of its metrics is torn."""
    write_selected(folder, arm, stage)
    done = STAGE_STEPS if steps is None else steps
    policy = folder / ("policy" if steps is None else "policy.part")
    offset = (stage - 1) * STAGE_STEPS
    metrics = [
        {"step": step, "loss": 0.1, "reward": 0.5, "tokens_generated": 1000, "tokens_trained": 500}
        for step in range(1, done + 1)
    ]
    write_lines(policy / "metrics.jsonl", metrics)
    shift = {"gcd": -0.1, "reverse": 0.1, "lcm": 0.0}
    evaluations = [
        {
            "step": step,
            "set": name,
            "accuracy": accuracy(arm, seed, offset + step) + shift[name],
            "prompts": 200,
            "samples": 2,
        }
        for step in range(0, done + 1, 10)
        for name in sets
    ]
    write_lines(policy / "evaluations.jsonl", evaluations)
    timings = []
    for step in range(done + 1):
        if step:
            timings.append({"step": step, "seconds_sampling": 1.0, "seconds_update": 2.0, "seconds_evaluation": 0.0})
        if step % 10 == 0:
            timings.append({"step": step, "seconds_sampling": 0.0, "seconds_update": 0.0, "seconds_evaluation": 4.0})
    write_lines(policy / "timings.jsonl", timings)
    if steps is None:
        write_manifest(
            policy / "manifest.json",
            "cropi-train",
            {"seconds": 75.0, "tokens_generated": 20000, "tokens_trained": 10000},
        )
    else:
        with open(policy / "metrics.jsonl", "a") as stream:
            stream.write('{"step": 9, "lo')


def write_run(
    folder: Path, arms: Sequence[str] = ("random", "full", "cropi"), seeds: Sequence[str] = ("1", "2", "3")
) -> Path:
    """A whole run of two stages. From stage 2 on, cropi scores again: 10 s and 5000 tokens."""
    write_start(folder / "start")
    for arm in arms:
        for seed in seeds:
            for stage in (1, 2):
                write_stage(folder / arm / seed / str(stage), arm, seed, stage)
            if arm == "cropi":
                ledger = {"seconds": 10.0, "tokens_scored": 5000}
                write_manifest(folder / arm / seed / "2" / "grads.zarr" / "manifest.json", "cropi-grad", ledger)
    return folder
