"""What the options say of the loss, and of the learning rate of each step."""

from __future__ import annotations

import math
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


def learning_rate(options: TrainOptions, step: int) -> float:
    """The rate of a step (from 1): linear warm-up, then constant, or down to zero after the last step, linearly or as half a cosine."""
    if step <= options.warmup:
        return options.learning_rate * step / options.warmup
    if options.schedule == "constant":
        return options.learning_rate
    left = (options.steps - step + 1) / max(options.steps - options.warmup, 1)
    if options.schedule == "linear":
        return options.learning_rate * left
    return options.learning_rate * (1 - math.cos(math.pi * left)) / 2
