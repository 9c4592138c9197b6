"""What the loss is, as the functions that compute it take it."""

from __future__ import annotations

from typing import NamedTuple

from cropi_tools.objective import Aggregation, Baseline, Clip
from cropi_tools.training.options import TrainOptions


class LossSettings(NamedTuple):
    """What the loss is.

    temperature: the sampling temperature, of both sides of every ratio. clip: the ratio stays within 1 - low and 1 + high. kl, entropy:
    weights of the two terms. aggregation, advantage: of `objective`; fixed_length: the constant aggregation's tokens a response.
    mask_truncated: responses that the limit cut off get no gradient. importance_cap: above 0, ratios are to the policy before the step's
    updates, and a token's term is weighted by what that policy and the engine differ in, at most this.
    """

    temperature: float
    clip: Clip
    kl: float
    entropy: float
    aggregation: Aggregation
    advantage: Baseline = "group"
    fixed_length: int = 1
    mask_truncated: bool = False
    importance_cap: float = 0.0


def loss_settings(options: TrainOptions) -> LossSettings:
    """What the options say of the loss."""
    return LossSettings(
        temperature=options.temperature,
        clip=options.clip,
        kl=options.kl,
        entropy=options.entropy,
        aggregation=options.aggregation,
        advantage=options.advantage,
        fixed_length=options.max_tokens,
        mask_truncated=options.mask_truncated,
        importance_cap=options.importance_cap,
    )
