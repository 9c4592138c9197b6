"""Every statistic of the index, over weightings and bounds and by all ways to differentiate, against plain sums of its definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import naive_policy
import pytest
import torch

from cropi_tools.data.records import Rollout
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.per_sample import FastGradients
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.objective import Estimator

WEIGHTINGS = ("none", "token", "prefix", "suffix", "trajectory", "sequence")
# an empty response, one of a single token, and lengths that are all different
RESPONSES = ((7, True), (0, False), (12, False), (1, False), (3, True), (5, False), (2, True), (4, False))
BOUNDS: list[dict[str, Any]] = [
    {},
    {"weight_clip": (0.7, 1.4)},
    {"ppo_clip": (0.2, 0.3)},
    {"weight_clip": (0.9, 1.1), "ppo_clip": (0.4, 0.2), "self_normalize": True},
]


class Zero:
    """A direction that does not move anything: forward mode has its statistics from the tokens alone."""

    bytes = 0

    def get(self, name: str, device: torch.device) -> None:
        return None


def expected(rollout: Rollout, estimator: Estimator) -> dict[str, float]:
    """The definitions of docs/formats.md, one token after another in float64."""
    model = naive_policy.double_copy(naive_policy.policy().model)
    ratios: list[list[float]] = []
    for sample in rollout.samples:
        with torch.no_grad():
            own = naive_policy.logprobs(model, rollout.prompt_token_ids, sample.token_ids) if sample.token_ids else []
        ratios.append([math.exp(float(p) - b) for p, b in zip(own, sample.logprobs or [], strict=True)])
    weights = {
        "none": lambda r, t: 1.0,
        "token": lambda r, t: r[t],
        "prefix": lambda r, t: math.prod(r[: t + 1]),
        "suffix": lambda r, t: math.prod(r[t:]),
        "trajectory": lambda r, t: math.prod(r),
        "sequence": lambda r, t: math.prod(r) ** (1 / len(r)),
    }[estimator.weighting]
    touched = tokens = 0
    kl = 0.0
    counted = []
    for advantage, response in zip(naive_policy.advantages(rollout.rewards), ratios, strict=True):
        for place, ratio in enumerate(response):
            weight = weights(response, place)
            tokens += 1
            kl += ratio - 1 - math.log(ratio)
            low, high = estimator.weight_clip or (0.0, math.inf)
            hit = not low <= weight <= high
            if estimator.ppo_clip is not None:
                low, high = 1 - estimator.ppo_clip[0], 1 + estimator.ppo_clip[1]
                hit = hit or (advantage > 0 and weight > high) or (advantage < 0 and weight < low)
            touched += hit
            if estimator.weighting not in ("trajectory", "sequence"):
                counted.append(ratio if estimator.weighting == "none" else weight)
        if response and estimator.weighting in ("trajectory", "sequence"):
            counted.append(weights(response, 0))
    flat = [ratio for response in ratios for ratio in response]
    return {
        "pass_rate": sum(reward >= 1 for reward in rollout.rewards) / len(rollout.rewards),
        "tokens": tokens,
        "kl": kl / tokens,
        "effective_sample_size": sum(counted) ** 2 / (len(counted) * sum(w * w for w in counted)),
        "weight_count": len(counted),
        "clipped_fraction": touched / tokens,
        "mean_ratio": sum(flat) / tokens,
        "max_ratio": max(flat),
    }


@pytest.mark.parametrize(("weighting", "bounds"), [("none", 0), *itertools.product(WEIGHTINGS[1:], range(len(BOUNDS)))])
def test_the_statistics_are_those_of_their_definitions(weighting: Any, bounds: int) -> None:
    estimator = Estimator(weighting, **BOUNDS[bounds])
    settings = GradientSettings(estimator)
    made = [naive_policy.rollout(number, RESPONSES, drift=0.6) for number in range(3)]
    tasks = [task for rollout in made if isinstance(task := prepare(rollout, settings), GradientTask)]
    assert len(tasks) == len(made)
    wanted = [expected(rollout, estimator) for rollout in made]
    policy = naive_policy.policy()

    def ignore(name: str, gradients: torch.Tensor) -> None:
        pass

    found = {
        "reference": [ReferenceGradients(policy, settings).compute([task], ignore)[0].entry for task in tasks],
        "several passes": [
            ReferenceGradients(policy, settings, max_tokens=16).compute([task], ignore)[0].entry for task in tasks
        ],
        "fast": [one.entry for one in FastGradients(policy, settings).compute(tasks, ignore)],
        "forward": [
            one.gradient.entry
            for one in ForwardMode(policy, settings, {"v": Zero()}).compute(tasks)  # type: ignore[dict-item]
        ],
    }
    if bounds:
        assert any(one["clipped_fraction"] for one in wanted)
    for way, entries in found.items():
        for entry, definition in zip(entries, wanted, strict=True):
            for name, value in definition.items():
                assert entry[name] == pytest.approx(value, rel=2e-4, abs=1e-6), (way, name)


@pytest.mark.parametrize("weighting", ["trajectory", "sequence"])
def test_one_response_that_outweighs_the_others_leaves_one_over_their_number(weighting: Any) -> None:
    """Whatever its length is: 1 / 7 of seven responses with tokens, where a share of the tokens would be 12 / 34."""
    settings = GradientSettings(Estimator(weighting))
    made = naive_policy.rollout(0, RESPONSES)
    samples = list(made.samples)
    samples[2] = samples[2]._replace(logprobs=[value - 20.0 for value in samples[2].logprobs or []])
    task = prepare(made._replace(samples=samples), settings)
    assert isinstance(task, GradientTask)
    (found,) = ReferenceGradients(naive_policy.policy(), settings).compute([task], lambda name, gradients: None)
    assert found.entry["weight_count"] == 7
    assert found.entry["effective_sample_size"] == pytest.approx(1 / 7, rel=1e-6)
