"""When engine and trainer are far enough apart to stop; needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.engines.protocol import Completion, Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime.errors import CropiError
from cropi_tools.training.engine_sync import EngineSync


class Shifted:
    """The embedded engine, telling log-probabilities that are `shift` too high."""

    def __init__(self, inner: TransformersEngine) -> None:
        self.inner, self.shift, self.updates = inner, 0.0, 0
        self.asked: list[Request] = []

    def update_weights(self, policy: Any) -> None:
        self.updates += 1

    def sample(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        self.asked = requests
        found = self.inner.sample(requests, sampling)
        return [one._replace(logprobs=[value + self.shift for value in one.logprobs or ()]) for one in found]


@pytest.fixture
def shifted(policy_folder: Path) -> Shifted:
    return Shifted(TransformersEngine(load_policy(str(policy_folder), "cpu")))


def sync_of(shifted: Shifted, policy_folder: Path, bfloat16: bool) -> EngineSync:
    policy = load_policy(str(policy_folder), "cpu")
    prompts = [*tiny_policy.prompts(6), {"id": "long", "prompt": "12+34=" * 5}]
    return EngineSync(shifted, policy, prompts, Sampling(6, 0.7), bfloat16, seed=0)  # type: ignore[arg-type]


def test_in_float32_the_limit_is_fixed(shifted: Shifted, policy_folder: Path) -> None:
    sync = sync_of(shifted, policy_folder, bfloat16=False)
    assert sync(0) < 1e-5
    shifted.shift = 9e-4
    assert sync(1) == pytest.approx(9e-4, rel=0.02)
    shifted.shift = 1.1e-3
    with pytest.raises(CropiError, match=r"after step 2 .* by 0\.0011 on average \(limit 0\.001\)"):
        sync(2)
    assert shifted.updates == 3
    shifted.shift = float("nan")
    with pytest.raises(CropiError, match="by nan"):
        sync(3)


def test_in_bfloat16_it_follows_the_run(shifted: Shifted, policy_folder: Path) -> None:
    sync = sync_of(shifted, policy_folder, bfloat16=True)
    for step, shift in enumerate([0.035, 0.035, 0.035, 0.1]):
        shifted.shift = shift
        assert sync(step) == pytest.approx(shift, abs=0.02)
    shifted.shift = 0.3
    with pytest.raises(CropiError, match="--dtype float32"):
        sync(4)


def test_the_first_in_bfloat16_has_a_limit_too(shifted: Shifted, policy_folder: Path) -> None:
    shifted.shift = 0.2
    with pytest.raises(CropiError, match=r"limit 0\.05"):
        sync_of(shifted, policy_folder, bfloat16=True)(0)


def test_the_longest_prompts_are_asked_with_seeds_of_the_step(shifted: Shifted, policy_folder: Path) -> None:
    sync = sync_of(shifted, policy_folder, bfloat16=False)
    sync(0)
    first = shifted.asked
    assert len(first[0].prompt_token_ids) == 30
    assert len({request.seed for request in first}) == len(first) == 8
    sync(1)
    assert not {request.seed for request in first} & {request.seed for request in shifted.asked}
    sync(0)
    assert shifted.asked == first
