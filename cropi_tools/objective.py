"""The one objective that cropi-grad and cropi-train share: advantages, importance weights, aggregation.

For a prompt s with responses tau_1..tau_K sampled from beta and rewards R_k (method.md section 2, the paper's POPI):

    A_k   = (R_k - mean(R)) / (std(R) + 1e-4)                       std Bessel-corrected; no gradient when all rewards are equal
    rho_t = pi_theta(a_t | h_t) / beta(a_t | h_t)                   the token ratio
    J(s)  = sum_k A_k sum_t c_kt rho_kt                             c: aggregation; its gradient is sum A c rho grad log pi_theta

`weighting`: `token` uses rho_t; `none` replaces it by log pi_theta (ratio taken as 1). `aggregation`: `sequence` c = 1 / (K |tau_k|)
(GRPO, the paper's influence), `token` c = 1 / all response tokens (DAPO, verl's default). Tokens are those really sampled: the prompt
and padding have no part, a sampled end token does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

STD_FLOOR = 1e-4  # TRL's and the paper's constant

Weighting = Literal["token", "none"]
Aggregation = Literal["sequence", "token"]
Clip = tuple[float, float]


def group_advantages(rewards: Sequence[float]) -> list[float] | None:
    """Advantages [K] of a prompt's responses, or None when they give no gradient (all rewards equal, or K = 1).

    Rewards are compared, not their deviation: eight rewards of 0.1 have a float32 standard deviation of 8e-9, not 0.
    """
    if max(rewards) == min(rewards):
        return None
    count = len(rewards)
    mean = math.fsum(rewards) / count
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (count - 1))
    return [(reward - mean) / (std + STD_FLOOR) for reward in rewards]


def token_coefficients(lengths: Sequence[int], aggregation: Aggregation, total: float) -> list[float]:
    """The coefficient c of every token of each response.

    lengths: response tokens. total: the fixed denominator over everything that is averaged, whatever the micro-batch: the number of
    responses for `sequence`, of response tokens for `token`. An empty response has no token to weight.
    """
    if aggregation == "sequence":
        return [1.0 / (total * max(length, 1)) for length in lengths]
    return [1.0 / total] * len(lengths)


class Terms(NamedTuple):
    """The objective's value per token and what is told about it, all [tokens] and without normalisation.

    surrogate: whose sum times coefficients is maximised (differentiable). log_ratio: log pi_theta - log beta (detached).
    clipped: where the PPO surrogate is flat (bool).
    """

    surrogate: torch.Tensor
    log_ratio: torch.Tensor
    clipped: torch.Tensor


def policy_terms(
    logprobs: torch.Tensor,
    behavior: torch.Tensor,
    advantages: torch.Tensor,
    weighting: Weighting,
    ppo_clip: Clip | None = None,
) -> Terms:
    """Per-token terms A_t rho_t (or A_t log pi_theta) with an optional PPO clip.

    logprobs, behavior, advantages: [tokens], float32 or wider; only logprobs carries a gradient. ppo_clip (low, high): the term is
    min(rho A, clip(rho, 1 - low, 1 + high) A), flat where the ratio has left the interval in the advantage's direction.
    """
    log_ratio = logprobs - behavior
    if weighting == "none":
        surrogate = advantages * logprobs
        return Terms(surrogate, log_ratio.detach(), torch.zeros_like(surrogate, dtype=torch.bool))
    ratio = torch.exp(log_ratio)
    surrogate = advantages * ratio
    clipped = torch.zeros_like(surrogate, dtype=torch.bool)
    if ppo_clip is not None:
        bounded = advantages * ratio.clamp(1.0 - ppo_clip[0], 1.0 + ppo_clip[1])
        clipped = (bounded < surrogate).detach()
        surrogate = torch.minimum(surrogate, bounded)
    return Terms(surrogate, log_ratio.detach(), clipped)


def kl_k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(sampling policy || other), per token: r - 1 - log r with r = other / sampling, log_ratio = log r.

    Not negative, unbiased on samples of the sampling policy; differentiable if log_ratio is.
    """
    return torch.expm1(log_ratio) - log_ratio


class Drift(NamedTuple):
    """How far the policy has moved from the behavior policy on one prompt's tokens (method.md section 2).

    kl: mean k3 of KL(beta || theta). effective_sample_size: (sum w)^2 / (n sum w^2) in (0, 1], w the ratios. mean_ratio, max_ratio.
    """

    kl: float
    effective_sample_size: float
    mean_ratio: float
    max_ratio: float


def drift(log_ratio: torch.Tensor) -> Drift:
    """Drift over the tokens [n] of one prompt, n >= 1; computed in float64."""
    wide = log_ratio.double()
    # the effective sample size does not change when all weights are scaled: subtract the largest, so that nothing overflows
    scaled = torch.exp(wide - wide.max())
    size = float(scaled.sum() ** 2 / (len(scaled) * (scaled**2).sum()))
    ratio = torch.exp(wide)
    return Drift(float(kl_k3(wide).mean()), size, float(ratio.mean()), float(ratio.max()))
