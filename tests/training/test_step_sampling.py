"""What a step is made of: mini-batches, refills in place of groups without variance, rollouts kept over a stop; and what checkpoints keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_runs import SETTINGS, metrics, same_run, train

from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime.errors import CropiError, Interrupted
from cropi_tools.training.checkpoints import PENDING
from cropi_tools.training.update import Updater

NEVER = f"{Path(__file__).parent.parent / 'parity.py'}:never"
SHORT = replace(SETTINGS, steps=3, save_every=3, eval_every=9)


def test_a_stop_between_two_chunks_keeps_what_was_sampled(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one prompt here. Stopped in the second of three: two are kept, one is sampled after the resume, to the same bytes."""
    monkeypatch.setattr("cropi_tools.rollouts.sampling.CHUNK_RESPONSES", SETTINGS.samples)
    straight = train(policy_folder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", stop_at=8)
    state = json.loads((tmp_path / "P1.part" / "progress.json").read_text())["committed"]
    assert (state["step"], state["pending"]) == (2, 2)
    assert len((tmp_path / "P1.part" / PENDING).read_text().splitlines()) == 2
    again = train(policy_folder, tmp_path / "P1")
    assert again == straight[8 * SETTINGS.samples :], "what was kept is not sampled again, and nothing is left out"
    same_run(tmp_path / "P1", tmp_path / "whole")
    assert not (tmp_path / "P1" / PENDING).exists()


def test_a_stop_in_the_first_step_keeps_its_rollouts(policy_folder: Path, tmp_path: Path) -> None:
    straight = train(policy_folder, tmp_path / "whole", SHORT)
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", SHORT, stop_at=1)
    assert train(policy_folder, tmp_path / "P1", SHORT) == straight[12:]
    same_run(tmp_path / "P1", tmp_path / "whole")


def test_mini_batches_are_updates_of_their_own(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts a step in mini-batches of two: an update of two and one of one, every prompt in exactly one of them."""
    seen: list[list[list[str]]] = []
    plain = Updater.step

    def watched(self: Updater, parts: Any, rate: float) -> dict[str, float]:
        seen.append([[record["id"] for record in part] for part in parts])
        return plain(self, parts, rate)

    monkeypatch.setattr(Updater, "step", watched)
    train(policy_folder, tmp_path / "P1", SHORT)
    train(policy_folder, tmp_path / "P2", replace(SHORT, minibatch=2))
    whole, parted = seen[:3], seen[3:]
    assert [[len(part) for part in parts] for parts in parted] == [[2, 1]] * 3
    assert parted[0] == [whole[0][0][:2], whole[0][0][2:]]  # the first step's rollouts are the same
    assert (tmp_path / "P1" / "model.safetensors").read_bytes() != (tmp_path / "P2" / "model.safetensors").read_bytes()
    steps = [int(load_optimizer_step(tmp_path / name)) for name in ("P1", "P2")]
    assert steps[0] <= 3 < steps[1] <= 6


def load_optimizer_step(folder: Path) -> float:
    from safetensors.torch import load_file

    return max(
        float(v) for k, v in load_file(folder / "state" / "optimizer.safetensors").items() if k.startswith("step/")
    )


def test_refills_replace_groups_without_variance(policy_folder: Path, tmp_path: Path) -> None:
    """Two samples a prompt are often equal: with refills every update has a whole batch of groups that differ, without it does not."""
    few = replace(SHORT, samples=2, steps=4, save_every=4)
    train(policy_folder, tmp_path / "off", few)
    seeds = train(policy_folder, tmp_path / "on", replace(few, dynamic_sampling=8))
    off, on = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert "refill_rounds" not in off[0]
    assert sum(record["refill_rounds"] for record in on) > 0
    assert len(set(seeds)) == len(seeds) > 4 * 3 * 2
    assert any(0 < record["zero_variance_fraction"] < 1 for record in on)  # of all that was sampled

    def trained(records: list[dict[str, Any]]) -> float:
        return sum(record["tokens_trained"] for record in records)

    assert trained(on) > trained(off)
    state = json.loads((tmp_path / "on" / "state" / "state.json").read_text())
    assert state["step"] == 4


@pytest.mark.parametrize("stop_at", [2, 3, 5])
def test_refills_resume_exactly(stop_at: int, policy_folder: Path, tmp_path: Path) -> None:
    """The place in the stream is no function of the step then; a stop may fall into any round."""
    few = replace(SHORT, samples=2, dynamic_sampling=8)
    train(policy_folder, tmp_path / "whole", few)
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", few, stop_at=stop_at)
    train(policy_folder, tmp_path / "P1", few)
    same_run(tmp_path / "P1", tmp_path / "whole")


def test_refills_end_where_nothing_differs(policy_folder: Path, tmp_path: Path) -> None:
    """All rewards 0: the rounds run out, the step has no update and says so, the weights stay."""
    train(policy_folder, tmp_path / "P1", replace(SHORT, steps=1, dynamic_sampling=2), verifier=NEVER)
    (record,) = metrics(tmp_path / "P1")
    assert (record["zero_variance_fraction"], record["refill_rounds"], record["tokens_trained"]) == (1.0, 2, 0)
    before, after = (load_policy(str(folder), "cpu") for folder in (policy_folder, tmp_path / "P1"))
    assert all((a == b).all() for (_, a), (_, b) in zip(before.trained, after.trained, strict=True))


@pytest.mark.parametrize("kept", [1, 2, 9])
def test_the_newest_checkpoints_are_kept(kept: int, policy_folder: Path, tmp_path: Path) -> None:
    train(policy_folder, tmp_path / "P1", replace(SETTINGS, steps=5, save_every=1, eval_every=9, checkpoints=kept))
    found = sorted(folder.name for folder in (tmp_path / "P1").glob("checkpoint-*"))
    older = [f"checkpoint-{step:06d}" for step in range(1, 5)]
    assert found == (older[len(older) - (kept - 1) :] if kept <= 4 else older)
    for name in found:
        load_policy(str(tmp_path / "P1" / name), "cpu")


def test_the_optimizer_is_carried_only_if_asked(policy_folder: Path, tmp_path: Path) -> None:
    """A stage that carries all goes on with moments and counts; one that carries weights begins with none."""
    train(policy_folder, tmp_path / "P1", SHORT)
    train(tmp_path / "P1", tmp_path / "weights", SHORT)
    train(tmp_path / "P1", tmp_path / "full", SHORT, carried=tmp_path / "P1")
    before, weights, full = (load_optimizer_step(tmp_path / name) for name in ("P1", "weights", "full"))
    assert weights <= 3
    assert full > before
    assert full == before + weights
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("weights", "full")]
    assert files[0] != files[1]


def test_no_verdict_at_all_ends_the_run(policy_folder: Path, tmp_path: Path) -> None:
    dying = f"{Path(__file__).parent.parent / 'parity.py'}:dies"
    with pytest.raises(CropiError, match=r"the verifier gave no answer on any of 12 responses .* fix it"):
        train(policy_folder, tmp_path / "P1", SHORT, verifier=dying)
