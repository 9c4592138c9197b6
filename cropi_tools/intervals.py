"""Intervals of shares (accuracy, pass@k) over prompts, each with one or several samples.

E. B. Wilson (JASA 22, 1927): the shares p for which the observed one is not too far off. Unlike a bootstrap or the normal
interval it is no point where nothing or everything is correct, which is what small and hard test sets give.
E. L. Korn and B. I. Graubard (Survey Methodology 24, 1998): samples of one prompt are alike, so the number of samples is
replaced by the effective one, samples / design effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
_Z = 1.959964  # of the normal distribution, both sides together 5 %
_Z_ONE_SIDE = 1.644854
_FEW = 3.0 + 1e-9  # effective counts up to which Wilson's near bound is too near


class Cell(NamedTuple):
    """`prompts` prompts with the same share of successes: each weighs `weight` and had `trials` independent chances at most."""

    share: float
    weight: float
    trials: float
    prompts: int


def wilson(share: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a share observed over so many independent trials, a real number above 0.

    With one to three successes Wilson's lower bound covers rare events in as few as 86 % of cases; there the lower bound of a
    Poisson count is taken where it is less, as in Brown, Cai and DasGupta (Statistical Science 16, 2001, section 4.1.1), by
    the formula of Wilson and Hilferty (1931). Failures are treated alike.
    """
    middle = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    reach = _Z * math.sqrt(share * (1 - share) / trials + (_Z / (2 * trials)) ** 2) / (1 + _Z**2 / trials)
    low, high = middle - reach, middle + reach
    low = min(low, _least_of_few(share * trials) / trials)
    high = max(high, 1 - _least_of_few((1 - share) * trials) / trials)
    return max(low, 0.0), min(high, 1.0)


def _least_of_few(count: float) -> float:
    """The least mean of a Poisson count that gives `count` or more in 5 % of cases, for up to three; infinity above."""
    if count > _FEW:
        return math.inf
    if count < 1e-9:
        return 0.0
    return count * max(1 - 1 / (9 * count) - _Z_ONE_SIDE / (3 * math.sqrt(count)), 0.0) ** 3


def share_interval(cells: Sequence[Cell]) -> tuple[float, float] | None:
    """The 95 % interval of the weighted mean share over all prompts; None for fewer than two prompts."""
    if sum(cell.prompts for cell in cells) < 2:
        return None
    share, trials = effective_trials(cells)
    return wilson(share, trials)


def effective_trials(cells: Sequence[Cell]) -> tuple[float, float]:
    """(weighted mean share, how many independent trials are worth as much as these), of two prompts or more.

    The variance of the mean is estimated between prompts, as that of a ratio. It says little while few prompts have a success
    (or a failure), and nothing where all are the same, so one more prompt is counted whose samples are all alike: without any
    success the effective number is that of the prompts, with many prompts that have both it is the estimate.
    """
    prompts = sum(cell.prompts for cell in cells)
    weight = math.fsum(cell.prompts * cell.weight for cell in cells)
    share = math.fsum(cell.prompts * cell.weight * cell.share for cell in cells) / weight
    share = min(max(share, 0.0), 1.0)  # against rounding
    alike = weight**2 / math.fsum(cell.prompts * cell.weight**2 for cell in cells)
    most = max(math.fsum(cell.prompts * cell.trials for cell in cells), alike)
    squares = math.fsum(cell.prompts * (cell.weight * (cell.share - share)) ** 2 for cell in cells)
    variance = prompts / (prompts - 1) * squares / weight**2
    with_success = sum(cell.prompts for cell in cells if cell.share > 0)
    with_failure = sum(cell.prompts for cell in cells if cell.share < 1)
    telling = min(with_success, with_failure)
    estimate = share * (1 - share) / variance if variance > 0 else most
    estimate = min(max(estimate, alike), most)
    return share, (telling + 1) / (telling / estimate + 1 / alike)
