"""The few statistics a comparison of arms needs, paired t intervals, Holm, the error of an accuracy.

Seeds are the unit: a paired difference is one seed of an arm minus the same seed of the baseline. Student's t is used
and not the bootstrap, which is too narrow at the three to twelve seeds such runs have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, of 95 % unless another was asked for, and two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (Bessel-corrected); None for fewer than two values."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t."""
    return float(stdtr(degrees, abs(t)) - stdtr(degrees, -abs(t)))


def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(|T| <= t) = probability."""
    return float(stdtrit(degrees, (1 + probability) / 2))


def paired_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The t interval of a mean difference over seeds, at this confidence.

    None with fewer than two seeds, and when all differences are equal: on a grid of accuracies that happens by
    chance, and a spread of zero would claim certainty.
    """
    deviation = spread(differences)
    if deviation is None or deviation < 1e-12:
        return None
    degrees = len(differences) - 1
    error = deviation / math.sqrt(len(differences))
    center = mean(differences)
    reach = t_quantile(confidence, degrees) * error
    return Interval(center, center - reach, center + reach, 1 - t_probability(center / error, degrees))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def binomial_error(accuracy: float, responses: int) -> float:
    """Standard error of an accuracy over independent responses. Several samples of one prompt are not independent: a
    lower bound.
    """
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / responses)
