"""Intervals of shares: against scipy, by hand, and by how often they hold the truth."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cropi_tools.intervals import Cell, effective_trials, share_interval, wilson

PROMPTS, SAMPLES, SHARES = (15, 30, 100, 500), (1, 4, 8), (0.01, 0.03, 0.1, 0.5, 0.9, 0.97)
ALIKE = (0.0, 0.1, 0.3, 0.7)  # how alike the samples of a prompt are (intraclass correlation); 0: all prompts are equal
LEAST = 0.93


@pytest.mark.parametrize("trials", [1, 2, 15, 30, 1000])
def test_it_is_wilsons_but_for_one_to_three(trials: int) -> None:
    for successes in range(trials + 1):
        found = wilson(successes / trials, trials)
        theirs = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        low = (
            theirs.low
            if successes == 0 or successes > 3
            else min(theirs.low, stats.gamma.ppf(0.05, successes) / trials)
        )
        failures = trials - successes
        high = (
            theirs.high
            if failures == 0 or failures > 3
            else max(theirs.high, 1 - stats.gamma.ppf(0.05, failures) / trials)
        )
        # the formula of Wilson and Hilferty is a little below the quantile it stands for
        assert found[0] == pytest.approx(low, abs=0.012 / trials)
        assert found[1] == pytest.approx(high, abs=0.012 / trials)
        assert found[0] <= low + 1e-6
        assert found[1] >= high - 1e-6


def cells_of(correct: NDArray[np.int64], samples: int) -> list[Cell]:
    return [Cell(c / samples, samples, samples, count) for c, count in sorted(Counter(correct.tolist()).items())]


def test_the_effective_number_by_hand() -> None:
    # Samples of a prompt all alike: as many as prompts. p = 1/2, 200 prompts of 8.
    assert effective_trials([Cell(0, 8, 8, 100), Cell(1, 8, 8, 100)]) == (0.5, pytest.approx(200))
    # All prompts equal: the estimate is all 1600, with one prompt of 200 added whose samples are alike.
    assert effective_trials([Cell(0.5, 8, 8, 200)])[1] == pytest.approx(201 / (200 / 1600 + 1 / 200))
    # Nothing is known of how alike samples are when none is correct.
    assert effective_trials([Cell(0, 8, 8, 30)]) == (0, pytest.approx(30))
    assert effective_trials([Cell(1, 8, 8, 30)]) == (1, pytest.approx(30))
    # Prompts of unequal numbers: one of 8 among seven of 1 counts like (15^2 / 71) prompts when samples are alike.
    assert effective_trials([Cell(0, 8, 8, 1), Cell(0, 1, 1, 7)])[1] == pytest.approx(15**2 / 71)
    assert share_interval([Cell(0.5, 8, 8, 1)]) is None
    assert share_interval([]) is None


def test_more_samples_narrow_the_interval_no_further_than_they_tell() -> None:
    def width(correct: list[int], samples: int) -> float:
        low, high = share_interval(cells_of(np.array(correct), samples)) or (0, 0)
        return high - low

    assert width([4] * 50, 8) < 0.5 * width([0, 1] * 25, 1)
    assert width([0, 8] * 25, 8) == pytest.approx(width([0, 1] * 25, 1), rel=0.02)


def coverage(
    draws: NDArray[np.int64], interval: Callable[[NDArray[np.int64]], tuple[float, float]], truth: float
) -> float:
    held = 0
    for draw in draws:
        low, high = interval(draw)
        held += low <= truth <= high
    return held / len(draws)


def test_coverage_with_one_sample_is_exact() -> None:
    """Over all outcomes of n prompts, for the shares of the grid and a fine one: the minimum over all is at the rarest events."""
    for n in PROMPTS:
        intervals = np.array([wilson(c / n, n) for c in range(n + 1)])
        for p in (*SHARES, *np.linspace(0.001, 0.999, 999)):
            holds = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
            found = stats.binom.pmf(np.arange(n + 1), n, p)[holds].sum()
            assert found >= (LEAST if p in SHARES else 0.88), (n, p)


def grid() -> Iterator[tuple[int, int, float, float]]:
    yield from itertools.product(PROMPTS, SAMPLES[1:], SHARES, ALIKE)


def drawn(n: int, samples: int, p: float, alike: float, trials: int, seed: int) -> NDArray[np.int64]:
    """Correct samples [trials, n] of prompts whose own pass rates follow a beta distribution of mean p."""
    generator = np.random.default_rng([n, samples, int(1000 * p), int(10 * alike), seed])
    rates = np.full((trials, n), p)
    if alike:
        rest = 1 / alike - 1
        rates = generator.beta(p * rest, (1 - p) * rest, size=(trials, n))
    return generator.binomial(samples, rates)


def covers(trials: int, least: float) -> None:
    below = {}
    for n, samples, p, alike in grid():

        def interval(draw: NDArray[np.int64], samples: int = samples) -> tuple[float, float]:
            return share_interval(cells_of(draw, samples)) or (0, 0)

        found = coverage(drawn(n, samples, p, alike, trials, 0), interval, p)
        if found < least:
            below[n, samples, p, alike] = found
    assert below == {}


def test_coverage_with_several_samples() -> None:
    """Within two standard errors of what the slow test shows with more trials."""
    covers(200, LEAST - 2 * math.sqrt(LEAST * (1 - LEAST) / 200))


@pytest.mark.slow
def test_coverage_with_several_samples_closely() -> None:
    covers(6000, LEAST)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_coverage_of_pass_at_k(k: int) -> None:
    from cropi_tools.rollouts.metrics import pass_at_k

    samples, trials = 8, 300
    for n, p, alike in itertools.product((15, 30, 100), (0.01, 0.1, 0.5), (0.0, 0.3)):
        # the mean over prompts of 1 - (1 - p)^k, by the moments of the beta distribution
        rest = 1 / alike - 1 if alike else 0
        fails = [(1 - p) if not alike else ((1 - p) * rest + i) / (rest + i) for i in range(k)]
        truth = 1 - math.prod(fails)

        def interval(draw: NDArray[np.int64]) -> tuple[float, float]:
            counts = sorted(Counter(draw.tolist()).items())
            cells = [Cell(pass_at_k(samples, c, k), 1, samples / k, count) for c, count in counts]
            return share_interval(cells) or (0, 0)

        found = coverage(drawn(n, samples, p, alike, trials, k), interval, truth)
        assert found >= LEAST - 2.6 * math.sqrt(LEAST * (1 - LEAST) / trials), (n, p, alike, truth)
