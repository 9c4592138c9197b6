"""Runs that collapse for real: a learning rate so large that the policy falls to one answer, which its verifier never accepts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_policy
from training_runs import PARITY, SETTINGS, metrics, train

from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime.errors import CropiError, Interrupted
from cropi_tools.training.divergence import FLAT, WINDOW

VARIED = PARITY.replace(":reward", ":varied")  # what a constant answer is not
NEVER = PARITY.replace(":reward", ":never")
RECKLESS = replace(
    SETTINGS,
    steps=30,
    batch=7,
    learning_rate=0.3,
    schedule="constant",
    warmup=0,
    max_gradient_norm=0.0,
    kl=0.0,
    entropy=0.0,
    save_every=2,
    eval_every=99,
    collapse=0.05,
)


class Collapsed(NamedTuple):
    """The part of such a run, unbroken; the step it stopped at, and that of the checkpoint it kept.

    At such rates the last bits decide when a policy falls: they depend on the processor, so the steps are read from what is said.
    """

    part: Path
    step: int
    kept: int


@pytest.fixture(scope="module")
def collapsed(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Collapsed:
    path = tmp_path_factory.mktemp("collapsed") / "P1"
    with pytest.raises(CropiError) as stopped:
        train(policy_folder, path, RECKLESS, verifier=VARIED)
    said = str(stopped.value)
    step = re.search(r"stopped at step (\d+): the policy has collapsed: .* the reward (?:fell )?from 0\.\d+ to 0", said)
    kept = re.search(r"checkpoint-0*(\d+), is good", said)
    assert step, said
    assert kept, said
    return Collapsed(path.with_name("P1.part"), int(step[1]), int(kept[1]))


def test_it_ends_and_keeps_the_checkpoint_from_before(collapsed: Collapsed) -> None:
    kept = f"checkpoint-{collapsed.kept:06}"
    assert [folder.name for folder in collapsed.part.glob("checkpoint-*")] == [kept]
    load_policy(str(collapsed.part / kept), "cpu")
    figures = metrics(collapsed.part)
    assert len(figures) == collapsed.step > collapsed.kept
    last = figures[-WINDOW:]
    low = [sum(found["entropy"] for found in part) / WINDOW for part in (figures[:WINDOW], last)]
    # the run counts the entropy of all that it sampled, these figures that of what it trained on
    assert low[1] <= 0.1 * low[0] or not any(found["tokens_trained"] for found in figures[-FLAT:])
    assert figures[collapsed.kept - 1]["reward"] > last[-1]["reward"]


def test_the_entropy_of_steps_without_a_group_to_learn_from_is_known(collapsed: Collapsed) -> None:
    figures = metrics(collapsed.part)
    flat = [found["entropy"] for found in figures if not found["tokens_trained"]]
    assert flat
    assert all(0 < entropy < figures[0]["entropy"] for entropy in flat), flat


def test_without_the_watch_it_goes_on(policy_folder: Path, tmp_path: Path) -> None:
    train(policy_folder, tmp_path / "P1", replace(RECKLESS, steps=15, collapse=0.0), verifier=VARIED)
    assert len(metrics(tmp_path / "P1")) == 15


def test_refills_change_nothing(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="the policy has collapsed"):
        train(policy_folder, tmp_path / "P1", replace(RECKLESS, dynamic_sampling=2), verifier=VARIED)
    figures = metrics(tmp_path / "P1.part")
    assert figures[-1]["tokens_trained"] == 0
    assert figures[-1]["refill_rounds"] == 2
    assert 0 < figures[-1]["entropy"] < 0.3
    kept = [int(folder.name[-6:]) for folder in (tmp_path / "P1.part").glob("checkpoint-*")]
    assert all(figures[step - 1]["tokens_trained"] for step in kept)


def test_a_resumed_run_ends_at_the_same_step(policy_folder: Path, collapsed: Collapsed, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", RECKLESS, verifier=VARIED, stop_at=8)
    with pytest.raises(CropiError, match=f"stopped at step {collapsed.step}: the policy has collapsed"):
        train(policy_folder, tmp_path / "P1", RECKLESS, verifier=VARIED)
    assert metrics(tmp_path / "P1.part") == metrics(collapsed.part)


def test_a_policy_that_solves_its_prompts_runs_to_the_end(policy_folder: Path, tmp_path: Path) -> None:
    train(policy_folder, tmp_path / "P1", replace(RECKLESS, steps=25, seed=1))
    figures = metrics(tmp_path / "P1")
    assert [found["reward"] for found in figures[-2 * FLAT :]] == [1.0] * (2 * FLAT)
    assert figures[-1]["entropy"] < 0.05 * figures[0]["entropy"]


def test_a_run_that_never_learned_says_so_once(
    policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(policy_folder, tmp_path / "P1", replace(RECKLESS, steps=13), verifier=NEVER)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert "none of the first 10 steps trained anything" in said[0]
    entropies = {round(found["entropy"]) for found in metrics(tmp_path / "P1")}
    assert entropies == {3}, "of the untouched policy, as in steps that train"


@pytest.mark.slow
def test_the_entropy_is_that_of_all_processes(policy_folder: Path, tmp_path: Path) -> None:
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(7))
    words = ["--model", str(policy_folder), "p.jsonl", "--steps", "2", "--batch", "5", "-n", "4", "--max-tokens", "6"]
    words += ["--verifier", NEVER, "--device", "cpu"]
    program = Path(sys.executable).parent
    torchrun = [program / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    for before, name in ((torchrun, "two"), ([], "one")):
        line = [*before, program / "cropi-train", *words, "-o", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([str(word) for word in line], cwd=tmp_path, check=True, timeout=200, env=environment)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [found["tokens_trained"] for found in one] == [0, 0]
    assert [found["entropy"] for found in two] == pytest.approx([found["entropy"] for found in one], rel=1e-5)


def test_a_last_live_group_does_not_hide_it(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy nearly fallen, of whose groups one a step still trains, with tokens as uncertain as at first."""
    from cropi_tools.training.loop import Updater
    from cropi_tools.training.sampling import StepSampler

    sample, step, calls = StepSampler.sample, Updater.step, []

    def fallen(self: StepSampler, *given: object) -> object:
        calls.append(1)
        found = sample(self, *given)
        return found._replace(entropy=0.001) if len(calls) > 6 else found

    monkeypatch.setattr(StepSampler, "sample", fallen)
    monkeypatch.setattr(Updater, "step", lambda *given: {**step(*given), "entropy": 3.0, "tokens_trained": 24.0})
    gentle = replace(RECKLESS, learning_rate=0.0)
    with pytest.raises(CropiError, match="stopped at step 11: the policy has collapsed: the entropy per token fell"):
        train(policy_folder, tmp_path / "P1", gentle, verifier=NEVER)
    assert {found["entropy"] for found in metrics(tmp_path / "P1.part")} == {3.0}
