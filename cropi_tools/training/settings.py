"""A training run's values, and the learning rate that follows from them."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from cropi_tools.engines.protocol import Sampling
from cropi_tools.objective import Aggregation, Baseline, Clip

Schedule = Literal["constant", "linear", "cosine"]


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


class TrainSettings(NamedTuple):
    """A run's values.

    batch: prompts a step; samples: responses a prompt; minibatch: prompts an update. refills: the most rounds of sampling in place of
    groups with equal rewards. learning_rate after `warmup` steps, then by `schedule`. keep: checkpoints that are kept. collapse: see
    `watch`. autocast: matrix products in bfloat16. tokens_per_pass: tokens in one forward pass, part of no result beyond float rounding.
    """

    steps: int
    batch: int
    samples: int
    sampling: Sampling
    loss: LossSettings
    learning_rate: float
    schedule: Schedule
    warmup: int
    betas: tuple[float, float]
    weight_decay: float
    max_gradient_norm: float
    evaluate_every: int
    evaluation_samples: int
    evaluation_sampling: Sampling
    save_every: int
    seed: int
    minibatch: int = 0  # 0: the whole batch
    refills: int = 0
    keep: int = 1
    collapse: float = 0.0
    autocast: bool = False
    tokens_per_pass: int = 16384


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of a step (from 1): linear warm-up, then constant, or down to zero after the last step, linearly or as half a cosine."""
    if step <= settings.warmup:
        return settings.learning_rate * step / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    left = (settings.steps - step + 1) / max(settings.steps - settings.warmup, 1)
    if settings.schedule == "linear":
        return settings.learning_rate * left
    return settings.learning_rate * (1 - math.cos(math.pi * left)) / 2
