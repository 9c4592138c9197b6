"""The few statistics a comparison of arms needs, in plain Python: paired t intervals, Holm, the error of an accuracy.

Seeds are the unit: a paired difference is one seed of an arm minus the same seed of the baseline. Student's t is used
and not the bootstrap, which is too narrow at the three to twelve seeds such runs have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval and two-sided p-value."""

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
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom, by its finite trigonometric sum."""
    angle = math.atan2(abs(t), math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = 1.0 if degrees % 2 == 0 else cosine
    for k in range(2 if degrees % 2 == 0 else 3, degrees, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if degrees % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))


def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(|T| <= t) = probability."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if t_probability(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def paired_interval(differences: Sequence[float]) -> Interval | None:
    """The t interval of a mean difference over seeds.

    None with fewer than two seeds, and when all differences are equal: on a grid of accuracies that happens by
    chance, and a spread of zero would claim certainty.
    """
    deviation = spread(differences)
    if deviation is None or deviation < 1e-12:
        return None
    degrees = len(differences) - 1
    error = deviation / math.sqrt(len(differences))
    centre = mean(differences)
    reach = t_quantile(CONFIDENCE, degrees) * error
    return Interval(centre, centre - reach, centre + reach, 1 - t_probability(centre / error, degrees))


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
