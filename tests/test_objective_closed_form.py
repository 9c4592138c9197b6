"""The expectation of every estimator, by enumerating all groups of responses, against what the theory says it is.

A tabular policy writes one or two tokens of a vocabulary of three: token 0 ends the response, after two tokens it is cut. All seven
responses and all groups of K of them can be listed, so expectations are sums: the estimator's over groups drawn from the behavior
policy, and the theory's over single responses, from probabilities and hand-derived gradients of a softmax in numpy.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_tools.objective import Estimator, group_advantages, policy_terms, token_coefficients

RESPONSES = [(0,), *itertools.product((1, 2), (0, 1, 2))]
WEIGHTINGS: list[Any] = ["none", "token", "prefix", "suffix", "trajectory"]


class World(NamedTuple):
    """Logits [3 states, 3 tokens] of policy and behavior (state: nothing yet, after 1, after 2), and a reward for each response."""

    policy: np.ndarray
    behavior: np.ndarray
    rewards: np.ndarray


def world(seed: int, binary: bool = False) -> World:
    draw = np.random.default_rng(seed)
    rewards = draw.integers(0, 2, 7) if binary else draw.normal(size=7)
    return World(draw.normal(size=(3, 3)), draw.normal(size=(3, 3)), rewards.astype(float))


def steps(response: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (state, token) pairs of a response."""
    return list(zip((0, *response), response, strict=False))


def torch_logprobs(logits: torch.Tensor, responses: list[tuple[int, ...]]) -> torch.Tensor:
    """Log-probabilities of the tokens of responses, one after another."""
    states, tokens = zip(*(pair for response in responses for pair in steps(response)), strict=True)
    return torch.log_softmax(logits, -1)[list(states), list(tokens)]


def estimator_mean(
    w: World, estimator: Estimator, baseline: Any = "leave-one-out", aggregation: Any = "constant", count: int = 2
) -> np.ndarray:
    """The expected gradient [3, 3] of the code over all groups of `count` responses drawn from the behavior policy."""
    logits = torch.tensor(w.policy, requires_grad=True)
    behavior = torch.tensor(w.behavior)
    likelihood = {r: math.exp(float(torch_logprobs(behavior, [r]).sum())) for r in RESPONSES}
    responses: list[tuple[int, ...]] = []
    advantages: list[float] = []
    coefficients: list[float] = []
    for places in itertools.product(range(7), repeat=count):
        group = [RESPONSES[place] for place in places]
        found = group_advantages([float(w.rewards[place]) for place in places], baseline)
        if found is None:
            continue
        lengths = [len(response) for response in group]
        total = sum(lengths) if aggregation == "token" else count
        share = math.prod(likelihood[response] for response in group)
        responses += group
        advantages += found
        coefficients += [share * c for c in token_coefficients(lengths, aggregation, total)]
    lengths = [len(response) for response in responses]
    spread = torch.tensor(lengths)
    terms = policy_terms(
        torch_logprobs(logits, responses),
        torch_logprobs(behavior, responses),
        torch.tensor(advantages, dtype=torch.float64).repeat_interleave(spread),
        lengths,
        estimator,
    )
    per_token = torch.tensor(coefficients, dtype=torch.float64).repeat_interleave(spread)
    (gradient,) = torch.autograd.grad((per_token * terms.surrogate).sum(), logits)
    return gradient.numpy()


def probabilities(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(1, keepdims=True)


def score(policy: np.ndarray, state: int, token: int) -> np.ndarray:
    """The gradient [3, 3] of one token's log-probability in the logits."""
    found = np.zeros((3, 3))
    found[state] = -policy[state]
    found[state, token] += 1
    return found


def likelihood(table: np.ndarray, response: tuple[int, ...]) -> float:
    return math.prod(table[state, token] for state, token in steps(response))


def expected_reward_gradient(w: World) -> np.ndarray:
    """The true gradient of the expected reward under the policy: the sum over all responses, differentiated by autograd."""

    def value(logits: torch.Tensor) -> torch.Tensor:
        single = [torch.exp(torch_logprobs(logits, [response]).sum()) for response in RESPONSES]
        return sum(p * float(reward) for p, reward in zip(single, w.rewards, strict=True))

    logits = torch.tensor(w.policy, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(logits), logits)
    return gradient.numpy()


def theory(w: World, weighting: str, share: Any = lambda response: 1.0) -> np.ndarray:
    """sum over t of E[(R - b) share(tau) grad log pi(a_t | h_t)], each token j drawn from the policy or from the behavior policy.

    Whose token j is, seen from the term of token t: `none` always beta's; `token` the policy's at j = t; `prefix` at j <= t; `suffix` at
    j >= t; `trajectory` always. b is the mean reward under beta, what the others of a group are worth on average.
    """
    policy, behavior = probabilities(w.policy), probabilities(w.behavior)
    of_policy = {
        "none": lambda j, t: False,
        "token": lambda j, t: j == t,
        "prefix": lambda j, t: j <= t,
        "suffix": lambda j, t: j >= t,
        "trajectory": lambda j, t: True,
    }[weighting]
    mean = sum(likelihood(behavior, response) * r for response, r in zip(RESPONSES, w.rewards, strict=True))
    found = np.zeros((3, 3))
    for response, reward in zip(RESPONSES, w.rewards, strict=True):
        pairs = steps(response)
        for t, (state, token) in enumerate(pairs):
            chance = math.prod((policy if of_policy(j, t) else behavior)[pair] for j, pair in enumerate(pairs))
            found += chance * (reward - mean) * share(response) * score(policy, state, token)
    return found


seeds = st.integers(0, 10**6)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_trajectory_weights_with_leave_one_out_are_unbiased(seed: int) -> None:
    w = world(seed)
    truth = expected_reward_gradient(w)
    for count in (2, 3):
        found = estimator_mean(w, Estimator("trajectory"), count=count)
        assert np.abs(found - truth).max() < 1e-10
    assert np.abs(w.policy - w.behavior).max() > 0.1  # really off-policy


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, "sequence"])
def test_centering_on_the_own_mean_is_leave_one_out_times_k_minus_one_over_k(weighting: Any, count: int) -> None:
    """Off-policy too, whatever the weights: the two advantages differ by that factor in every group."""
    w = world(11)
    unbiased = estimator_mean(w, Estimator(weighting), "leave-one-out", count=count)
    centered = estimator_mean(w, Estimator(weighting), "centered", count=count)
    assert np.abs(centered - unbiased * (count - 1) / count).max() < 1e-10
    if weighting == "trajectory":
        assert np.abs(centered - expected_reward_gradient(w) * (count - 1) / count).max() < 1e-10


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_each_weight_has_the_bias_the_theory_says(seed: int) -> None:
    w = world(seed)
    for weighting in WEIGHTINGS:
        expected = theory(w, weighting)
        for count in (2, 3):
            assert np.abs(estimator_mean(w, Estimator(weighting), count=count) - expected).max() < 1e-10, weighting


def test_the_biases_are_not_small_and_differ() -> None:
    """Without this the test before could pass on a policy where every weight gives the same."""
    w = world(5)
    truth = expected_reward_gradient(w)
    assert np.abs(truth).max() > 0.01
    found = [truth, *(theory(w, weighting) for weighting in WEIGHTINGS[:-1])]
    for one, other in itertools.combinations(found, 2):
        assert np.abs(one - other).max() > 0.01
    assert np.abs(theory(w, "trajectory") - truth).max() < 1e-12  # the theory's own code, against autograd


def test_on_policy_all_weights_are_unbiased() -> None:
    w = world(7)._replace(behavior=world(7).policy)
    for weighting in (*WEIGHTINGS, "sequence"):
        found = estimator_mean(w, Estimator(weighting), count=3)
        assert np.abs(found - expected_reward_gradient(w)).max() < 1e-10


def test_weights_with_the_ratio_of_the_action_need_no_baseline() -> None:
    """E_beta[w_t grad log pi_t] = 0 for them, so that a baseline moves their variance only; for the other two it moves the mean."""
    w = world(6)
    logits, behavior = torch.tensor(w.policy, requires_grad=True), torch.tensor(w.behavior)
    lengths = [len(response) for response in RESPONSES]
    sampled = torch_logprobs(behavior, RESPONSES)
    chance = torch.stack([part.sum().exp() for part in sampled.split(lengths)]).repeat_interleave(torch.tensor(lengths))
    for weighting in (*WEIGHTINGS, "sequence"):
        logprobs = torch_logprobs(logits, RESPONSES)
        terms = policy_terms(logprobs, sampled, torch.ones_like(sampled), lengths, Estimator(weighting))
        (gradient,) = torch.autograd.grad((chance * terms.surrogate).sum(), logits)
        if weighting in ("none", "sequence"):
            assert float(gradient.abs().max()) > 0.01
        else:
            assert float(gradient.abs().max()) < 1e-14


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_sequence_weights_follow_the_geometric_mean_surrogate(seed: int) -> None:
    """GSPO: the gradient is that of E_beta[(R - b) |tau| s(tau)], s the geometric mean of the ratios, whatever autograd makes of it."""
    w = world(seed)
    logits = torch.tensor(w.policy, requires_grad=True)
    behavior = torch.tensor(w.behavior)
    table = probabilities(w.behavior)
    mean = sum(likelihood(table, response) * r for response, r in zip(RESPONSES, w.rewards, strict=True))
    for aggregation in ("constant", "sequence"):
        value = torch.zeros((), dtype=torch.float64)
        for response, reward in zip(RESPONSES, w.rewards, strict=True):
            ratio = torch.exp((torch_logprobs(logits, [response]) - torch_logprobs(behavior, [response])).sum())
            share = len(response) if aggregation == "constant" else 1
            value = value + likelihood(table, response) * (reward - mean) * share * ratio ** (1 / len(response))
        (expected,) = torch.autograd.grad(value, logits)
        found = estimator_mean(w, Estimator("sequence"), aggregation=aggregation)
        assert np.abs(found - expected.numpy()).max() < 1e-10


def test_dividing_by_the_length_weighs_each_response_by_one_over_its_length() -> None:
    """`sequence` aggregation: no longer the gradient of the expected reward, and exactly this."""
    w = world(3)
    for weighting in WEIGHTINGS:
        found = estimator_mean(w, Estimator(weighting), aggregation="sequence", count=3)
        assert np.abs(found - theory(w, weighting, lambda response: 1 / len(response))).max() < 1e-10
    biased = estimator_mean(w, Estimator("trajectory"), aggregation="sequence")
    assert np.abs(biased - expected_reward_gradient(w)).max() > 0.01


def test_dividing_by_all_tokens_or_by_the_deviation_biases() -> None:
    w = world(3)
    truth = expected_reward_gradient(w)
    direction = truth / np.linalg.norm(truth)
    for baseline, aggregation in (("leave-one-out", "token"), ("group", "constant")):
        found = estimator_mean(w, Estimator("trajectory"), baseline, aggregation, count=3)
        assert np.linalg.norm(found - (found * direction).sum() * direction) > 1e-3  # not even in the true direction


def test_the_deviation_of_two_binary_rewards_is_one_constant() -> None:
    """K = 2 and rewards 0 or 1: every group with an advantage has std sqrt(1/2), so nothing but the scale changes."""
    w = world(0, binary=True)
    assert 0 < w.rewards.sum() < 7
    found = estimator_mean(w, Estimator("trajectory"), "group")
    assert np.abs(found - expected_reward_gradient(w) / 2 / (math.sqrt(0.5) + 1e-4)).max() < 1e-10


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(1.05, 3.0))
def test_a_bounded_trajectory_weight_loses_what_lies_beyond_the_bound(seed: int, bound: float) -> None:
    w = world(seed)
    policy, behavior = probabilities(w.policy), probabilities(w.behavior)
    mean = sum(likelihood(behavior, response) * r for response, r in zip(RESPONSES, w.rewards, strict=True))
    expected = np.zeros((3, 3))
    for response, reward in zip(RESPONSES, w.rewards, strict=True):
        chance = min(likelihood(policy, response), bound * likelihood(behavior, response))
        expected += chance * (reward - mean) * sum(score(policy, *pair) for pair in steps(response))
    found = estimator_mean(w, Estimator("trajectory", weight_clip=(0.0, bound)))
    assert np.abs(found - expected).max() < 1e-10
