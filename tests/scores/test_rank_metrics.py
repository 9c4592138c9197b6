"""Rank correlation, precision at the top and their intervals against scipy, sorting by hand and repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cropi_tools.scores.rank_metrics import bootstrap_interval, pearson, precision_at, spearman


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [2, 3, 17, 500])
def test_correlations_equal_scipy(count: int, ties: bool) -> None:
    draw = np.random.default_rng(count)
    first = draw.integers(0, 5, count).astype(float) if ties else draw.normal(size=count)
    second = first + draw.normal(size=count)
    first[0], second[0] = -9.0, -9.5  # so that both vary
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-12)


def test_correlations_at_their_ends() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert spearman(values, np.exp(values)) == pytest.approx(1.0, abs=1e-12)
    assert spearman(values, -(values**3)) == pytest.approx(-1.0, abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-300, 1 / 3])
def test_what_does_not_vary_has_no_correlation(constant: float) -> None:
    """The mean of ten times 0.1 is not 0.1: what is left after it must not pass for variation."""
    same, other = np.full(10, constant), np.arange(10.0)
    for correlation in (pearson, spearman):
        assert math.isnan(correlation(same, other))
        assert math.isnan(correlation(other, same))
        assert math.isnan(correlation([1.0], [2.0]))


def by_sorting(found: list[float], truth: list[float], share: float) -> float:
    size = max(1, math.floor(round(share * len(truth), 9)))
    best = [sorted(range(len(v)), key=lambda n: (-v[n], n))[:size] for v in (found, truth)]
    return len(set(best[0]) & set(best[1])) / size


@pytest.mark.parametrize("count", [1, 5, 10, 29, 30, 100, 501])
@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 1.0])
def test_precision_equals_sorting_by_hand(count: int, share: float) -> None:
    draw = np.random.default_rng(count)
    truth = np.round(draw.normal(size=count), 1)  # with ties
    found = np.round(truth + draw.normal(size=count), 1)
    assert precision_at(found, truth, share) == pytest.approx(by_sorting(found.tolist(), truth.tolist(), share))


def test_precision_counts_the_top() -> None:
    truth = np.arange(100.0)
    found = truth.copy()
    found[[99, 98, 97]] = -1.0  # three of the top ten are lost
    assert precision_at(found, truth) == 0.7
    assert precision_at(truth, truth) == 1.0
    assert precision_at(-truth, truth) == 0.0
    # 0.29 * 100 is 28.999... in floats, and 29 prompts
    assert precision_at(truth, truth[::-1], 0.29) == 0.0
    assert precision_at(np.where(truth >= 71, truth, -truth), truth, 0.29) == 1.0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Samples of normal pairs of known correlation: a 95 % interval that covers it less or more often would not be one."""
    draw, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        first = draw.normal(size=80)
        second = 0.6 * first + 0.8 * draw.normal(size=80)
        low, high = bootstrap_interval(lambda d, a=first, b=second: pearson(a[d], b[d]), 80, rounds=200)
        covered += low <= 0.6 <= high
        widths.append(high - low)
    assert 0.89 <= covered / 200 <= 0.985
    # the large-sample standard error is (1 - rho^2) / sqrt(n)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (1 - 0.36) / math.sqrt(80), rel=0.1)


def test_an_interval_is_repeatable_and_may_be_empty() -> None:
    values = np.random.default_rng(0).normal(size=(2, 40))

    def correlation(drawn: np.ndarray) -> float:
        return spearman(values[0][drawn], values[1][drawn])

    assert bootstrap_interval(correlation, 40, rounds=50) == bootstrap_interval(correlation, 40, rounds=50)
    assert bootstrap_interval(correlation, 40, 1, rounds=50) != bootstrap_interval(correlation, 40, 2, rounds=50)
    assert all(math.isnan(end) for end in bootstrap_interval(lambda drawn: math.nan, 5, rounds=9))
