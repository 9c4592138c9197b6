"""Advantages, importance weights, clipping, normalization and drift against plain loops and closed forms."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_tools.objective import (
    Estimator,
    drift,
    group_advantages,
    kl_k3,
    policy_terms,
    token_coefficients,
    token_weights,
)

BASELINES: list[Any] = ["group", "centered", "leave-one-out"]
PRODUCTS: list[Any] = ["prefix", "suffix", "trajectory", "sequence"]


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
    for baseline in BASELINES:
        assert group_advantages(rewards, baseline) is None


def test_baselines_by_their_definition() -> None:
    rewards = [1.0, 0.0, 0.25, 1.0]
    assert group_advantages(rewards, "centered") == pytest.approx([reward - 0.5625 for reward in rewards], rel=1e-12)
    others = [rewards[:k] + rewards[k + 1 :] for k in range(4)]
    expected = [reward - statistics.fmean(rest) for reward, rest in zip(rewards, others, strict=True)]
    assert group_advantages(rewards, "leave-one-out") == pytest.approx(expected, rel=1e-12)


def test_nearly_equal_rewards_have_one() -> None:
    found = group_advantages([0.1, 0.1, 0.1 + 1e-9])
    assert found is not None
    assert found[2] > 0 > found[0]


def test_coefficients() -> None:
    assert token_coefficients([2, 5, 0], "sequence", 3) == [1 / 6, 1 / 15, 1 / 3]
    assert token_coefficients([2, 5, 0], "token", 7) == [1 / 7] * 3
    assert token_coefficients([2, 5, 0], "constant", 3 * 16) == [1 / 48] * 3


def gradient_of_term(log_ratio: float, advantage: float, clip: tuple[float, float] | None) -> tuple[float, float, bool]:
    behavior = torch.tensor([-1.0], dtype=torch.float64)
    logprobs = (behavior + log_ratio).requires_grad_()
    one = torch.tensor([advantage], dtype=torch.float64)
    terms = policy_terms(logprobs, behavior, one, [1], Estimator(ppo_clip=clip))
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
    terms = policy_terms(logprobs, torch.tensor([-5.0, -0.1]), advantages, [2], Estimator("none"))
    terms.surrogate.sum().backward()
    assert torch.equal(logprobs.grad, advantages)
    assert torch.equal(terms.weights, torch.ones(2))


@pytest.mark.parametrize("bound", [{"weight_clip": (0.5, 2.0)}, {"ppo_clip": (0.2, 0.2)}, {"self_normalize": True}])
def test_weighting_none_has_nothing_to_bound(bound: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="none"):
        policy_terms(torch.zeros(1), torch.zeros(1), torch.ones(1), [1], Estimator("none", **bound))


def naive_weights(log_ratios: list[list[float]], weighting: str) -> list[float]:
    """Products of ratios, one after another, response by response."""
    found = []
    for response in log_ratios:
        ratios = [math.exp(value) for value in response]
        for t in range(len(ratios)):
            found.append(
                {
                    "token": ratios[t],
                    "prefix": math.prod(ratios[: t + 1]),
                    "suffix": math.prod(ratios[t:]),
                    "trajectory": math.prod(ratios),
                    "sequence": math.prod(ratios) ** (1 / len(ratios)),
                }[weighting]
            )
    return found


def naive_terms(
    log_ratios: list[list[float]], advantages: list[float], estimator: Estimator, mean: float | None = None
) -> tuple[list[float], list[float], list[bool]]:
    """Value, slope in log pi and clipped flag of every token."""
    weights = naive_weights(log_ratios, estimator.weighting)
    low, high = estimator.weight_clip or (0.0, math.inf)
    bounded = [min(max(weight, low), high) for weight in weights]
    if estimator.self_normalize:
        divisor = statistics.fmean(bounded) if mean is None else mean
    else:
        divisor = 1.0
    values, slopes, clipped = [], [], []
    spread = [a for a, response in zip(advantages, log_ratios, strict=True) for _ in response]
    for weight, used, advantage in zip(weights, bounded, spread, strict=True):
        value = slope = advantage * used / divisor
        cut = used != weight
        if estimator.ppo_clip is not None:
            floor, ceiling = 1 - estimator.ppo_clip[0], 1 + estimator.ppo_clip[1]
            if (advantage > 0 and weight > ceiling) or (advantage < 0 and weight < floor):
                value, slope, cut = advantage * (ceiling if advantage > 0 else floor), 0.0, True
        values.append(value)
        slopes.append(slope)
        clipped.append(cut)
    return values, slopes, clipped


def computed_terms(
    log_ratios: list[list[float]],
    advantages: list[float],
    estimator: Estimator,
    mean: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[float], list[float], list[bool]]:
    behavior = -torch.rand(sum(map(len, log_ratios)), dtype=dtype, generator=torch.Generator().manual_seed(0))
    moved = torch.tensor([value for response in log_ratios for value in response], dtype=dtype)
    logprobs = (behavior + moved).requires_grad_()
    lengths = [len(response) for response in log_ratios]
    spread = torch.tensor(advantages, dtype=dtype).repeat_interleave(torch.tensor(lengths))
    terms = policy_terms(logprobs, behavior, spread, lengths, estimator, mean)
    assert terms.surrogate.dtype == dtype
    assert not any(value.requires_grad for value in terms[1:])
    assert terms.weights.tolist() == pytest.approx(
        naive_weights(log_ratios, estimator.weighting), rel=1e-10 if dtype == torch.float64 else 1e-5
    )
    (gradient,) = torch.autograd.grad(terms.surrogate.sum(), logprobs)
    return terms.surrogate.tolist(), gradient.tolist(), terms.clipped.tolist()


groups = st.lists(st.lists(st.floats(-1.5, 1.5), max_size=5), min_size=1, max_size=5).filter(lambda g: any(map(len, g)))
estimators = st.builds(
    Estimator,
    st.sampled_from(["token", *PRODUCTS]),
    st.sampled_from([None, (0.0, 1.5), (0.5, 2.0)]),
    st.sampled_from([None, (0.2, 0.28)]),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(groups, estimators, st.randoms(use_true_random=False), st.sampled_from([None, 0.7]))
def test_every_estimator_against_a_plain_loop(
    log_ratios: list[list[float]], estimator: Estimator, draw: random.Random, mean: float | None
) -> None:
    advantages = [draw.choice([-1.3, -0.4, 0.6, 2.0]) for _ in log_ratios]
    weights = naive_weights(log_ratios, estimator.weighting)
    corners = [*(estimator.weight_clip or ()), *((0.8, 1.28) if estimator.ppo_clip else ())]
    if any(abs(weight - corner) < 1e-9 for weight in weights for corner in corners):
        return  # at a corner rounding decides the side
    expected = naive_terms(log_ratios, advantages, estimator, mean)
    values, slopes, clipped = computed_terms(log_ratios, advantages, estimator, mean)
    assert values == pytest.approx(expected[0], rel=1e-10)
    assert slopes == pytest.approx(expected[1], rel=1e-10)
    assert clipped == expected[2]


@pytest.mark.parametrize("weighting", ["token", *PRODUCTS])
def test_float32_input(weighting: Any) -> None:
    log_ratios = [[0.5, -0.25, 0.125], [], [-1.0], [0.75, 0.0, 0.5, -0.5]]
    estimator = Estimator(weighting, (0.1, 1.9), (0.2, 0.28), True)
    advantages = [1.0, 2.0, -0.5, 0.25]
    found = computed_terms(log_ratios, advantages, estimator, dtype=torch.float32)
    expected = naive_terms(log_ratios, advantages, estimator)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert found[2] == expected[2]


def test_a_bounded_weight_keeps_its_gradient_and_a_dropped_one_does_not() -> None:
    log_ratios, advantages = [[2.0], [-2.0]], [1.0, -1.0]
    assert computed_terms(log_ratios, advantages, Estimator(weight_clip=(0.5, 1.5)))[1] == [1.5, -0.5]
    assert computed_terms(log_ratios, advantages, Estimator(ppo_clip=(0.5, 0.5)))[1] == [0.0, 0.0]


def test_parts_of_a_prompt_share_the_mean_weight() -> None:
    log_ratios, advantages = [[0.3, -0.9], [1.1], [], [0.2, 0.4, -0.6]], [1.0, -0.5, 0.1, 0.7]
    estimator = Estimator("prefix", (0.0, 2.0), None, True)
    whole = computed_terms(log_ratios, advantages, estimator)[1]
    mean = statistics.fmean(min(weight, 2.0) for weight in naive_weights(log_ratios, "prefix"))
    parts = [computed_terms(log_ratios[a:b], advantages[a:b], estimator, mean)[1] for a, b in ((0, 2), (2, 4))]
    assert parts[0] + parts[1] == pytest.approx(whole, rel=1e-12)


def test_empty_responses_alone() -> None:
    for weighting in ("token", *PRODUCTS):
        assert policy_terms(*torch.zeros(3, 0), [0, 0], Estimator(weighting)).weights.shape == (0,)
        assert policy_terms(*torch.zeros(3, 0), [], Estimator(weighting)).surrogate.shape == (0,)


@pytest.mark.parametrize("weighting", ["none", "token", *PRODUCTS])
@pytest.mark.parametrize("ppo_clip", [None, (0.2, 0.28)])
def test_forward_mode_agrees_with_reverse_mode(weighting: Any, ppo_clip: Any) -> None:
    if weighting == "none":
        ppo_clip = None
    draw = torch.Generator().manual_seed(3)
    logprobs, behavior, advantages, tangent = torch.randn(4, 9, dtype=torch.float64, generator=draw)
    estimator = Estimator(weighting, None, ppo_clip, weighting != "none")

    def total(values: torch.Tensor) -> torch.Tensor:
        return policy_terms(values, behavior, advantages, [4, 0, 5], estimator).surrogate.sum()

    value, forward = torch.func.jvp(total, (logprobs,), (tangent,))
    logprobs.requires_grad_()
    (gradient,) = torch.autograd.grad(total(logprobs), logprobs)
    assert float(forward) == pytest.approx(float(gradient @ tangent), rel=1e-12)
    assert float(value) == pytest.approx(float(total(logprobs.detach())), rel=1e-12)


@pytest.mark.parametrize("weighting", PRODUCTS)
def test_products_of_2000_ratios(weighting: Any) -> None:
    """The running product passes 1e60, which float32 cannot hold, and the exact sum of logarithms is the judge."""
    draw = random.Random(1)
    longest = [draw.gauss(0.15, 0.4) for _ in range(1000)] + [draw.gauss(-0.15, 0.4) for _ in range(1000)]
    values = torch.tensor([*longest, 0.5, -0.25], dtype=torch.float32)
    found = token_weights(values, [2000, 2], weighting)
    row = values.tolist()[:2000]
    total = math.fsum(row)
    assert max(math.fsum(row[:t]) for t in range(0, 2000, 50)) > math.log(1e60)
    for t in (0, 1, 999, 1000, 1998, 1999):
        logarithm = {
            "prefix": math.fsum(row[: t + 1]),
            "suffix": math.fsum(row[t:]),
            "trajectory": total,
            "sequence": total / 2000,
        }[weighting]
        assert float(found[t]) == pytest.approx(math.exp(logarithm), rel=1e-11)
    last = {"prefix": (0.5, 0.25), "suffix": (0.25, -0.25), "trajectory": (0.25, 0.25), "sequence": (0.125, 0.125)}
    assert found[2000:].tolist() == pytest.approx([math.exp(value) for value in last[weighting]], rel=1e-14)


def test_bounds_hold_infinite_weights() -> None:
    """e^900 is beyond float64: a bound or a dropped gradient must not become 0 * inf."""
    logprobs = torch.zeros(900, requires_grad=True)
    behavior, advantages = torch.full((900,), -1.0), torch.ones(900)
    for estimator in (Estimator("trajectory", (0.0, 3.0)), Estimator("trajectory", None, (0.2, 0.2))):
        terms = policy_terms(logprobs, behavior, advantages, [900], estimator)
        (gradient,) = torch.autograd.grad(terms.surrogate.sum(), logprobs)
        assert bool(terms.weights.isinf().all())
        assert bool(terms.clipped.all())
        assert torch.equal(gradient, torch.full((900,), 0.0 if estimator.ppo_clip else 3.0))
        assert torch.equal(terms.surrogate.detach(), torch.full((900,), 1.2 if estimator.ppo_clip else 3.0))


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


def test_drift_takes_the_effective_sample_size_of_the_weights_given() -> None:
    log_ratio = torch.tensor([0.1, -0.7, 0.0, 1.2])
    weights = [0.5, 0.5, 3.0, 3.0]
    found = drift(log_ratio, torch.tensor(weights, dtype=torch.float64))
    assert found.effective_sample_size == pytest.approx(7.0**2 / (4 * 18.5), rel=1e-12)
    assert found._replace(effective_sample_size=0.0) == drift(log_ratio)._replace(effective_sample_size=0.0)
    for scale in (1e-300, 1e300):  # neither squares nor sums may under- or overflow
        scaled = torch.tensor(weights, dtype=torch.float64) * scale
        assert drift(log_ratio, scaled).effective_sample_size == pytest.approx(7.0**2 / (4 * 18.5), rel=1e-12)
    assert drift(log_ratio, torch.zeros(4)).effective_sample_size == 0.0
    assert math.isnan(drift(log_ratio, torch.tensor([1.0, 1.0, 1.0, math.inf])).effective_sample_size)
