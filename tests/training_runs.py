"""Training runs in this process, as cropi-train makes them: watched, stopped, killed, and compared byte for byte."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny_policy

from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.engines.protocol import Completion, Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.adapters import inject_adapters
from cropi_tools.policy.loading import load_policy
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.runtime import signals
from cropi_tools.training.checkpoints import resume_folder
from cropi_tools.training.loop import Trainer
from cropi_tools.training.settings import LossSettings, TrainSettings
from cropi_tools.training.trackers import open_trackers

SETTINGS = TrainSettings(
    steps=6,
    batch=3,
    samples=4,
    sampling=Sampling(6, 1.0),
    loss=LossSettings(1.0, (0.2, 0.2), 0.1, 0.01, "token"),
    learning_rate=3e-3,
    schedule="linear",
    warmup=2,
    betas=(0.9, 0.99),
    weight_decay=0.01,
    max_gradient_norm=1.0,
    evaluate_every=2,
    evaluation_samples=2,
    evaluation_sampling=Sampling(6, 0.7),
    save_every=4,
    seed=0,
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
    settings: TrainSettings = SETTINGS,
    *,
    verifier: str = PARITY,
    lora: int = 0,
    carried: Path | None = None,
    trackers: Sequence[str] = (),
    **watch: int,
) -> list[int]:
    """What cropi-train does, without its process. Returns the seeds sampled for training."""
    output = Output(path, Fingerprint("cropi-train", {}, {}), {}, folder=True)
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
