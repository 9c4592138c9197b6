"""Training adapters (LoRA): function unchanged at first, merged policy equal to adapters beside it, peft opens them, resume is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import naive_policy
import pytest
import tiny_policy
import torch
from safetensors.torch import load_file
from training_runs import SETTINGS, metrics, same_run, train

from cropi_tools.policy.adapters import adapters_off, has_adapters, inject_adapters
from cropi_tools.policy.loading import load_policy
from cropi_tools.policy.weights import checkpoint_weights
from cropi_tools.runtime.errors import InputError, Interrupted

pytest.importorskip("peft")
LORA = replace(SETTINGS, learning_rate=3e-2)
IDS = torch.tensor([[5, 9, 12, 40, 33, 7]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_adapters_change_nothing_at_first_and_merge_exactly() -> None:
    policy = naive_policy.policy()
    before = logits(policy.model)
    assert not has_adapters(policy.model)
    inject_adapters(policy, 4, 8.0, seed=1)
    assert has_adapters(policy.model)
    assert torch.equal(logits(policy.model), before)
    assert {name.rpartition(".lora_")[2].partition(".")[0] for name, _ in policy.trained} == {"A", "B"}
    with torch.no_grad():
        for name, parameter in policy.trained:
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    changed = logits(policy.model)
    assert (changed - before).abs().max() > 0.1
    with adapters_off(policy.model):
        assert torch.equal(logits(policy.model), before)
    assert torch.equal(logits(policy.model), changed)
    assert all(parameter.requires_grad for _, parameter in policy.trained)
    assert policy.trained
    merged = tiny_policy.model(seed=9)
    merged.load_state_dict(dict(checkpoint_weights(policy.model)), strict=False)
    torch.testing.assert_close(logits(merged), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it by the old name
def test_a_run_leaves_a_merged_policy_and_an_adapter_for_peft(policy_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    train(policy_folder, tmp_path / "P1", LORA, lora=4)
    before, after = load_policy(str(policy_folder), "cpu"), load_policy(str(tmp_path / "P1"), "cpu")
    names = [name for name, parameter in before.trained if not torch.equal(parameter, dict(after.trained)[name])]
    assert names
    assert all("proj" in name for name in names), "linear layers alone change"
    assert [name for name, _ in before.trained] == [name for name, _ in after.trained]
    beside = PeftModel.from_pretrained(load_policy(str(policy_folder), "cpu").model, str(tmp_path / "P1" / "adapter"))
    torch.testing.assert_close(logits(beside), logits(after.model), rtol=1e-4, atol=1e-4)
    saved = load_file(tmp_path / "P1" / "state" / "optimizer.safetensors")
    assert all("lora_" in name for name in saved)
    # the reference is the policy without its adapters: no second copy, and a divergence that grows
    kl = [record["kl"] for record in metrics(tmp_path / "P1")]
    assert kl[0] < 1e-6 < max(kl)


def test_moments_of_adapters_are_not_carried_to_weights(policy_folder: Path, tmp_path: Path) -> None:
    train(policy_folder, tmp_path / "P1", replace(LORA, steps=2), lora=2)
    with pytest.raises(InputError, match=r"lora_A.*is not trained here; give --carry weights"):
        train(tmp_path / "P1", tmp_path / "P2", replace(LORA, steps=2), carried=tmp_path / "P1")


@pytest.mark.parametrize("stop_at", [2, 5])
def test_resume_is_exact(stop_at: int, policy_folder: Path, tmp_path: Path) -> None:
    train(policy_folder, tmp_path / "whole", LORA, lora=2)
    with pytest.raises(Interrupted):
        train(policy_folder, tmp_path / "P1", LORA, lora=2, stop_at=stop_at)
    train(policy_folder, tmp_path / "P1", LORA, lora=2)
    same_run(tmp_path / "P1", tmp_path / "whole")


def test_it_learns(policy_folder: Path, tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        kl=0.0,
        entropy=0.0,
        steps=40,
        learning_rate=5e-2,
        batch=7,
        samples=8,
        warmup=0,
        schedule="constant",
        eval_every=100,
        save_every=100,
    )
    train(policy_folder, tmp_path / "P1", settings, lora=8)
    rewards = [record["reward"] for record in metrics(tmp_path / "P1")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
