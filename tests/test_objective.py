"""Advantages, importance weights, clipping and drift against closed forms."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from cropi_tools.objective import drift, group_advantages, kl_k3, policy_terms, token_coefficients


def test_advantages_use_the_bessel_corrected_deviation() -> None:
    rewards = [1.0, 0.0, 0.25, 1.0]
    spread = statistics.stdev(rewards)
    assert spread != pytest.approx(statistics.pstdev(rewards), rel=0.1)
    expected = [(reward - 0.5625) / (spread + 1e-4) for reward in rewards]
    assert group_advantages(rewards) == pytest.approx(expected, rel=1e-12)


def test_advantages_of_two() -> None:
    assert group_advantages([1.0, 0.0]) == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)]
    )


@pytest.mark.parametrize("rewards", [[0.1] * 8, [0.0, 0.0], [1.0], [-0.3] * 3])
def test_equal_rewards_have_no_advantage(rewards: list[float]) -> None:
    assert group_advantages(rewards) is None


def test_nearly_equal_rewards_have_one() -> None:
    found = group_advantages([0.1, 0.1, 0.1 + 1e-9])
    assert found is not None
    assert found[2] > 0 > found[0]


def test_coefficients() -> None:
    assert token_coefficients([2, 5, 0], "sequence", 3) == [1 / 6, 1 / 15, 1 / 3]
    assert token_coefficients([2, 5, 0], "token", 7) == [1 / 7] * 3


def gradient_of_term(log_ratio: float, advantage: float, clip: tuple[float, float] | None) -> tuple[float, float, bool]:
    behavior = torch.tensor([-1.0], dtype=torch.float64)
    logprobs = (behavior + log_ratio).requires_grad_()
    terms = policy_terms(logprobs, behavior, torch.tensor([advantage], dtype=torch.float64), "token", clip)
    terms.surrogate.sum().backward()
    return float(terms.surrogate.detach()), float(logprobs.grad), bool(terms.clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "clipped"),
    [
        (1.0, 2.0, 2.0, 2.0, False),
        (1.25, 2.0, 2.5, 2.5, False),  # inside
        (1.35, 2.0, 2.6, 0.0, True),  # gone up enough: flat at 1 + 0.3
        (0.5, 2.0, 1.0, 1.0, False),  # a good token that became rarer is still pulled back
        (0.75, -2.0, -1.6, 0.0, True),  # gone down enough: flat at 1 - 0.2
        (0.85, -2.0, -1.7, -1.7, False),
        (1.35, -2.0, -2.7, -2.7, False),  # a bad token that became likelier is still pushed down
    ],
)
def test_ppo_clip_is_flat_only_beyond_the_bound_in_the_direction_of_the_advantage(
    ratio: float, advantage: float, value: float, slope: float, clipped: bool
) -> None:
    assert gradient_of_term(math.log(ratio), advantage, (0.2, 0.3)) == (
        pytest.approx(value),
        pytest.approx(slope),
        clipped,
    )
    assert gradient_of_term(math.log(ratio), advantage, None) == (
        pytest.approx(ratio * advantage),
        pytest.approx(ratio * advantage),
        False,
    )


def test_weighting_none_takes_the_ratio_as_one() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -3.0])
    terms = policy_terms(logprobs, torch.tensor([-5.0, -0.1]), advantages, "none")
    terms.surrogate.sum().backward()
    assert torch.equal(logprobs.grad, advantages)


def test_k3_is_an_unbiased_estimate_of_the_divergence() -> None:
    torch.manual_seed(0)
    sampling, other = torch.log_softmax(torch.randn(2, 6, dtype=torch.float64), -1)
    exact = float((sampling.exp() * (sampling - other)).sum())
    estimate = float((sampling.exp() * kl_k3(other - sampling)).sum())  # its expectation, term by term
    assert estimate == pytest.approx(exact, rel=1e-12)
    assert float(kl_k3(torch.randn(100)).min()) >= 0


def test_drift_against_plain_sums() -> None:
    values = [0.1, -0.7, 0.0, 1.2]
    weights = [math.exp(value) for value in values]
    found = drift(torch.tensor(values))
    assert found.kl == pytest.approx(sum(w - 1 - v for w, v in zip(weights, values, strict=True)) / 4, rel=1e-6)
    assert found.effective_sample_size == pytest.approx(sum(weights) ** 2 / (4 * sum(w * w for w in weights)), rel=1e-6)
    assert (found.mean_ratio, found.max_ratio) == pytest.approx((sum(weights) / 4, max(weights)), rel=1e-6)


def test_effective_sample_size_neither_overflows_nor_depends_on_scale() -> None:
    assert drift(torch.tensor([500.0, 500.0])).effective_sample_size == pytest.approx(1.0)
    assert drift(torch.tensor([0.0, 500.0, 0.0, 0.0])).effective_sample_size == pytest.approx(0.25)
