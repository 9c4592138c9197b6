"""The training loop: exact resume, the order of prompts, the learning rate, and that it learns what is rewarded."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from safetensors.torch import load_file

from cropi_tools import runtime
from cropi_tools.data.errors import CropiError, Interrupted
from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.engines.protocol import Completion, Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.loading import load_policy
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.training import loop
from cropi_tools.training.checkpoints import resume_folder
from cropi_tools.training.loop import PromptOrder, Trainer, TrainSettings, learning_rate
from cropi_tools.training.update import LossSettings

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
PARITY = f"{Path(__file__).parent.parent / 'parity.py'}:reward"


class Watched:
    """The embedded engine; asks the run to stop, or dies, when it samples for the given training step."""

    own_weights = False

    def __init__(self, inner: TransformersEngine, stop_at: int | None = None, die_at: int | None = None) -> None:
        self.inner, self.stop_at, self.die_at, self.steps = inner, stop_at, die_at, 0
        self.seeds: list[int] = []

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if sampling == SETTINGS.sampling:
            self.steps += 1
            self.seeds += [request.seed for request in requests]
            if self.steps == self.stop_at:
                runtime._stop_signal = signal.SIGTERM
            if self.steps == self.die_at:
                raise KeyboardInterrupt
        return self.inner.sample(requests, sampling)


@pytest.fixture(scope="module")
def pool() -> Any:
    with VerifierPool(PARITY) as made:
        yield made


def train(model: Path, path: Path, pool: VerifierPool, settings: TrainSettings = SETTINGS, **watch: int) -> list[int]:
    """What cropi-train does, without its process. Returns the seeds sampled for training."""
    output = Output(path, Fingerprint("cropi-train", {}, {}), {}, folder=True)
    assert output.open()
    try:
        start = resume_folder(output.part, output.state)
        policy = load_policy(str(start or model), "cpu")._replace(folder=str(model))
        engine = Watched(TransformersEngine(policy), **watch)
        reference = load_policy(str(model), "cpu")
        prompts, evaluations = tiny_policy.prompts(7), {"test": tiny_policy.prompts(4, start=100)}
        counters = Trainer(policy, reference, engine, pool, prompts, evaluations, settings, output).run()
        output.finish(rows=settings.steps, ledger=counters)
        return engine.seeds
    finally:
        runtime._stop_signal = None
        output._release_lock()


def contents(folder: Path) -> dict[str, bytes]:
    """All that must be equal: everything but times and hosts."""
    left_out = ("manifest.json", "timings.jsonl")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in left_out
    }


@pytest.fixture(scope="module")
def whole(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory, pool: VerifierPool) -> tuple[Path, list[int]]:
    path = tmp_path_factory.mktemp("whole") / "P1"
    return path, train(policy_folder, path, pool)


def same_as_whole(path: Path, whole: Path) -> None:
    found, expected = contents(path), contents(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    ledgers = [json.loads((folder / "manifest.json").read_text())["ledger"] for folder in (path, whole)]
    assert {k: v for k, v in ledgers[0].items() if k != "seconds"} == {
        k: v for k, v in ledgers[1].items() if k != "seconds"
    }


def test_a_run_leaves_a_whole_policy(whole: tuple[Path, list[int]], policy_folder: Path) -> None:
    path, seeds = whole
    names = set(contents(path))
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "metrics.jsonl",
        "evaluations.jsonl",
    } <= names
    assert not [name for name in names if "checkpoint" in name or "progress" in name]
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert any(record["gradient_norm"] > 0 for record in steps)
    evaluations = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    assert [(record["step"], record["set"]) for record in evaluations] == [(step, "test") for step in (0, 2, 4, 6)]
    assert len(set(seeds)) == len(seeds) == 6 * 3 * 4  # no seed is used twice, also when a prompt comes again
    before, after = load_file(policy_folder / "model.safetensors"), load_file(path / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (path / "tokenizer.json").read_bytes() == (policy_folder / "tokenizer.json").read_bytes()
    loaded = load_policy(str(path), "cpu")
    assert all(torch.equal(parameter, after[name]) for name, parameter in loaded.model.named_parameters())


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_stopped_and_resumed_equals_straight(
    stop_at: int, whole: tuple[Path, list[int]], policy_folder: Path, tmp_path: Path, pool: VerifierPool
) -> None:
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", pool, stop_at=stop_at)
    seeds = train(policy_folder, tmp_path / "P1", pool)
    assert len(seeds) == (6 - stop_at) * 12  # finished steps are not sampled again
    same_as_whole(tmp_path / "P1", whole[0])


def test_killed_after_a_checkpoint_equals_straight(
    whole: tuple[Path, list[int]], policy_folder: Path, tmp_path: Path, pool: VerifierPool
) -> None:
    """Killed in step 6, after lines of step 5 were logged: both are done again."""
    with pytest.raises(KeyboardInterrupt):
        train(policy_folder, tmp_path / "P1", pool, die_at=6)
    assert len((tmp_path / "P1.part" / "metrics.jsonl").read_text().splitlines()) == 5
    assert len(train(policy_folder, tmp_path / "P1", pool)) == 2 * 12
    same_as_whole(tmp_path / "P1", whole[0])


@pytest.mark.parametrize("last", ["promote", "commit", "keep_only", "finish"])
def test_killed_after_the_last_step_equals_straight(
    last: str,
    whole: tuple[Path, list[int]],
    policy_folder: Path,
    tmp_path: Path,
    pool: VerifierPool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last checkpoint becomes the policy in several moves; a kill after any of them loses nothing."""
    holder, name = {"promote": (loop, "promote"), "keep_only": (loop, "keep_only")}.get(last, (Output, last))
    original = getattr(holder, name)

    def dying(*given: Any, **named: Any) -> Any:
        if last == "finish":
            raise KeyboardInterrupt
        result = original(*given, **named)
        if (
            last == "promote"
            or (last == "commit" and "promoted" in given[1])
            or (last == "keep_only" and given[0] == given[1])
        ):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, dying)
        with pytest.raises(KeyboardInterrupt):
            train(policy_folder, tmp_path / "P1", pool)
    assert train(policy_folder, tmp_path / "P1", pool) == []
    same_as_whole(tmp_path / "P1", whole[0])


def test_a_loss_that_is_not_finite_stops_before_the_step(
    policy_folder: Path, tmp_path: Path, pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = loop.backward

    def broken(policy: Any, *given: Any) -> dict[str, float]:
        found = backward(policy, *given)
        parameter = next(policy.model.parameters())
        parameter.grad = torch.full_like(parameter, torch.nan)
        return found

    monkeypatch.setattr(loop, "backward", broken)
    with pytest.raises(CropiError, match=r"gradient norm nan at step 1; the last checkpoint.*lower --learning-rate"):
        train(policy_folder, tmp_path / "P1", pool)
    assert (tmp_path / "P1.part" / "metrics.jsonl").read_text() == ""


def test_a_policy_that_diverged_does_not_go_on_in_silence(
    policy_folder: Path, tmp_path: Path, pool: VerifierPool
) -> None:
    """NaN weights make all samples of a prompt equal: no advantage, loss 0, nothing to see in the loss."""
    with pytest.raises(CropiError, match=r"not finite.*lower --learning-rate"):
        train(policy_folder, tmp_path / "P1", pool, SETTINGS._replace(learning_rate=1e36, warmup=0))


def test_it_learns(policy_folder: Path, tmp_path: Path, pool: VerifierPool) -> None:
    """An even number of small letters is soon the rule; sampling and update belong together only if this works."""
    plain = LossSettings(1.0, (0.2, 0.2), 0.0, 0.0, "token")
    settings = SETTINGS._replace(
        loss=plain,
        steps=40,
        learning_rate=2e-2,
        batch=7,
        samples=8,
        warmup=0,
        schedule="constant",
        evaluate_every=100,
        save_every=100,
    )
    train(policy_folder, tmp_path / "P1", pool, settings)
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "P1" / "metrics.jsonl").read_text().splitlines()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (5, 5), (4, 6), (1, 3), (10, 1)])
def test_every_epoch_has_each_prompt_once(count: int, batch: int) -> None:
    prompts = tiny_policy.prompts(count)
    steps = 3 * count  # whole epochs
    stream = [found for step in range(1, steps + 1) for found in PromptOrder(prompts, 4).batch(step, batch)]
    assert [place for place, _ in stream] == list(range(steps * batch))
    epochs = [[record["id"] for _, record in stream[start : start + count]] for start in range(0, len(stream), count)]
    assert all(Counter(epoch) == Counter(record["id"] for record in prompts) for epoch in epochs)
    if count >= 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1  # the order is new
        assert stream != [found for step in range(1, steps + 1) for found in PromptOrder(prompts, 5).batch(step, batch)]


def test_order_does_not_follow_the_file() -> None:
    prompts = tiny_policy.prompts(9)
    for step in range(1, 8):
        assert PromptOrder(prompts, 0).batch(step, 4) == PromptOrder(prompts[::-1], 0).batch(step, 4)


def test_learning_rate() -> None:
    linear = SETTINGS._replace(learning_rate=8.0, steps=6, warmup=2)
    assert [learning_rate(linear, step) for step in range(1, 7)] == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    constant = linear._replace(schedule="constant")
    assert [learning_rate(constant, step) for step in range(1, 7)] == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    assert learning_rate(linear._replace(warmup=0), 1) == 8.0
    assert learning_rate(linear._replace(warmup=6), 6) == 8.0
