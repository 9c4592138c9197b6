"""How large the noise of one prompt's score is, from halves (docs/method.md, "Which prompts pull away?").

A prompt has two half-scores, and half their difference has the variance of the whole score's noise: an estimate from one degree of freedom,
which says next to nothing by itself. So it is moderated (Smyth 2004, as limma does it for genes): variances of prompts are taken for draws
around a common one, s0^2 d0 / chi^2(d0), whose s0 and d0 follow from the mean and the spread of the logarithms of the squared differences.
What is then known of a prompt's variance is (d0 s0^2 + D^2) / (d0 + 1), with d0 + 1 degrees of freedom, and s0^2 with d0 where only one of
its halves has a gradient. The noise of the validation prompts is one draw that all these differences share; its variance is therefore added as
the spread over groups of validation prompts tells it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import polygamma, stdtr

from cropi_tools.scores.half_products import Scores

LEAST = 1e-5  # of the median: smaller squared differences are rounding, and their logarithms would decide everything


class Noise(NamedTuple):
    """Of every prompt the deviation of its score, and the degrees of freedom that it is known with."""

    deviation: Scores
    freedom: Scores


class Prior(NamedTuple):
    """What variances of prompts have in common: their scale, and of how many degrees of freedom it is worth."""

    variance: float
    freedom: float


def noise_of(differences: Scores, validation: Scores | None) -> Noise:
    """The noise of scores. differences: half the difference of each prompt's half-scores, NaN without two. validation: the variance that
    groups of validation prompts give each score, NaN where unknown; None where no groups were measured.
    """
    both = ~np.isnan(differences)
    prior = prior_of(differences[both] ** 2)
    variance = np.full(len(differences), prior.variance)
    variance[both] = (prior.freedom * prior.variance + differences[both] ** 2) / (prior.freedom + 1)
    if validation is not None:
        variance += np.where(np.isnan(validation), np.nanmedian(validation), validation)
    return Noise(np.sqrt(variance), prior.freedom + both)


def prior_of(squares: Scores) -> Prior:
    """Scale and degrees of freedom of the variances behind squared differences, of one degree of freedom each.

    The logarithm of s0^2 F(1, d0) has the mean log s0^2 + digamma(1/2) - log(1/2) - digamma(d0/2) + log(d0/2) and the variance
    trigamma(1/2) + trigamma(d0/2). d0 is at most the number of prompts, all that is known of s0.
    """
    logs = np.log(np.maximum(squares, LEAST * max(float(np.median(squares)), np.finfo(float).tiny)))
    most = float(len(squares))
    excess = float(logs.var(ddof=1) - polygamma(1, 0.5))
    freedom = most if excess <= polygamma(1, most / 2) else 2 * _inverse_trigamma(excess)
    center = logs.mean() - _log_chi(1.0) + _log_chi(freedom)
    return Prior(float(np.exp(center)), freedom)


def below_zero(scores: Scores, noise: Noise) -> Scores:
    """One-sided p-values: how likely noise alone makes scores as low as these."""
    return np.asarray(stdtr(noise.freedom, scores / noise.deviation))


def listed(p_values: Scores, share: float) -> Scores:
    """Which hypotheses to reject so that at most this share of those that are rejected is true, on average (Benjamini and Hochberg 1995)."""
    order = np.argsort(p_values, kind="stable")
    passing = np.flatnonzero(p_values[order] <= share * np.arange(1, len(order) + 1) / len(order))
    found = np.zeros(len(order), bool)
    if len(passing):
        found[order[: passing[-1] + 1]] = True
    return found


def _log_chi(freedom: float) -> float:
    """The mean of log(chi^2(freedom) / freedom)."""
    return float(polygamma(0, freedom / 2) - np.log(freedom / 2))


def _inverse_trigamma(value: float) -> float:
    """The x with trigamma(x) = value > 0."""
    # trigamma lies between 1/x and 1/x + 1/x^2
    return float(brentq(lambda x: polygamma(1, x) - value, 0.5 / value, 1 / value + 1 / np.sqrt(value) + 1))
