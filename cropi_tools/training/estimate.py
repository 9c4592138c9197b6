"""What a run will cost, from steps of it that are really made in a temporary folder: `cropi-train --dry-run`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import dump_line, read_jsonl
from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.data.records import read_prompts
from cropi_tools.rewards.grades import Grade
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.runtime.estimate import Estimate, in_bytes, in_seconds, measured
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.run import train

PROBE_STEPS = 2  # the first one warms up
PROBE_RESPONSES = 256  # of a step, at most: from so many on, time follows their number
PROBE_PROMPTS = 32  # of an evaluation set


class _Steps(NamedTuple):
    """Of one step, with fewer prompts than the run's: seconds, and tokens sampled. evaluation: seconds of one, of all prompts of all sets.

    checkpoint: bytes. live: whether any sampled prompt had an advantage.
    """

    sampling: float
    update: float
    tokens: float
    evaluation: float
    checkpoint: int
    live: bool


class MadeUp(VerifierPool):
    """Rewards that say nothing of the responses but differ within every prompt, so that all of them have an advantage."""

    def grade_many(self, items: Sequence[tuple[Mapping[str, Any], str]]) -> list[Grade]:
        """One response is right, the next one wrong."""
        return [Grade(float(number % 2), "correct" if number % 2 else "wrong") for number in range(len(items))]


def estimate(options: TrainOptions, own_verifiers: Mapping[str, str]) -> Estimate:
    """Make PROBE_STEPS steps of as many prompts as there is time for, and a part of the evaluation. own_verifiers: as of `train`.

    Where no sampled prompt had an advantage, nothing was updated: then a step with made-up rewards tells how long an update may take.
    """
    most = min(options.batch, max(1, PROBE_RESPONSES // options.samples))
    found = measured(
        range(most),
        lambda part: _steps(options, own_verifiers, len(part), evaluating=True),
        # vLLM takes longest to load, and is loaded anew each time
        fewest=most if options.engine == "vllm" else 1,
        warming=options.engine != "vllm",
    )
    once: _Steps = found.result
    if not once.live:
        made_up = replace(options, evaluations=(), dynamic_sampling=0)
        with runtime.only_this_progress():
            once = once._replace(update=_steps(made_up, own_verifiers, found.items, False, MadeUp).update)
    share, steps = found.share(options.batch), options.steps
    sampling, update = once.sampling * share, once.update * share
    evaluations = (1 + -(-steps // options.eval_every)) * once.evaluation
    kept = min(options.checkpoints, -(-steps // options.save_every)) + 1  # one more while it is written
    part = "" if found.items == options.batch else f" of {found.items} prompts"
    notes = [f"        {in_bytes(once.checkpoint)} a checkpoint; responses may grow longer in training"]
    if not once.live:
        notes.append(
            "        no sampled prompt had responses of different rewards: the update is one with made-up rewards, the longest"
        )
    return Estimate(
        f"{steps} steps of {options.batch} prompts, {options.batch * options.samples} responses each",
        steps * (sampling + update) + evaluations,
        once.checkpoint * kept,
        f"{PROBE_STEPS} steps{part} that were really made",
        found.seconds,
        once.tokens * share * steps,
        f" ({in_seconds(sampling)} sampling and {in_seconds(update)} update a step, {in_seconds(evaluations)} in evaluations)",
        notes,
        {
            "steps": steps,
            "seconds_sampling": sampling,
            "seconds_update": update,
            "seconds_evaluations": evaluations,
            "checkpoint": once.checkpoint,
            "live": once.live,
        },
    )


def _steps(
    options: TrainOptions,
    own_verifiers: Mapping[str, str],
    batch: int,
    evaluating: bool,
    grading: type[VerifierPool] = VerifierPool,
) -> _Steps:
    """PROBE_STEPS steps of so many prompts; the last one tells. evaluating: also evaluate, on a part of each set."""
    with tempfile.TemporaryDirectory() as scratch:
        # so many that an evaluation samples as many responses as a step
        prompts = max(1, min(PROBE_PROMPTS, batch * options.samples // options.eval_samples))
        shares = {
            name: _part(path, Path(scratch) / f"{number}.jsonl", prompts)
            for number, (name, path) in enumerate(options.evaluations if evaluating else ())
        }
        probe = replace(
            options,
            steps=PROBE_STEPS,
            batch=batch,
            minibatch=0 if batch < options.batch else options.minibatch,
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
        train(probe, own_verifiers, output, Ranks(), grading)
        times = _records(output.path / "timings.jsonl")
        metrics = _records(output.path / "metrics.jsonl")
        checkpoint = sum(path.stat().st_size for path in output.path.rglob("*") if path.is_file())
    last = next(record for record in reversed(times) if record["step"] == PROBE_STEPS and record["seconds_sampling"])
    live = [record["step"] for record in metrics if record["tokens_trained"]]
    updates = [record["seconds_update"] for record in times if record["step"] in live and record["seconds_sampling"]]
    evaluated = [record["seconds_evaluation"] for record in times if record["seconds_evaluation"]]
    whole = sum(share for _, share in shares.values()) / max(len(shares), 1)
    return _Steps(
        last["seconds_sampling"],
        updates[-1] if updates else 0.0,
        metrics[-1]["tokens_generated"],
        min(evaluated, default=0.0) * whole,
        checkpoint,
        bool(live),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(path)]


def _part(path: str, target: Path, prompts: int) -> tuple[str, float]:
    """The first prompts of a set as a file, and how many times as many there are."""
    records = list(read_prompts([path]))
    part = list(itertools.islice(records, prompts))
    target.write_text("".join(dump_line(record) + "\n" for record in part), encoding="utf-8")
    return str(target), len(records) / max(len(part), 1)
