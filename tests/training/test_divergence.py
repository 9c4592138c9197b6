"""When a run has diverged, and what is kept then."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_runs import SETTINGS, train

from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime.errors import CropiError
from cropi_tools.training import loop
from cropi_tools.training.divergence import FLAT, WINDOW, Watch


def figures(**given: float) -> dict[str, float]:
    usual = {"loss": 0.1, "gradient_norm": 1.0, "reward": 0.5, "entropy": 2.0, "response_tokens": 100.0, "kl": 0.001}
    return {**usual, "accuracy": 0.25, "tokens_trained": 10, **given}


def told(watch: Watch, steps: list[dict[str, float]]) -> list[int]:
    """The steps (from 1) at which a reason to stop is given."""
    return [step for step, found in enumerate(steps, 1) if watch.check(found) is not None]


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "reward", "entropy", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stops_at_once(name: str, value: float) -> None:
    reason = Watch(0.0).check(figures(**{name: value}))
    assert reason is not None
    assert reason.startswith(f"{name.replace('_', ' ')} is {value}; ")
    assert ("--learning-rate" in reason) == (name != "reward")


@pytest.mark.parametrize(("name", "word"), [("entropy", "entropy"), ("response_tokens", "length")])
def test_a_collapse_stops_once_a_whole_window_is_low(name: str, word: str) -> None:
    start = figures()[name]
    steps = [figures()] * 8 + [figures(**{name: 0.05 * start})] * (WINDOW - 1)
    watch = Watch(0.05)
    assert told(watch, steps) == []
    assert watch.suspicious(), "the steps themselves look bad before the window is full"
    reason = watch.check(figures(**{name: 0.05 * start}))
    assert reason is not None
    assert word in reason
    assert "--collapse 0" in reason


def test_it_is_the_windows_mean_that_counts() -> None:
    steps = [figures()] * 5 + [figures(entropy=0.0), figures(entropy=0.0)] + [figures()] * 9
    assert told(Watch(0.05), steps) == []


def test_a_policy_that_solved_its_prompts_has_not_collapsed() -> None:
    certain = [figures()] * 5 + [figures(entropy=0.001, response_tokens=1.0, reward=0.9)] * 20
    watch = Watch(0.05)
    assert told(watch, certain) == []
    assert not watch.suspicious()
    assert told(Watch(0.05), [{**found, "reward": 0.5} for found in certain]) != []


def test_a_single_lucky_reward_does_not_make_a_low_step_a_good_one() -> None:
    """Rewards of one step scatter: were the checkpoint of the lucky one kept, it would take the place of the last good one."""
    watch = Watch(0.05)
    assert (
        told(watch, [figures()] * 8 + [figures(entropy=0.01, reward=0.1)] * 2 + [figures(entropy=0.01, reward=0.6)])
        == []
    )
    assert watch.suspicious()


def test_a_single_bad_reward_makes_a_low_step_suspicious() -> None:
    """The reward of the steps before was better than at first; it went with the entropy."""
    watch = Watch(0.05)
    assert told(watch, [figures()] * 5 + [figures(reward=0.9)] * 5 + [figures(entropy=0.01, reward=0.0)]) == []
    assert watch.suspicious()


def test_what_was_nothing_from_the_first_has_not_collapsed() -> None:
    watch = Watch(0.05)
    assert told(watch, [figures(entropy=0.0)] * 12) == []
    assert not watch.suspicious()


def test_no_wish_to_stop_is_none() -> None:
    steps = [figures()] * 5 + [figures(entropy=0.0, reward=0.0, response_tokens=0.0)] * 20
    watch = Watch(0.0)
    assert told(watch, steps) == []
    assert not watch.suspicious()


def flat(**given: float) -> dict[str, float]:
    """A step in which every group's rewards were equal."""
    return figures(tokens_trained=0, **given)


def test_entropy_counts_where_nothing_was_trained() -> None:
    assert told(Watch(0.05), [figures()] * 5 + [flat(entropy=0.01)] * WINDOW) == [10]
    assert told(Watch(0.05), [figures()] * 5 + [flat()] * 30) == []


@pytest.mark.parametrize("reward", [0.0, 0.2, 0.49])
def test_steps_without_a_live_group_and_a_lower_reward_stop(reward: float) -> None:
    """Entropy and length tell nothing here: a constant answer may be long, and a policy may be unsure in a way that no reward sees."""
    steps = [figures()] * 5 + [flat(reward=reward)] * FLAT
    assert told(Watch(0.05), steps) == [5 + FLAT]
    assert told(Watch(0.0), steps * 2) == []


@pytest.mark.parametrize("reward", [0.5, 0.6, 1.0])
def test_steps_without_a_live_group_and_no_lower_reward_do_not(reward: float) -> None:
    watch = Watch(0.05)
    assert told(watch, [figures()] * 5 + [flat(reward=reward)] * 50) == []
    assert not watch.suspicious()


def test_a_run_that_began_with_everything_solved_has_not_collapsed() -> None:
    watch = Watch(0.05)
    assert told(watch, [flat(reward=1.0)] * 5 + [flat(reward=1.0, entropy=0.001, response_tokens=1.0)] * 30) == []
    assert not watch.suspicious()


def test_a_slow_decline_ends_too() -> None:
    decline = [figures(reward=0.5 - 0.02 * step, entropy=2.0 - 0.05 * step) for step in range(25)]
    assert told(Watch(0.05), decline + [flat(reward=0.0, entropy=0.8)] * FLAT) == [25 + FLAT]


def test_where_rewards_are_rare_flat_steps_are_nothing_new() -> None:
    rare = ([figures(reward=0.1)] + [flat(reward=0.0)] * 4) * 6
    watch = Watch(0.05)
    assert told(watch, rare + [flat(reward=0.0)] * 35) == []
    assert told(watch, [flat(reward=0.0)] * 20) != []


def test_no_checkpoint_takes_the_place_of_a_good_one_once_nothing_is_learned() -> None:
    watch = Watch(0.05)
    told(watch, [figures()] * 8)
    assert not watch.suspicious()
    told(watch, [flat(reward=0.1)])
    assert watch.suspicious()
    told(watch, [figures()])
    assert not watch.suspicious()


def test_a_run_without_a_live_group_from_its_start_is_warned_of_once() -> None:
    watch, said = Watch(0.05), []
    for step in range(1, 3 * FLAT):
        assert watch.check(flat(reward=0.0)) is None
        said += [step] if watch.warning() else []
    assert said == [FLAT]
    learning = Watch(0.05)
    assert told(learning, [figures()] + [flat()] * FLAT) == []
    assert learning.warning() is None


@pytest.mark.parametrize("cut", [3, 6, 12])
def test_flat_steps_are_counted_over_a_resume(cut: int) -> None:
    steps = [figures()] * 5 + [flat(reward=0.0)] * FLAT
    first = Watch(0.05)
    told(first, steps[:cut])
    second = Watch(0.05, json.loads(json.dumps(first.state())))
    assert [step + cut for step in told(second, steps[cut:])] == [5 + FLAT]


def test_a_state_that_counted_no_flat_steps_resumes() -> None:
    first = Watch(0.05)
    told(first, [figures()] * 6)
    old = {name: first.state()[name] for name in ("first", "last")}
    assert told(Watch(0.05, old), [flat(reward=0.0)] * FLAT) == [FLAT]


@pytest.mark.parametrize("cut", [3, 6, 9])
def test_it_looks_on_after_a_resume(cut: int) -> None:
    steps = [figures()] * 5 + [figures(entropy=0.01)] * 10
    whole, first = Watch(0.05), Watch(0.05)
    expected = told(whole, steps)
    told(first, steps[:cut])
    second = Watch(0.05, json.loads(json.dumps(first.state())))
    assert [step + cut for step in told(second, steps[cut:])] == [step for step in expected if step > cut]
    assert expected


def test_a_collapsed_run_keeps_its_last_good_checkpoint(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 7 on the entropy is gone. It ends at step 11 with the checkpoint of step 6, the one of step 8 or 10 never takes its place."""
    plain = loop.Updater.step
    calls: list[int] = []

    def collapsing(self: Any, parts: Any, rate: float) -> dict[str, float]:
        calls.append(1)
        found = plain(self, parts, rate)
        return {**found, "entropy": 1e-6, "tokens_trained": 1.0} if len(calls) > 6 else found

    monkeypatch.setattr(loop.Updater, "step", collapsing)
    monkeypatch.setattr(Watch, "_low", lambda self, name, value: name == "entropy" and value <= 0.01)
    never = f"{Path(__file__).parent.parent / 'parity.py'}:never"
    settings = replace(SETTINGS, steps=20, save_every=2, eval_every=99, collapse=0.05)
    with pytest.raises(CropiError) as stopped:
        train(policy_folder, tmp_path / "P1", settings, verifier=never)
    said = str(stopped.value)
    assert "stopped at step" in said
    assert "the policy has collapsed: the entropy per token fell from" in said
    assert "checkpoint-000006, is good" in said
    assert [folder.name for folder in (tmp_path / "P1.part").glob("checkpoint-*")] == ["checkpoint-000006"]
    load_policy(str(tmp_path / "P1.part" / "checkpoint-000006"), "cpu")
