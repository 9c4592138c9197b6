"""Adapters merge into the weights of every family that takes them, experts too; where they cannot, one line says so before training."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from safetensors.torch import load_file
from training_runs import SETTINGS, train

from cropi_tools.policy import merging, weights
from cropi_tools.policy.adapters import adapter_tensors, inject_adapters, save_adapters
from cropi_tools.policy.loading import Policy, load_policy, save_policy
from cropi_tools.policy.merging import check_merge
from cropi_tools.policy.weights import checkpoint_weights, stored_weights
from cropi_tools.runtime.errors import CropiError, InputError

pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 12, 40, 33, 7, 2, 3]])
FAST = ("llama_tied", "gpt2", "gpt_neox", "phi3", "falcon", "gemma2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")
REFUSED = ("phimoe", "mamba", "mamba2", "falcon_mamba", "jamba")
ADAPTED = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in tiny_families.DENSE + tiny_families.EXPERTS + tiny_families.RECURRENT
    if name not in REFUSED
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapted(family: str, folder: Path) -> tuple[Policy, Any]:
    """A policy with random adapters that move its logits, and peft's settings of them."""
    policy = load_policy(str(tiny_families.save(family, folder)), "cpu")
    before = logits(policy.model)
    settings = inject_adapters(policy, 4, 8.0, seed=1)
    assert torch.equal(logits(policy.model), before), "the trial leaves no trace"
    assert not any(isinstance(value, set) for value in vars(settings).values()), (
        "its file would differ from process to process"
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.trained:
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    assert (logits(policy.model) - before).abs().max() > 0.05
    return policy, settings


@pytest.mark.filterwarnings("ignore")  # what peft says of families when it opens adapters by itself
@pytest.mark.parametrize("family", ADAPTED)
def test_merged_logits_are_the_adapted_ones(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    policy, settings = adapted(family, tmp_path / "P0")
    check_merge(policy.model)
    save_policy(policy, tmp_path / "P1", dict(checkpoint_weights(policy.model)))
    # what an engine of its own is given has the names and values of the file
    saved, given = load_file(tmp_path / "P1" / "model.safetensors"), dict(stored_weights(policy.model))
    assert saved.keys() == given.keys()
    assert [name for name in saved if not torch.equal(saved[name], given[name])] == []
    save_adapters(adapter_tensors(policy.model), settings, tmp_path / "P1")
    wanted = logits(policy.model)
    torch.testing.assert_close(logits(load_policy(str(tmp_path / "P1"), "cpu").model), wanted, rtol=1e-4, atol=1e-4)
    beside = PeftModel.from_pretrained(load_policy(str(tmp_path / "P0"), "cpu").model, str(tmp_path / "P1" / "adapter"))
    torch.testing.assert_close(logits(beside), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_takes_no_adapters_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    policy = load_policy(str(tiny_families.save(family, tmp_path / "P0")), "cpu")
    with pytest.raises(InputError, match=r"P0: .*leave --lora out") as caught:
        inject_adapters(policy, 4, 8.0, seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("fault", ["nothing", "twice", "transposed", "one layer left out"])
def test_a_wrong_merge_is_found_before_training_and_after_it(
    fault: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights._delta
    policy, _ = adapted(family, tmp_path / "P0")
    left_out = next(iter(weights.merge_targets(policy.model).values()))
    name = next(iter(weights.merge_targets(policy.model)))

    def wrong(layer: Any) -> torch.Tensor:
        found = right(layer)
        if fault == "one layer left out":
            return found * (layer is not left_out)
        if fault == "transposed" and found.shape[-1] != found.shape[-2]:
            return found.transpose(-1, -2).reshape(found.shape)
        return found * 2 if fault == "twice" else torch.zeros_like(found)

    monkeypatch.setattr(weights, "_delta", wrong)
    with pytest.raises(CropiError, match="another policy"):
        check_merge(policy.model)
    with pytest.raises(CropiError, match="another policy"):
        check_merge(policy.model, dict(checkpoint_weights(policy.model)))
    monkeypatch.setattr(weights, "_delta", right)
    check_merge(policy.model, dict(checkpoint_weights(policy.model)))
    other = dict(checkpoint_weights(policy.model))
    other[name] = other[name] + 0.1
    with pytest.raises(CropiError, match="another policy"):
        check_merge(policy.model, other)
    check_merge(policy.model)
    if fault != "one layer left out":
        monkeypatch.setattr(weights, "_delta", wrong)
        fresh = load_policy(str(tmp_path / "P0"), "cpu")
        with pytest.raises(InputError, match="do not merge into its weights"):
            inject_adapters(fresh, 4, 8.0, seed=1)


def test_a_run_whose_merge_goes_wrong_writes_no_policy(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights._delta
    calls = []

    def wrong_later(layer: Any) -> torch.Tensor:
        calls.append(layer)
        return right(layer) * (1 if len(calls) <= 14 else 0)

    monkeypatch.setattr(weights, "_delta", wrong_later)
    monkeypatch.setattr(merging, "FLOAT32_LIMIT", 1e-6)
    with pytest.raises(CropiError, match=r"P1: merged into its weights .* no step was saved yet"):
        train(policy_folder, tmp_path / "P1", replace(SETTINGS, learning_rate=3e-2), lora=2)
    assert not (tmp_path / "P1").exists()


def test_what_has_no_adapters_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family, said in (("llama_tied", ""), ("qwen2_moe", "model.layers.*.mlp.experts.gate_up_proj")):
        policy = load_policy(str(tiny_families.save(family, tmp_path / family)), "cpu")
        capsys.readouterr()
        inject_adapters(policy, 2, 4.0, seed=0)
        told = capsys.readouterr().err
        assert ("no adapters beside" in told) == bool(said)
        assert said in told


@pytest.mark.slow
def test_the_adapters_file_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    tiny_families.save("mixtral", tmp_path / "P0")
    program = (
        "import sys; from pathlib import Path; from cropi_tools.policy.adapters import *\n"
        "from cropi_tools.policy.loading import load_policy\n"
        "policy = load_policy('P0', 'cpu'); settings = inject_adapters(policy, 2, 4.0, 0)\n"
        "Path(sys.argv[1]).mkdir(); save_adapters(adapter_tensors(policy.model), settings, Path(sys.argv[1]))\n"
    )
    found = []
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", program, seed],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        found.append({path.name: path.read_bytes() for path in (tmp_path / seed / "adapter").iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"adapter_config.json", "adapter_model.safetensors"}
