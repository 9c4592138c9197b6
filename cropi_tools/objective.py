"""The one objective that cropi-grad and cropi-train share: advantages, importance weights, aggregation.

For a prompt s with responses tau_1..tau_K sampled from beta and rewards R_k (docs/method.md, "The gradient of one prompt"; the paper's
POPI, arXiv 2510.26491):

    A_k   = (R_k - mean(R)) / (std(R) + 1e-4)                       std Bessel-corrected; no gradient when all rewards are equal
    r_t   = pi_theta(a_t | h_t) / beta(a_t | h_t)                   the token ratio
    g(s)  = sum_k A_k sum_t c_kt w_kt grad log pi_theta(a_t | h_t)  c: aggregation, w: importance weight

`weighting` says what w_t is: `none` 1; `token` r_t (the paper); `prefix` prod_{j<=t} r_j; `suffix` prod_{j>=t} r_j; `trajectory`
prod_j r_j; `sequence` (prod_j r_j)^(1/|tau|), GSPO's. `aggregation`: `sequence` c = 1 / (K |tau_k|) (GRPO, the paper's influence),
`token` c = 1 / all response tokens (DAPO, verl's default), `constant` c = 1 / (K times a fixed length) (Dr.GRPO). Tokens are those
really sampled: the prompt and padding have no part, a sampled end token does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

STD_FLOOR = 1e-4  # TRL's and the paper's constant

Weighting = Literal["none", "token", "prefix", "suffix", "trajectory", "sequence"]
Aggregation = Literal["sequence", "token", "constant"]
Baseline = Literal["group", "centered", "leave-one-out"]
Clip = tuple[float, float]
ONE_A_RESPONSE = ("trajectory", "sequence")  # weightings under which all tokens of a response share one weight


class Estimator(NamedTuple):
    """Which importance weight a token gets, and how it is bounded.

    weight_clip (low, high): bounds the weight itself and keeps the gradient. ppo_clip (low, high): drops the gradient where the PPO
    surrogate with the ratio bounds 1 - low and 1 + high is flat; the ratio is the weight before weight_clip and self_normalize.
    self_normalize: the weights are divided by their mean over the prompt's tokens, after weight_clip.
    """

    weighting: Weighting = "token"
    weight_clip: Clip | None = None
    ppo_clip: Clip | None = None
    self_normalize: bool = False


def group_advantages(rewards: Sequence[float], baseline: Baseline = "group") -> list[float] | None:
    """Advantages [K] of a prompt's responses, or None when they give no gradient (all rewards equal, or K = 1).

    baseline: `group` (R - mean) / (std + 1e-4); `centered` R - mean; `leave-one-out` R less the mean of the other responses, which is
    `centered` times K / (K - 1). Rewards are compared, not their deviation: eight rewards of 0.1 have a float32 standard deviation of
    8e-9, not 0.
    """
    if max(rewards) == min(rewards):
        return None
    count, total = len(rewards), math.fsum(rewards)
    if baseline == "leave-one-out":
        return [reward - (total - reward) / (count - 1) for reward in rewards]
    mean = total / count
    centered = [reward - mean for reward in rewards]
    if baseline == "centered":
        return centered
    std = math.sqrt(math.fsum(value**2 for value in centered) / (count - 1))
    return [value / (std + STD_FLOOR) for value in centered]


def token_coefficients(lengths: Sequence[int], aggregation: Aggregation, total: float) -> list[float]:
    """The coefficient c of every token of each response.

    lengths: response tokens. total: the fixed denominator over everything that is averaged, whatever the micro-batch: the number of
    responses for `sequence`, of response tokens for `token`, of responses times the fixed length for `constant` (influence takes the
    length 1). An empty response has no token to weight.
    """
    if aggregation == "sequence":
        return [1.0 / (total * max(length, 1)) for length in lengths]
    return [1.0 / total] * len(lengths)


class Terms(NamedTuple):
    """The objective's value per token and what is told about it, all [tokens].

    surrogate: whose sum times coefficients is maximized (differentiable). log_ratio: log pi_theta - log beta (detached). weights: the
    importance weights before any clip or normalization (detached; float64 where they are products). clipped (bool): where ppo_clip
    drops the gradient or weight_clip binds.
    """

    surrogate: torch.Tensor
    log_ratio: torch.Tensor
    weights: torch.Tensor
    clipped: torch.Tensor


def token_weights(log_ratio: torch.Tensor, lengths: Sequence[int], weighting: Weighting) -> torch.Tensor:
    """The importance weight of every token [tokens], neither clipped nor normalized.

    log_ratio: [tokens] of whole responses one after another, detached; lengths: tokens of each response, 0 allowed. Products are sums
    of logarithms in float64 and come out in float64, so that 2000 ratios neither overflow nor lose digits on the way.
    """
    if weighting == "none":
        return torch.ones_like(log_ratio)
    if weighting == "token":
        return torch.exp(log_ratio)
    counts = torch.tensor(lengths, device=log_ratio.device)[:, None]
    inside = torch.arange(max(lengths, default=0), device=log_ratio.device) < counts
    table = torch.zeros(inside.shape, dtype=torch.float64, device=log_ratio.device)
    table[inside] = log_ratio.double()
    if weighting == "prefix":
        logarithms = table.cumsum(1)
    elif weighting == "suffix":
        logarithms = table.flip(1).cumsum(1).flip(1)
    else:
        logarithms = table.sum(1, keepdim=True).expand_as(table)
        if weighting == "sequence":
            logarithms = logarithms / counts.clamp(min=1)
    return torch.exp(logarithms[inside])


def policy_terms(
    logprobs: torch.Tensor,
    behavior: torch.Tensor,
    advantages: torch.Tensor,
    lengths: Sequence[int],
    estimator: Estimator,
    mean_weight: float | None = None,
) -> Terms:
    """Per-token terms: the surrogate's value is A_t w_t, its gradient A_t w_t grad log pi_theta(a_t | h_t), w_t taken as a number.

    For token weights that is the gradient of A r, for `sequence` over a whole response that of GSPO's objective. With ppo_clip the
    value is min(A w, A clip(w, 1 - low, 1 + high)), without gradient where w has left the interval in the advantage's direction.
    Differentiable in forward and in reverse mode.

    logprobs, behavior, advantages: [tokens] of whole responses one after another, float32 or wider; only logprobs carries a gradient.
    lengths: tokens of each response, 0 allowed. mean_weight: the divisor of self_normalize over the whole prompt, when the tokens
    given are only a part of it (None: the mean over the tokens given). ValueError: clips or normalization for the weighting `none`,
    whose weights are 1.
    """
    weighting, weight_clip, ppo_clip, self_normalize = estimator
    if weighting == "none" and (weight_clip is not None or ppo_clip is not None or self_normalize):
        raise ValueError("the weighting 'none' has no weights to clip or normalize")
    log_ratio = (logprobs - behavior).detach()
    weights = token_weights(log_ratio, lengths, weighting)
    used = weights if weight_clip is None else weights.clamp(*weight_clip)
    clipped = used != weights
    if self_normalize:
        used = used / (used.mean(dtype=torch.float64) if mean_weight is None else mean_weight)
    bounded = flat = None
    if ppo_clip is not None:
        bounded = advantages * weights.clamp(1.0 - ppo_clip[0], 1.0 + ppo_clip[1])
        flat = bounded < advantages * weights
        clipped = clipped | flat
        used = used.masked_fill(flat, 0.0)  # an infinite weight that is dropped must not become 0 * inf
    one = torch.exp(logprobs - logprobs.detach())  # 1, with the derivative of log pi
    surrogate = advantages * (used.to(logprobs.dtype) * one)
    if bounded is not None and flat is not None:
        surrogate = torch.where(flat, bounded.to(logprobs.dtype), surrogate)
    return Terms(surrogate, log_ratio, weights, clipped)


def kl_k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(sampling policy || other), per token: r - 1 - log r with r = other / sampling, log_ratio = log r.

    Not negative, unbiased on samples of the sampling policy; differentiable if log_ratio is.
    """
    return torch.expm1(log_ratio) - log_ratio


class Drift(NamedTuple):
    """How far the policy has moved from the behavior policy on one prompt's responses (docs/method.md, "Diagnostics").

    kl: mean k3 of KL(beta || theta) over the tokens. effective_sample_size: (sum w)^2 / (n sum w^2) of n importance weights, from 1 / n to 1; 0
    when every weight underflows. weight_count: that n. mean_ratio, max_ratio: of the token ratios, whatever the weights.
    """

    kl: float
    effective_sample_size: float
    weight_count: int
    mean_ratio: float
    max_ratio: float


def drift(
    log_ratio: torch.Tensor,
    weights: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    weighting: Weighting = "token",
) -> Drift:
    """Drift over the tokens [n] of one prompt, n >= 1; computed in float64.

    weights [n]: of the effective sample size, before any clip or normalization (None: the token ratios); it is not a number when a weight
    is infinite. lengths: tokens of each response, 0 allowed, needed with the weightings `trajectory` and `sequence`: all tokens of a response
    share one weight there, so it counts once, and a response without a token not at all.
    """
    wide = log_ratio.double()
    ratio = torch.exp(wide)
    # the effective sample size does not change when all weights are scaled: make the largest 1, so that nothing overflows
    if weights is None:
        scaled = torch.exp(wide - wide.max())
    else:
        each = weights.double()
        if weighting in ONE_A_RESPONSE:
            if lengths is None:
                raise ValueError(
                    f"the effective sample size of the weighting {weighting!r} needs the lengths of the responses"
                )
            each = torch.stack([part[0] for part in each.split(list(lengths)) if len(part)])
        scaled = each / each.max().clamp(min=torch.finfo(torch.float64).tiny)
    squares = float((scaled**2).sum())
    size = float(scaled.sum() ** 2) / (len(scaled) * squares) if squares else 0.0
    return Drift(float(kl_k3(wide).mean()), size, len(scaled), float(ratio.mean()), float(ratio.max()))
