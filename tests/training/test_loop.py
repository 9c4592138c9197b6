"""The training loop: exact resume, the order of prompts, the learning rate, and that it learns what is rewarded."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from safetensors.torch import load_file
from training_runs import SETTINGS, contents, same_run, train

from cropi_tools.data.output import Output
from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime import signals
from cropi_tools.runtime.errors import CropiError, Interrupted
from cropi_tools.training import checkpoints, loop
from cropi_tools.training.learning_rate import learning_rate
from cropi_tools.training.prompt_stream import PromptOrder
from cropi_tools.training.update import Updater


@pytest.fixture(scope="module")
def whole(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    path = tmp_path_factory.mktemp("whole") / "P1"
    return path, train(policy_folder, path)


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
    stop_at: int, whole: tuple[Path, list[int]], policy_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", stop_at=stop_at)
    seeds = train(policy_folder, tmp_path / "P1")
    assert len(seeds) == (6 - stop_at) * 12  # finished steps are not sampled again
    same_run(tmp_path / "P1", whole[0])


@pytest.mark.parametrize("step", [0, 2, 6])
@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_a_stop_around_an_evaluation_costs_none(
    step: int,
    when: str,
    whole: tuple[Path, list[int]],
    policy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first, a middle and the last evaluation, in the middle of it, and after it."""

    def stopping(*given: Any) -> Any:
        if len(calls) != step // 2:
            calls.append(0)
            return plain(*given)
        calls.append(1)
        if when == "after":
            found = plain(*given)
            signals._stop_signal = signal.SIGTERM
            return found
        signals._stop_signal = signal.SIGTERM
        return plain(*given)

    def sampling(self: Any, *given: Any) -> Any:
        found = sample(self, *given)
        steps.append(0)
        if when == "before" and len(steps) == step:
            signals._stop_signal = signal.SIGTERM
        return found

    calls: list[int] = []
    steps: list[int] = []
    plain, sample = loop.evaluate, Updater.step
    if when == "before":
        monkeypatch.setattr(Updater, "step", sampling)
    else:
        monkeypatch.setattr(loop, "evaluate", stopping)
    if (when, step) in (("before", 0), ("after", 6)):
        train(policy_folder, tmp_path / "P1")  # there is nothing before the first, and nothing left after the last
    else:
        with pytest.raises(Interrupted):
            train(policy_folder, tmp_path / "P1")
        monkeypatch.undo()
        train(policy_folder, tmp_path / "P1")
    same_run(tmp_path / "P1", whole[0])


def test_killed_after_a_checkpoint_equals_straight(
    whole: tuple[Path, list[int]], policy_folder: Path, tmp_path: Path
) -> None:
    """Killed in step 6, after lines of step 5 were logged: both are done again."""
    with pytest.raises(KeyboardInterrupt):
        train(policy_folder, tmp_path / "P1", die_at=6)
    assert len((tmp_path / "P1.part" / "metrics.jsonl").read_text().splitlines()) == 5
    assert len(train(policy_folder, tmp_path / "P1")) == 2 * 12
    same_run(tmp_path / "P1", whole[0])


@pytest.mark.parametrize("last", ["promote", "commit", "drop_pending", "finish"])
def test_killed_after_the_last_step_equals_straight(
    last: str,
    whole: tuple[Path, list[int]],
    policy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last checkpoint becomes the policy in several moves; a kill after any of them loses nothing."""
    holder, name = {"promote": (loop, "promote"), "drop_pending": (loop, "drop_pending")}.get(last, (Output, last))
    original = getattr(holder, name)

    def dying(*given: Any, **named: Any) -> Any:
        if last == "finish":
            raise KeyboardInterrupt
        result = original(*given, **named)
        if last in ("promote", "drop_pending") or (last == "commit" and "promoted" in given[1]):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, dying)
        with pytest.raises(KeyboardInterrupt):
            train(policy_folder, tmp_path / "P1")
    assert train(policy_folder, tmp_path / "P1") == []
    same_run(tmp_path / "P1", whole[0])


def test_a_loss_that_is_not_finite_stops_before_the_step(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Updater._gradient

    def broken(self: Updater, groups: Any) -> dict[str, float]:
        found = plain(self, groups)
        self.parameters[0].grad = torch.full_like(self.parameters[0], torch.nan)
        return found

    monkeypatch.setattr(Updater, "_gradient", broken)
    with pytest.raises(CropiError, match=r"gradient norm nan at step 1; no step was saved yet.*lower --learning-rate"):
        train(policy_folder, tmp_path / "P1")
    assert (tmp_path / "P1.part" / "metrics.jsonl").read_text() == ""


def test_a_policy_that_diverged_does_not_go_on_in_silence(policy_folder: Path, tmp_path: Path) -> None:
    """NaN weights make all samples of a prompt equal: no advantage, loss 0, nothing to see in the loss."""
    with pytest.raises(CropiError, match=r"not finite.*lower --learning-rate"):
        train(policy_folder, tmp_path / "P1", replace(SETTINGS, learning_rate=1e36, warmup=0))


def test_it_learns(policy_folder: Path, tmp_path: Path) -> None:
    """An even number of small letters is soon the rule; sampling and update belong together only if this works."""
    settings = replace(
        SETTINGS,
        kl=0.0,
        entropy=0.0,
        steps=40,
        learning_rate=2e-2,
        batch=7,
        samples=8,
        warmup=0,
        schedule="constant",
        eval_every=100,
        save_every=100,
    )
    train(policy_folder, tmp_path / "P1", settings)
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "P1" / "metrics.jsonl").read_text().splitlines()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (5, 5), (4, 6), (1, 3), (10, 1)])
def test_every_epoch_has_each_prompt_once(count: int, batch: int) -> None:
    prompts = tiny_policy.prompts(count)
    steps = 3 * count  # whole epochs
    stream = [found for step in range(steps) for found in PromptOrder(prompts, 4).at(step * batch, batch)]
    assert [place for place, _ in stream] == list(range(steps * batch))
    epochs = [[record["id"] for _, record in stream[start : start + count]] for start in range(0, len(stream), count)]
    assert all(Counter(epoch) == Counter(record["id"] for record in prompts) for epoch in epochs)
    if count >= 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1  # the order is new
        assert stream != PromptOrder(prompts, 5).at(0, steps * batch)


def test_order_does_not_follow_the_file() -> None:
    prompts = tiny_policy.prompts(9)
    for place in range(0, 32, 4):
        assert PromptOrder(prompts, 0).at(place, 4) == PromptOrder(prompts[::-1], 0).at(place, 4)


def test_learning_rate() -> None:
    linear = replace(SETTINGS, learning_rate=8.0, steps=6, warmup=2)
    assert [learning_rate(linear, step) for step in range(1, 7)] == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    constant = replace(linear, schedule="constant")
    assert [learning_rate(constant, step) for step in range(1, 7)] == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    cosine = replace(linear, schedule="cosine")
    expected = [4.0, 8.0, *(4.0 * (1 - math.cos(math.pi * left)) for left in (1.0, 0.75, 0.5, 0.25))]
    assert [learning_rate(cosine, step) for step in range(1, 7)] == pytest.approx(expected)
    assert learning_rate(replace(linear, warmup=0), 1) == 8.0
    assert learning_rate(replace(linear, warmup=6), 6) == 8.0


def test_a_state_that_nobody_reads_is_not_written(
    policy_folder: Path, tmp_path: Path, whole: tuple[Path, list[int]]
) -> None:
    """Nor missed, wherever the run was stopped or killed; all else is the same."""
    settings = replace(SETTINGS, state="drop", checkpoints=2)
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", settings, stop_at=5)
    assert (tmp_path / "P1.part/checkpoint-000004/state/optimizer.safetensors").exists()
    train(policy_folder, tmp_path / "P1", settings)
    made = contents(tmp_path / "P1")
    kept = {name: made[name] for name in made if not name.startswith("checkpoint-000004/")}
    assert kept == {name: data for name, data in contents(whole[0]).items() if not name.startswith("state/")}
    assert not list((tmp_path / "P1").rglob("state"))
    manifest = json.loads((tmp_path / "P1/manifest.json").read_text())
    assert "state" not in manifest["entries"]
    assert not any("state" in name for name in manifest["outputs"])


@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_killed_at_the_end_without_a_state_or_exact_weights(
    moment: str, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, list[int]]
) -> None:
    """The last checkpoint has the exact weights until the rounded ones have their place."""
    settings = replace(SETTINGS, state="drop", save_dtype="bfloat16")
    holder, name = {"before": (loop, "promote"), "within": (checkpoints, "_link"), "after": (loop, "drop_pending")}[
        moment
    ]

    def dying(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, dying)
        with pytest.raises(KeyboardInterrupt):
            train(policy_folder, tmp_path / "P1", settings)
    exact = load_file(whole[0] / "model.safetensors")
    if moment != "after":
        left = load_file(tmp_path / "P1.part/checkpoint-000006/model.safetensors")
        assert all(torch.equal(left[name], exact[name]) for name in exact)
    assert train(policy_folder, tmp_path / "P1", settings) == []
    saved = load_file(tmp_path / "P1/model.safetensors")
    assert saved.keys() == exact.keys()
    assert all(torch.equal(saved[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((tmp_path / "P1/config.json").read_text())["dtype"] == "bfloat16"
    assert not list((tmp_path / "P1").rglob("*.tmp")) + list((tmp_path / "P1").rglob("state"))
    # what stands in the files is what is loaded
    loaded = load_policy(str(tmp_path / "P1"), "cpu", "auto")
    assert loaded.model.dtype == torch.float32
    assert all(torch.equal(parameter, saved[name].float()) for name, parameter in loaded.model.named_parameters())


@pytest.mark.parametrize(("rate", "warned"), [(3e-3, False), (1e-7, True)])
def test_updates_that_the_saved_format_cannot_hold_are_told(
    rate: float, warned: bool, policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, steps=2, save_dtype="bfloat16", learning_rate=rate, weight_decay=0.0, kl=0.0)
    train(policy_folder, tmp_path / "P1", settings)
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot hold such small updates" in line]
    assert [line.endswith("leave --save-dtype out") for line in said] == [True] * warned
