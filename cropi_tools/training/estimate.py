"""What a run will cost, from two steps of it that are really made in a temporary folder: `cropi-train --dry-run`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cropi_tools.data.jsonl import dump_line, read_jsonl
from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.data.records import read_prompts
from cropi_tools.rollouts.estimate import in_bytes, in_seconds, memory_used
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.run import train

PROBE_STEPS = 2  # the first one warms up
PROBE_PROMPTS = 32  # of an evaluation set


class TrainingCost(NamedTuple):
    """Of the whole command: seconds, and bytes on disk at most. sampling, update: seconds of one step. memory: bytes that were held at most, of
    this process and of the GPU.
    """

    steps: int
    sampling: float
    update: float
    evaluations: float
    seconds: float
    checkpoint: int
    disk: float
    memory: tuple[int, int]

    def lines(self) -> list[str]:
        """For people."""
        host, gpu = self.memory
        step = f"{in_seconds(self.sampling)} sampling and {in_seconds(self.update)} update a step"
        return [
            f"time:   {in_seconds(self.seconds)} for {self.steps} steps ({step}, {in_seconds(self.evaluations)} in evaluations), loading apart",
            f"disk:   {in_bytes(self.disk)} at most, {in_bytes(self.checkpoint)} a checkpoint",
            f"memory: {in_bytes(host)}{f', {in_bytes(gpu)} on the GPU' if gpu else ''}",
            f"from {PROBE_STEPS} steps that were really made; nothing was written. Responses may grow longer in training",
        ]


def estimate(options: TrainOptions, own_verifiers: Mapping[str, str]) -> TrainingCost:
    """Make PROBE_STEPS steps and a part of the evaluation. own_verifiers: as of `train`."""
    steps = options.steps
    with tempfile.TemporaryDirectory() as scratch:
        shares = {
            name: _part(path, Path(scratch) / f"{number}.jsonl")
            for number, (name, path) in enumerate(options.evaluations)
        }
        probe = replace(
            options,
            steps=PROBE_STEPS,
            save_every=PROBE_STEPS,
            eval_every=PROBE_STEPS,
            checkpoints=1,
            # what a checkpoint takes while the run lasts
            state="keep",
            save_dtype="float32",
            collapse=0.0,
            evaluations=tuple((name, path) for name, (path, _) in shares.items()),
            track=(),
        )
        output = Output(Path(scratch) / "policy", Fingerprint("cropi-train", {}, {}), {}, folder=True)
        output.open()
        train(probe, own_verifiers, output, Ranks())
        times = [record for _, record in read_jsonl(output.path / "timings.jsonl")]
        checkpoint = sum(path.stat().st_size for path in output.path.rglob("*") if path.is_file())
    last = next(record for record in reversed(times) if record["step"] == PROBE_STEPS and record["seconds_update"])
    evaluated = [record["seconds_evaluation"] for record in times if record["seconds_evaluation"]]
    rounds = 1 + -(-steps // options.eval_every)
    whole = sum(share for _, share in shares.values()) / max(len(shares), 1)
    evaluations = rounds * min(evaluated, default=0.0) * whole
    sampling, update = last["seconds_sampling"], last["seconds_update"]
    kept = min(options.checkpoints, -(-steps // options.save_every)) + 1  # one more while it is written
    return TrainingCost(
        steps,
        sampling,
        update,
        evaluations,
        steps * (sampling + update) + evaluations,
        checkpoint,
        checkpoint * kept,
        memory_used(),
    )


def _part(path: str, target: Path) -> tuple[str, float]:
    """The first prompts of a set as a file, and how many times as many there are."""
    records = list(read_prompts([path]))
    part = list(itertools.islice(records, PROBE_PROMPTS))
    target.write_text("".join(dump_line(record) + "\n" for record in part), encoding="utf-8")
    return str(target), len(records) / max(len(part), 1)
