"""Statistics against scipy, statsmodels-like hand computation, and figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from cropi_tools.report.statistics import (
    binomial_error,
    holm,
    paired_interval,
    spread,
    t_probability,
    t_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 11, 30])
def test_student_t_agrees_with_scipy(degrees: int) -> None:
    student = pytest.importorskip("scipy.stats").t(degrees)
    for t in (0.0, 0.1, 1.0, 2.5, 12.0):
        assert t_probability(t, degrees) == pytest.approx(student.cdf(t) - student.cdf(-t), abs=1e-12)
    assert t_quantile(0.95, degrees) == pytest.approx(student.ppf(0.975), rel=1e-9)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (11, 2.201)])
def test_student_t_agrees_with_the_printed_table(degrees: int, quantile: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(quantile, abs=5e-4)


def test_paired_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t(2) = 4.3027.
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval is not None
    assert interval.mean == 2
    assert interval.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert interval.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert interval.includes_zero
    # t = 2 sqrt(3) at two degrees: p = 1 - t / sqrt(2 + t^2).
    assert interval.p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-12)


def test_no_interval_from_one_seed_or_equal_differences() -> None:
    assert paired_interval([0.3]) is None
    assert paired_interval([0.1, 0.1, 0.1]) is None
    assert spread([0.5]) is None


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .5: times 4, 3, 2, 1, then never falling.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_binomial_error_by_hand() -> None:
    assert binomial_error(0.5, 400) == pytest.approx(0.025)
    assert binomial_error(1.0, 10) == 0
