"""The GRPO loss of given tokens. It is minimized:

    - sum_k A_k sum_t c_kt u_kt min(r_kt, clip(r_kt))  +  kl * sum c k3(pi_theta || reference)  -  entropy * sum c H(pi_theta)

A and c are of `objective`. Without an importance cap r is the ratio to the distribution really sampled, as the engine reported it, and u is 1.
With a cap C, r is the ratio to the policy before the step's first update, pi_old, and u = min(pi_old / engine, C): truncated
importance sampling between engine and trainer, token by token (verl's and TRL's `token` truncation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cropi_tools.objective import Estimator, kl_k3, policy_terms
from cropi_tools.training.loss_settings import LossSettings

# sums over tokens that `token_loss` returns beside the loss
FIGURES = ("kl", "behavior_kl", "behavior_gap", "entropy", "clip_fraction", "capped_fraction")


class TokenInputs(NamedTuple):
    """What a loss needs of each token besides the policy's own figures, all [tokens] of whole responses one after another.

    behavior: log-probabilities that the engine reported. advantages, coefficients: constant within a response (the coefficients hold the
    aggregation). old: log-probabilities of the policy before the step's first update; None: this is the first update, they are the
    present ones. reference: those of the KL term's policy, or None.
    """

    behavior: torch.Tensor
    advantages: torch.Tensor
    coefficients: torch.Tensor
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def token_loss(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    given: TokenInputs,
    lengths: Sequence[int],
    settings: LossSettings,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, a differentiable number, and FIGURES as sums over its tokens.

    logprobs, entropy: [tokens], of the policy at the sampling temperature, float32 or wider. lengths: tokens of each response. Figures: kl
    (k3 against the reference), behavior_kl (k3 of the engine's distribution against the policy), behavior_gap (absolute difference
    of the two log-probabilities, before any cap), entropy, clip_fraction, capped_fraction (tokens whose u is C).
    """
    anchor = given.behavior
    advantages = given.advantages
    capped = torch.zeros_like(logprobs, dtype=torch.bool)
    if settings.importance_cap > 0:
        anchor = logprobs.detach() if given.old is None else given.old
        weights = torch.exp(anchor - given.behavior)
        capped = weights > settings.importance_cap
        # u is not negative, so it may as well scale the advantage: the minimum picks the same side
        advantages = advantages * weights.clamp(max=settings.importance_cap)
    terms = policy_terms(logprobs, anchor, advantages, lengths, Estimator(ppo_clip=settings.clip))
    loss = -(given.coefficients * terms.surrogate).sum()
    # over what was sampled and what would be before any update of this step, where that is known
    present = logprobs.detach() if given.old is None else given.old
    apart = present - given.behavior
    divergence = torch.zeros_like(present)
    if given.reference is not None:
        divergence = kl_k3(given.reference - logprobs)
        loss = loss + settings.kl * (given.coefficients * divergence).sum()
    if settings.entropy:
        loss = loss - settings.entropy * (given.coefficients * entropy).sum()
    figures = (divergence.detach(), kl_k3(apart), apart.abs(), entropy.detach(), terms.clipped, capped)
    # one copy from the device for all of them
    sums = torch.stack([values.sum(dtype=torch.float64) for values in figures]).tolist()
    return loss, dict(zip(FIGURES, sums, strict=True))
