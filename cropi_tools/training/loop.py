"""The GRPO loop (arXiv 2402.03300; one on-policy update a step, as the paper trains).

Everything random follows from (seed, step): the order of prompts, the seeds of samples, the evaluation's samples. So a resumed run
needs weights, optimizer and the step, and nothing else, to go on bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from cropi_tools import runtime
from cropi_tools.data.errors import CropiError
from cropi_tools.data.jsonl import Record, dump_line
from cropi_tools.data.output import Output
from cropi_tools.engines.protocol import Engine, Sampling, sample_seed
from cropi_tools.policy.loading import Policy
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rollouts.sampling import Task, sample_and_verify
from cropi_tools.rollouts.tally import Tallies
from cropi_tools.training.checkpoints import keep_only, load_optimizer, promote, resume_folder, save_checkpoint
from cropi_tools.training.engine_sync import EngineSync
from cropi_tools.training.update import LossSettings, backward, clip_gradient

LOGS = ("metrics.jsonl", "evaluations.jsonl", "timings.jsonl")


class TrainSettings(NamedTuple):
    """A run's values. batch: prompts a step; samples: responses a prompt; learning_rate after `warmup` steps, then by `schedule`."""

    steps: int
    batch: int
    samples: int
    sampling: Sampling
    loss: LossSettings
    learning_rate: float
    schedule: Literal["constant", "linear"]
    warmup: int
    betas: tuple[float, float]
    weight_decay: float
    max_gradient_norm: float
    evaluate_every: int
    evaluation_samples: int
    evaluation_sampling: Sampling
    save_every: int
    seed: int


class PromptOrder:
    """The endless stream of epochs over the prompts: each epoch a new order by a seeded hash of the ids, whatever the order of the file."""

    def __init__(self, prompts: Sequence[Record], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._orders: dict[int, list[Record]] = {}

    def batch(self, step: int, size: int) -> list[tuple[int, Record]]:
        """The prompts of a step (from 1) with their place in the stream."""
        places = range((step - 1) * size, step * size)
        epochs = {place // len(self._prompts) for place in places}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        return [(place, self._orders[place // len(self._prompts)][place % len(self._prompts)]) for place in places]

    def _order(self, epoch: int) -> list[Record]:
        return sorted(
            self._prompts, key=lambda record: (sample_seed(self._seed, "order", epoch, record["id"]), record["id"])
        )


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of a step (from 1): linear warm-up, then constant or linearly down to zero after the last step."""
    if step <= settings.warmup:
        return settings.learning_rate * step / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (settings.steps - step + 1) / max(settings.steps - settings.warmup, 1)


class _Logs:
    """The run's JSONL files; lines after the last checkpoint are dropped on resume."""

    def __init__(self, part: Path, sizes: Mapping[str, int]) -> None:
        self._streams = {}
        for name in LOGS:
            stream = open(part / name, "a", encoding="utf-8")
            stream.truncate(sizes.get(name, 0))
            stream.seek(0, os.SEEK_END)
            self._streams[name] = stream

    def write(self, name: str, record: Record) -> None:
        self._streams[name].write(dump_line(record) + "\n")
        self._streams[name].flush()

    def sync(self) -> dict[str, int]:
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        return {name: stream.tell() for name, stream in self._streams.items()}

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


class Trainer:
    """Trains `policy` in place on `prompts`, writing into an opened `Output` folder.

    evaluations: prompts by set name. reference: the policy the KL term holds on to, or None.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        engine: Engine,
        pool: VerifierPool,
        prompts: Sequence[Record],
        evaluations: Mapping[str, Sequence[Record]],
        settings: TrainSettings,
        output: Output,
    ) -> None:
        self._policy, self._reference, self._engine, self._pool = policy, reference, engine, pool
        self._evaluations, self._settings, self._output = evaluations, settings, output
        self._order = PromptOrder(prompts, settings.seed)
        self._parameters = [parameter for _, parameter in policy.trained]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self._step = output.state.get("step", 0)
        self._counters = {"tokens_generated": 0, "tokens_trained": 0, **output.state.get("counters", {})}
        found = resume_folder(output.part, output.state)
        if found is not None:
            load_optimizer(found, policy, self._optimizer)
        self._logs = _Logs(output.part, output.state.get("logs", {}))
        self._sync = None
        if engine.own_weights:
            self._sync = EngineSync(engine, policy, prompts, settings.sampling, settings.loss.autocast, settings.seed)
        self._mismatch: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the ledger's counters. Raises Interrupted after a checkpoint when a signal asks to stop."""
        settings = self._settings
        note = ""
        with contextlib.closing(self._logs), runtime.progress("training", settings.steps, self._step) as shown:
            self._hand_over(self._step)
            if self._step == 0:
                self._evaluate(0)
            while self._step < settings.steps:
                step = self._step + 1
                note = self._train_step(step)
                self._step = step
                if step % settings.evaluate_every == 0 or step == settings.steps:
                    note = self._evaluate(step) or note
                shown.advance(note=note)
                if step == settings.steps or step % settings.save_every == 0 or runtime.stop_requested():
                    self._save(step)
                    if step < settings.steps:
                        runtime.stop_if_requested()
        checkpoint = resume_folder(self._output.part, self._output.state)
        if checkpoint is not None and checkpoint != self._output.part:
            promote(self._output.part, checkpoint)
            # from here on the part is where a killed run goes on: hashing large weights leaves time for a kill
            self._output.commit({**self._output.state, "promoted": True})
        keep_only(self._output.part, self._output.part)
        return self._counters

    def _train_step(self, step: int) -> str:
        settings = self._settings
        started = time.monotonic()
        drawn = self._order.batch(step, settings.batch)
        tasks = [
            Task(record, (settings.seed, "train", place, record["id"]), settings.samples) for place, record in drawn
        ]
        rollouts = sample_and_verify(self._engine, self._policy.tokens, self._pool, tasks, settings.sampling)
        sampled = time.monotonic()
        found = backward(self._policy, self._reference, rollouts, settings.loss)
        norm = clip_gradient(self._parameters, settings.max_gradient_norm)
        if not (math.isfinite(norm) and math.isfinite(found["loss"])):
            raise CropiError(
                f"{self._output.path}: loss {found['loss']} and gradient norm {norm} at step {step}; "
                f"the last checkpoint in {self._output.part} is good; lower --learning-rate"
            )
        rate = learning_rate(settings, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        tallies = Tallies()
        tallies.add(rollouts)
        total = tallies.total()
        summary = total.summary()
        self._counters["tokens_generated"] += total.tokens
        self._counters["tokens_trained"] += int(found["tokens_trained"])
        self._logs.write(
            "metrics.jsonl",
            {
                "step": step,
                "loss": found["loss"],
                "reward": summary["mean_reward"],
                "accuracy": summary["accuracy"],
                "entropy": found["entropy"],
                "kl": found["kl"],
                "behavior_kl": found["behavior_kl"],
                "clip_fraction": found["clip_fraction"],
                "zero_variance_fraction": summary["equal_rewards_fraction"],
                "response_tokens": summary["response_tokens"],
                "truncated_fraction": summary["truncated_fraction"],
                "gradient_norm": norm,
                "learning_rate": rate,
                "tokens_generated": total.tokens,
                "tokens_trained": int(found["tokens_trained"]),
                **self._mismatch,
            },
        )
        self._hand_over(step)
        updated = time.monotonic()
        self._logs.write(
            "timings.jsonl",
            {
                "step": step,
                "seconds_sampling": sampled - started,
                "seconds_update": updated - sampled,
                "seconds_evaluation": 0.0,
            },
        )
        return f"accuracy {summary['accuracy']:.3f}"

    def _hand_over(self, step: int) -> None:
        """Give the weights after `step` to an engine that has its own, and check that it samples from them."""
        if self._sync is None:
            return
        try:
            self._mismatch = {"engine_mismatch": self._sync(step)}
        except CropiError as error:
            saved = f"; the last checkpoint in {self._output.part} is good" if self._output.state else ""
            raise type(error)(f"{self._output.path}: {error}{saved}") from None

    def _evaluate(self, step: int) -> str:
        """Accuracy on every evaluation set; the same sample seeds at every step, so that differences are the policy's."""
        settings = self._settings
        started = time.monotonic()
        found = []
        for name, records in self._evaluations.items():
            count = settings.evaluation_samples
            tasks = [Task(record, (settings.seed, "evaluation", name, record["id"]), count) for record in records]
            rows = sample_and_verify(self._engine, self._policy.tokens, self._pool, tasks, settings.evaluation_sampling)
            tallies = Tallies()
            tallies.add(rows)
            total = tallies.total()
            summary = total.summary()
            self._counters["tokens_evaluated"] = self._counters.get("tokens_evaluated", 0) + total.tokens
            self._logs.write(
                "evaluations.jsonl",
                {
                    "step": step,
                    "set": name,
                    "accuracy": summary["accuracy"],
                    "prompts": len(records),
                    "samples": settings.evaluation_samples,
                    "truncated_fraction": summary["truncated_fraction"],
                    "response_tokens": summary["response_tokens"],
                },
            )
            found.append(f"{name} {summary['accuracy']:.3f}")
        if found:
            seconds = time.monotonic() - started
            self._logs.write(
                "timings.jsonl",
                {"step": step, "seconds_sampling": 0.0, "seconds_update": 0.0, "seconds_evaluation": seconds},
            )
            runtime.notify(f"step {step}: accuracy " + ", ".join(found))
        return ", ".join(found)

    def _save(self, step: int) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            raise CropiError(
                f"{self._output.path}: the weights are not finite after step {step}; the last checkpoint in {self._output.part} is good; "
                "lower --learning-rate"
            )
        folder = save_checkpoint(self._output.part, step, self._policy, self._optimizer)
        self._output.commit({"step": step, "logs": self._logs.sync(), "counters": self._counters})
        keep_only(self._output.part, folder)
