"""New weights in a running vLLM, and the check that finds it when they are not all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asking import differences, disturb, requests

from cropi_tools.engines import weight_sync
from cropi_tools.engines.protocol import Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.adapters import inject_adapters
from cropi_tools.policy.loading import load_policy
from cropi_tools.policy.weights import checkpoint_weights
from cropi_tools.runtime.errors import CropiError
from cropi_tools.training.engine_sync import EngineSync

pytestmark = pytest.mark.vllm
SAMPLING = Sampling(30, 1.0)
# longer than a block of the prefix cache
PROMPTS = [{"id": str(i), "prompt": f"{i}+{i + 1}*{i + 2}=" * 12} for i in range(5)]


@pytest.fixture(scope="module")
def engine(engine_on: Any, untied: Path) -> Any:
    return engine_on(untied)


@pytest.fixture
def policy(untied: Path) -> Any:
    return load_policy(str(untied), "cpu")


@pytest.fixture
def sync(engine: Any, policy: Any) -> EngineSync:
    made = EngineSync(engine, policy, PROMPTS, SAMPLING, bfloat16=False, seed=0)
    assert made(0) < 1e-4
    return made


def test_new_weights(engine: Any, policy: Any) -> None:
    asked = requests(16, 2, length=70)
    engine.sample(asked, SAMPLING)
    for _ in range(2):
        disturb(policy, 0.02)
        engine.update_weights(policy)
        found = engine.sample(asked, SAMPLING)
        assert differences(policy, asked, found, SAMPLING).max() < 1e-4
        assert engine.sample(asked, Sampling(30, 0.0)) == TransformersEngine(policy).sample(asked, Sampling(30, 0.0))


def test_adapters_are_handed_over_merged(engine: Any, untied: Path) -> None:
    """vLLM has the model without adapters; the trainer has them beside it."""
    adapted = load_policy(str(untied), "cpu")
    inject_adapters(adapted, 4, 8.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in adapted.trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    asked = requests(16, 2, length=70)
    before = engine.sample(asked, SAMPLING)
    engine.update_weights(adapted)
    found = engine.sample(asked, SAMPLING)
    assert differences(adapted, asked, found, SAMPLING).max() < 1e-4
    assert differences(adapted, asked, before, SAMPLING).max() > 1e-2


def test_agreement_after_an_update(sync: EngineSync, policy: Any) -> None:
    disturb(policy, 0.02)
    assert sync(1) < 1e-4


def test_an_engine_left_behind_is_found(
    sync: EngineSync, policy: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(policy, 0.02)
    monkeypatch.setattr(engine, "update_weights", lambda policy: None)
    with pytest.raises(CropiError, match=r"after step 7 .* differ .*limit 0\.001.*--engine transformers"):
        sync(7)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_parameter_left_out_is_found(
    name: str, sync: EngineSync, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(policy, 0.02)
    rest = [(key, tensor) for key, tensor in checkpoint_weights(policy.model) if key != name]
    assert len(rest) == len(list(policy.model.named_parameters())) - 1
    monkeypatch.setattr(weight_sync, "stored_weights", lambda model: iter(rest))
    with pytest.raises(CropiError, match="it samples from other weights"):
        sync(1)


def test_cached_prompts_of_old_weights_are_found(
    sync: EngineSync, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(policy, 0.02)
    monkeypatch.setattr(weight_sync, "forget_prefixes", lambda llm: None)
    with pytest.raises(CropiError, match="it samples from other weights"):
        sync(1)
    monkeypatch.undo()
    assert sync(1) < 1e-4
