"""The learning rate of each step."""

from __future__ import annotations

import math

from cropi_tools.training.options import TrainOptions


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
