"""Training runs in this process, as cropi-train makes them: watched, stopped, killed, and compared byte for byte."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny_policy

from cropi_tools.data.manifest import Fingerprint, Input
from cropi_tools.data.output import Output
from cropi_tools.engines.protocol import Completion, Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.adapters import inject_adapters
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.runtime import signals
from cropi_tools.training.batches import advantage_groups
from cropi_tools.training.checkpoints import resume_folder
from cropi_tools.training.loop import Trainer
from cropi_tools.training.loss_settings import LossSettings
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.trackers import open_trackers
from cropi_tools.training.update import Updater, _means


def options(**given: Any) -> TrainOptions:
    """A record of options where the names of files and folders have no part."""
    return TrainOptions(**{"prompts": ("prompts.jsonl",), "model": "P0", "output": "P1", "steps": 1, **given})


OTHER: dict[str, Any] = {
    "prompts": ("other.jsonl",),
    "model": "P8",
    "output": "P9",
    "steps": 9,
    "preset": "paper",
    "batch": 64,
    "samples": 16,
    "max_tokens": 99,
    "temperature": 0.5,
    "dynamic_sampling": 3,
    "date": "2025-01-01",
    "verifier": "exact",
    "allow_verifier": ("mine.py",),
    "verify_seconds": 3.0,
    "partial_credit": True,
    "aggregation": "sequence",
    "advantage": "leave-one-out",
    "clip": (0.1, 0.3),
    "kl": 0.25,
    "reference": "P7",
    "entropy": 0.125,
    "mask_truncated": True,
    "importance_cap": 2.0,
    "minibatch": 32,
    "learning_rate": 2e-5,
    "schedule": "cosine",
    "warmup": 2,
    "betas": (0.8, 0.95),
    "weight_decay": 0.5,
    "max_gradient_norm": 0.75,
    "carry": "full",
    "collapse": 0.2,
    "lora": 4,
    "against": (("t", "mean.safetensors"),),
    "evaluations": (("t", "test.jsonl"),),
    "eval_every": 3,
    "eval_samples": 4,
    "eval_temperature": 0.375,
    "save_every": 5,
    "checkpoints": 6,
    "state": "drop",
    "save_dtype": "bfloat16",
    "track": ("tensorboard",),
    "engine": "vllm",
    "engine_memory": 0.7,
    "verl_python": "/venv/bin/python",
    "verl_option": ("trainer.nnodes=2",),
    "device": "cpu",
    "dtype": "float32",
    "tokens_per_pass": 32768,
    "checkpoint_activations": True,
    "seed": 11,
    "dry_run": True,
    "as_json": True,
    "force": True,
    "quiet": True,
}
"""For each option a value that is not the default, nor what `options` says: for tests that no option is lost."""


def options_of(loss: LossSettings, **given: Any) -> TrainOptions:
    """Options with this loss; what is asked otherwise has no part in a gradient."""
    words = loss._asdict()
    return options(
        max_tokens=words.pop("fixed_length"), **{"learning_rate": 1e-3, "betas": (0.9, 0.99), **words, **given}
    )


def add_gradient(updater: Updater, rollouts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Add the gradient of one mini-batch's loss to the parameters' `.grad` and go no further; the figures of a step."""
    return _means(updater._gradient(advantage_groups(rollouts, updater._loss, updater._ranks)))


SETTINGS = options(
    steps=6,
    batch=3,
    samples=4,
    max_tokens=6,
    kl=0.1,
    entropy=0.01,
    learning_rate=3e-3,
    schedule="linear",
    warmup=2,
    betas=(0.9, 0.99),
    weight_decay=0.01,
    max_gradient_norm=1.0,
    eval_every=2,
    eval_samples=2,
    eval_temperature=0.7,
    save_every=4,
    collapse=0.0,
)
PARITY = f"{Path(__file__).parent / 'parity.py'}:reward"


class Watched:
    """The embedded engine; asks the run to stop, dies or fails when it samples the given group of responses for training (from 1)."""

    own_weights = False

    def __init__(
        self,
        inner: TransformersEngine,
        stop_at: int | None = None,
        die_at: int | None = None,
        fail_at: int | None = None,
    ) -> None:
        self.inner, self.stop_at, self.die_at, self.fail_at, self.groups = inner, stop_at, die_at, fail_at, 0
        self.seeds: list[int] = []

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        for requests in groups:
            if sampling == SETTINGS.sampling:
                self.groups += 1
                self.seeds += [request.seed for request in requests]
                if self.groups == self.stop_at:
                    signals._stop_signal = signal.SIGTERM
                if self.groups == self.die_at:
                    raise KeyboardInterrupt
                if self.groups == self.fail_at:
                    raise RuntimeError("EngineCore encountered an issue")
            yield self.inner.sample(requests, sampling)


def train(
    model: Path,
    path: Path,
    settings: TrainOptions = SETTINGS,
    *,
    verifier: str = PARITY,
    lora: int = 0,
    carried: Path | None = None,
    trackers: Sequence[str] = (),
    observe: Callable[[Policy], Any] | None = None,
    **watch: int,
) -> list[int]:
    """What cropi-train does, without its process. observe: makes what watches the updates. Returns the seeds sampled for training."""
    inputs = {"policy": Input(str(model), "0" * 64)}
    output = Output(path, Fingerprint("cropi-train", {}, {}), inputs, folder=True)
    assert output.open()
    try:
        start = model if lora else resume_folder(output.part, output.state) or model
        policy = load_policy(str(start), "cpu")._replace(folder=str(model))
        adapters = inject_adapters(policy, lora, 2.0 * lora, 0) if lora else None
        engine = Watched(TransformersEngine(policy), **watch)
        reference = policy if lora else load_policy(str(model), "cpu")
        prompts, evaluations = tiny_policy.prompts(7), {"test": tiny_policy.prompts(4, start=100)}
        with VerifierPool(verifier) as pool:  # one of its own: a killed run leaves it cancelled
            trainer = Trainer(
                policy,
                reference,
                engine,
                pool,
                prompts,
                evaluations,
                settings,
                output,
                trackers=open_trackers(trackers, path, {}, 0),
                adapters=adapters,
                carried=carried,
                by_product=None if observe is None else observe(policy),
            )
            counters = trainer.run()
        output.finish(rows=settings.steps, ledger=counters)
        return engine.seeds
    finally:
        signals._stop_signal = None
        output._release_lock()


def contents(folder: Path) -> dict[str, bytes]:
    """All that must be equal: everything but times and hosts."""
    left_out = ("manifest.json", "timings.jsonl")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in left_out
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_run(path: Path, whole: Path) -> None:
    """Both runs left the same bytes and the same ledger."""
    found, expected = contents(path), contents(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    ledgers = [json.loads((folder / "manifest.json").read_text())["ledger"] for folder in (path, whole)]
    counted = [{k: v for k, v in ledger.items() if not k.startswith("seconds")} for ledger in ledgers]
    assert counted[0] == counted[1]
