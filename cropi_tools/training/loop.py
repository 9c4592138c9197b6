"""The GRPO loop (arXiv 2402.03300): rollout, reward, advantage, for each mini-batch the objective and a step of the optimizer.

Everything random follows from the seed and a place in the stream of prompts: their order, the seeds of samples, the evaluation's samples. So a
resumed run needs weights, optimizer, step and place, and nothing else, to resume bit for bit on a CPU.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.data.output import Output
from cropi_tools.engines.protocol import Engine
from cropi_tools.policy.adapters import adapter_tensors, load_adapters
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.merging import check_merge
from cropi_tools.policy.precision import loss_in_saving
from cropi_tools.policy.weights import checkpoint_weights
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rollouts.metrics import Tally
from cropi_tools.runtime.clock import work_time
from cropi_tools.runtime.errors import CropiError, first_line
from cropi_tools.training.checkpoints import (
    checkpoint_folder,
    drop_pending,
    drop_states,
    keep_newest,
    load_optimizer,
    optimizer_tensors,
    promote,
    read_pending,
    resume_folder,
    save_checkpoint,
    write_pending,
)
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.divergence import Watch
from cropi_tools.training.engine_sync import EngineSync
from cropi_tools.training.evaluation import evaluate
from cropi_tools.training.learning_rate import learning_rate
from cropi_tools.training.logs import INFLUENCE, Logs, live_note
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.sampling import Sampled, StepSampler, Stopped
from cropi_tools.training.trackers import Tracker
from cropi_tools.training.update import NotFinite, Updater

if TYPE_CHECKING:
    from cropi_tools.training.influence import ByProduct

FAILURE = "failure.txt"  # in the part: what a failed engine said at length

T = TypeVar("T")


class Trainer:
    """Trains `policy` in place on `prompts`, writing into an opened `Output` folder (the first of several processes does).

    evaluations: prompts by set name. reference: the policy the KL term holds on to, or None; the policy itself where adapters are trained, whose
    peft settings are `adapters`. carried: a policy folder whose optimizer state a new run starts with. by_product: what each update says of
    its prompts.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        engine: Engine,
        pool: VerifierPool,
        prompts: Sequence[Record],
        evaluations: Mapping[str, Sequence[Record]],
        options: TrainOptions,
        output: Output,
        *,
        ranks: Ranks | None = None,
        autocast: bool = False,
        adapters: Any = None,
        carried: Path | None = None,
        trackers: Sequence[Tracker] = (),
        by_product: ByProduct | None = None,
    ) -> None:
        self._policy, self._engine, self._pool = policy, engine, pool
        self._evaluations, self._options, self._output = evaluations, options, output
        self._ranks, self._autocast, self._adapters = ranks or Ranks(), autocast, adapters
        self._by_product = by_product
        self._updater = Updater(policy, reference, options, self._ranks, autocast, by_product)
        self._sampler = StepSampler(engine, policy.tokens, pool, prompts, options, self._ranks)
        state = output.state
        self._step, self._place = state.get("step", 0), state.get("place", 0)
        self._evaluated = state.get("evaluated", -1)
        self._pending = read_pending(output.part, state)
        self._counters = {"tokens_generated": 0, "tokens_trained": 0, **state.get("counters", {})}
        self._updater.tokens_per_pass = min(
            state.get("tokens_per_pass", options.tokens_per_pass), options.tokens_per_pass
        )
        self._watch = Watch(options.collapse_share, state.get("watch"))
        found = resume_folder(output.part, state) or carried
        if found is not None:
            if self._needs_state():
                load_optimizer(found, policy, self._updater.optimizer)
            if adapters is not None:
                load_adapters(policy.model, found)
        self._logs = Logs(
            output.part if self._ranks.first else None, state.get("logs", {}), trackers, by_product is not None
        )
        self._sync = None
        if engine.own_weights:
            self._sync = EngineSync(engine, policy, prompts, options.sampling, autocast, options.seed)
        self._mismatch: dict[str, float] = {}
        self._last: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the ledger's counters. Raises Interrupted after a checkpoint when a signal asks to stop."""
        options = self._options
        self._tell_kept()
        with self._logs, runtime.progress("training", options.steps, self._step) as shown:
            self._hand_over(self._step)
            self._output.begin_work()
            before = self._evaluated
            self._evaluate_if_due()
            if self._evaluations and self._evaluated != before:
                self._save()
            self._stop_if_requested()
            while self._step < options.steps:
                note = self._train_step(self._step + 1)
                self._step += 1
                shown.advance(note=note)
                self._evaluate_if_due()
                if self._step == options.steps or self._step % options.save_every == 0:
                    self._save()
                self._stop_if_requested()
        self._promote()
        return self._counters

    def _train_step(self, step: int) -> str:
        started = work_time()
        try:
            sampled = self._guarded(lambda: self._sampler.sample(self._place, self._pending), step)
        except Stopped as stopped:
            self._pending = dict(stopped.pending)
            self._save()
            runtime.stop_now()
        between = work_time()
        rate = learning_rate(self._options, step)
        try:
            figures = self._updater.step(sampled.parts, rate)
        except NotFinite as error:
            raise self._failed(f"{error} at step {step}", "lower --learning-rate") from None
        self._place, self._pending = sampled.place, {}
        for record in self._by_product.records(step, sampled.parts) if self._by_product else ():
            self._logs.write(INFLUENCE, record)
        self._count(step, sampled, figures, rate)
        self._hand_over(step)
        seconds = {"seconds_sampling": between - started, "seconds_update": work_time() - between}
        self._logs.write("timings.jsonl", {"step": step, **seconds, "seconds_evaluation": 0.0})
        # of a policy that has nearly collapsed, the few groups that still train say too much
        reason = self._watch.check({**self._last, "entropy": min(self._last["entropy"], sampled.entropy)})
        if reason is not None:
            raise self._failed(f"stopped at step {step}: {reason}")
        self._warn(self._watch.warning())
        return live_note(self._last, sampled.tally.tokens / sum(seconds.values()))

    def _count(self, step: int, sampled: Sampled, figures: Mapping[str, float], rate: float) -> None:
        """The step's line in metrics.jsonl, and the ledger."""
        options, summary = self._options, sampled.tally.summary()
        self._counters["tokens_generated"] += sampled.tally.tokens
        self._counters["tokens_trained"] += int(figures["tokens_trained"])
        optional = {
            "capped_fraction": figures["capped_fraction"] if options.importance_cap > 0 else None,
            "refill_rounds": sampled.rounds if options.dynamic_sampling else None,
        }
        self._last = {
            "step": step,
            "loss": figures["loss"],
            "reward": summary["mean_reward"],
            "accuracy": summary["accuracy"],
            # where nothing went through the policy, the sampled tokens tell it
            "entropy": figures["entropy"] if figures["tokens_trained"] else sampled.entropy,
            "kl": figures["kl"],
            "behavior_kl": figures["behavior_kl"],
            "behavior_gap": figures["behavior_gap"],
            "clip_fraction": figures["clip_fraction"],
            **{name: value for name, value in optional.items() if value is not None},
            "zero_variance_fraction": summary["equal_rewards_fraction"],
            "response_tokens": summary["response_tokens"],
            "truncated_fraction": summary["truncated_fraction"],
            "unverified_fraction": sampled.tally.lost / sampled.tally.samples,
            "gradient_norm": figures["gradient_norm"],
            "learning_rate": rate,
            "tokens_generated": sampled.tally.tokens,
            "tokens_trained": int(figures["tokens_trained"]),
            **self._mismatch,
        }
        self._logs.write("metrics.jsonl", self._last)

    def _hand_over(self, step: int) -> None:
        """Give the weights after `step` to an engine that has its own, and check that it samples from them."""
        if self._sync is None:
            return
        try:
            self._mismatch = {"engine_mismatch": self._sync(step)}
        except CropiError as error:
            raise self._failed(str(error)) from None

    def _evaluate_if_due(self) -> None:
        """Evaluate at step 0, every so many steps and at the end, unless a signal asks to stop: then after the resume."""
        step, options = self._step, self._options
        due = step % options.eval_every == 0 or step == options.steps
        if not due or self._evaluated == step or self._ranks.any(runtime.stop_requested()):
            return
        started = work_time()
        found = self._guarded(
            lambda: evaluate(self._engine, self._policy.tokens, self._pool, self._evaluations, options, self._ranks),
            step,
        )
        if found is None:
            return
        self._evaluated = step
        for name, counts in found.items():
            self._write_evaluation(step, name, counts)
        if found:
            times = {"seconds_sampling": 0.0, "seconds_update": 0.0, "seconds_evaluation": work_time() - started}
            self._logs.write("timings.jsonl", {"step": step, **times})
            if self._ranks.first:
                accuracies = ", ".join(
                    f"{name} {counts.correct / counts.samples:.3f}" for name, counts in found.items()
                )
                runtime.notify(f"step {step}: accuracy {accuracies}")

    def _write_evaluation(self, step: int, name: str, counts: Tally) -> None:
        summary = counts.summary()
        self._counters["tokens_evaluated"] = self._counters.get("tokens_evaluated", 0) + counts.tokens
        self._logs.write(
            "evaluations.jsonl",
            {
                "step": step,
                "set": name,
                "accuracy": summary["accuracy"],
                "accuracy_interval": summary["accuracy_interval"],
                "prompts": counts.prompts,
                "samples": self._options.eval_samples,
                "truncated_fraction": summary["truncated_fraction"],
                "response_tokens": summary["response_tokens"],
            },
        )

    def _stop_if_requested(self) -> None:
        """End here, with everything saved, if any process was asked to and anything is left to do: steps, or the last one's evaluation."""
        left = self._step < self._options.steps or (self._evaluations and self._evaluated != self._step)
        if left and self._ranks.any(runtime.stop_requested()):
            self._save()
            runtime.stop_now()

    def _save(self) -> None:
        """A checkpoint of this step, unless there is one, and the commit that names it. Without one where the step looks like a collapse: the
        last good one stays.
        """
        part, state = self._output.part, self._output.state
        if self._step and state.get("step") != self._step:
            if self._watch.suspicious():
                if self._step < self._options.steps:
                    return
                self._warn(
                    f"{self._output.path}: the last step looks like a collapse; see metrics.jsonl before using this policy"
                )
            self._write_checkpoint()
        found = {
            "step": self._step,
            "place": self._place,
            "pending": len(self._pending),
            "evaluated": self._evaluated,
            "tokens_per_pass": self._updater.tokens_per_pass,
            "watch": self._watch.state(),
            "logs": self._logs.sync(),
            "counters": self._counters,
        }
        if not self._ranks.first:
            # what is saved decides what is collective next: all must know it
            self._output.state = found
            return
        if self._pending:
            write_pending(part, self._pending)
        self._output.commit(found)
        self._tell_kept()
        keep_newest(part, self._options.checkpoints)

    def _tell_kept(self) -> None:
        """For the line of an interrupted run."""
        state, more = self._output.state, "and rollouts of the next one" if self._pending else ""
        step, steps = state.get("step", 0), self._options.steps
        runtime.keeps(f"{step} of {steps} steps {more}".strip() if step or more else None)

    def _write_checkpoint(self) -> None:
        policy, first = self._policy, self._ranks.first
        broken = any(not bool(torch.isfinite(_own_part(parameter)).all()) for parameter in self._updater.parameters)
        if self._ranks.any(broken):
            raise self._failed(f"the weights are not finite after step {self._step}", "lower --learning-rate")
        weights = None
        if self._adapters is not None or self._ranks.size > 1:
            # all processes gather, the first one keeps
            weights = {name: tensor.cpu() for name, tensor in checkpoint_weights(policy.model) if first}
        if self._adapters is not None:
            try:
                check_merge(policy.model, weights, self._ranks.size > 1 and self._autocast)
            except CropiError as error:
                raise self._failed(str(error), "train all weights: leave --lora out") from None
        moments = None
        if self._needs_state():
            states = optimizer_tensors(policy, self._updater.optimizer)
            moments = {name: tensor.cpu() for name, tensor in states if first}
        adapters = None if self._adapters is None else (self._adapters, adapter_tensors(policy.model))
        if not first:
            return
        try:
            save_checkpoint(self._output.part, self._step, policy, weights, moments, adapters)
        except (OSError, SafetensorError) as error:
            folder = checkpoint_folder(self._output.part, self._step)
            raise self._failed(f"{folder}: cannot be written ({first_line(error)})", "make room") from None

    def _needs_state(self) -> bool:
        """Whether anybody will read the optimizer's state of this step: a later step, or whoever takes the finished policy."""
        return self._step < self._options.steps or self._options.state == "keep"

    def _promote(self) -> None:
        """Make the last checkpoint the policy."""
        output, options = self._output, self._options
        if not self._ranks.first:
            return
        checkpoint = resume_folder(output.part, output.state)
        if checkpoint is not None and checkpoint != output.part:
            if options.save_dtype != "float32":
                self._warn(loss_in_saving(str(output.path), checkpoint, self._policy.folder, options.save_dtype))
            promote(output.part, checkpoint, options.save_dtype)
            # from here on the part is where a killed run goes on: hashing large weights leaves time for a kill
            output.commit({**output.state, "promoted": True})
        shutil.rmtree(checkpoint_folder(output.part, options.steps), ignore_errors=True)
        keep_newest(output.part, options.checkpoints - 1)
        if options.state == "drop":
            drop_states(output.part)
        drop_pending(output.part)
        (output.part / FAILURE).unlink(missing_ok=True)

    def _guarded(self, work: Callable[[], T], step: int) -> T:
        """What samples, with its failures told as an end of the run."""
        try:
            return work()
        except (CropiError, Stopped):
            raise
        except Exception as error:
            told = self._output.part / FAILURE
            told.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            raise self._failed(
                f"the engine failed at step {step} ({type(error).__name__}: {first_line(error)}; all of it in {told})"
            ) from error

    def _warn(self, sentence: str | None) -> None:
        if sentence is not None and self._ranks.first:
            runtime.warn(sentence)

    def _failed(self, what: str, remedy: str = "") -> CropiError:
        """The error that ends a run: what happened, what is left, what to do."""
        found = resume_folder(self._output.part, self._output.state)
        left = f"the last checkpoint, {found}, is good" if found else "no step was saved yet"
        again = "the same command resumes from there" if found else "the same command starts again"
        return CropiError(f"{self._output.path}: {what}; {left}, {again}{'; ' + remedy if remedy else ''}")


def _own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
