"""How well one ranking of prompts agrees with another: what fidelity (sketch against exact) and reliability (half against half) are told in.

`precision_at` is the paper's measure of a projection: of the top tenth by one score, how many are in the top tenth by the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

BOOTSTRAP_ROUNDS = 1000


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation of two scores [n]; NaN where one of them is the same for all prompts, or n < 2."""
    return pearson(rankdata(first), rankdata(second))


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """The correlation of two scores [n]; NaN where one of them does not vary."""
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    # asked of the values themselves: what is left of them after the mean may be rounding
    if len(one) < 2 or one.min() == one.max() or other.min() == other.max():
        return float("nan")
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def precision_at(found: ArrayLike, truth: ArrayLike, share: float = 0.1, size: int | None = None) -> float:
    """Share of the top N by `truth` that are in the top N by `found`. Scores [n], n >= 1.

    N is `size`, or where that is not given floor(share * n) but at least 1.

    Ties are broken in favor of the earlier prompt, the same way on both sides.
    """
    size = max(1, int(share * len(np.asarray(truth)) + 1e-9)) if size is None else size
    mine, theirs = (set(np.argsort(-np.asarray(values), kind="stable")[:size].tolist()) for values in (found, truth))
    return len(mine & theirs) / size


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float], count: int, seed: int = 0, rounds: int = BOOTSTRAP_ROUNDS
) -> tuple[float, float]:
    """The 95 % percentile interval of `statistic` over prompts drawn with replacement.

    statistic: a function of the places [count] drawn. Draws on which it is NaN (nothing varies) do not count; all NaN gives (NaN, NaN).
    """
    draw = np.random.default_rng(seed)
    found = np.array([statistic(draw.integers(count, size=count)) for _ in range(rounds)])
    found = found[~np.isnan(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
