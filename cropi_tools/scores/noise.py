"""How large the noise of one prompt's score is, from halves (docs/method.md, "Which prompts pull away?").

A prompt has two half-scores, and half their difference D has the variance of the whole score's noise: an estimate of one degree of freedom,
which says next to nothing by itself. How unequal these variances are follows from groups of validation prompts: W, what they say of the noise
that the validation prompts give the score, is large where the prompt's gradient meets what validation gradients vary in. D / sqrt(W) is then
much alike for all prompts, and what is left of the differences is moderated (Smyth 2004, as for genes with few arrays): D^2 / W is taken
for scale x F(1, freedom), so D / sqrt(W) for Student's t, whose likelihood says scale and freedom. A prompt's variance is W times the mean
of scale and its own D^2 / W, weighted by their degrees of freedom, freedom and 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, stdtr

from cropi_tools.scores.half_products import Scores

FREEDOMS = 1 / np.linspace(0.5, 0.001, 40)
"""Degrees of freedom that are tried, 2 to 1000."""

LEAST = 1e-12  # of the largest: smaller variances are rounding


class Noise(NamedTuple):
    """Of every prompt the deviation of its score, and the degrees of freedom that it is known with."""

    deviation: Scores
    freedom: Scores


class Prior(NamedTuple):
    """What the variances of all prompts have in common, as shares of W, and of how many degrees of freedom that is worth."""

    scale: float
    freedom: float


def noise_of(differences: Scores, validation: Scores | None) -> Noise:
    """The noise of scores. differences: half the difference of each prompt's half-scores, NaN without two. validation: the variance that
    the validation prompts give each score, NaN where unknown; None where no groups were measured, for which all prompts are alike.
    """
    if validation is None:
        weights, least = np.ones(len(differences)), 0.0
    else:
        filled = np.where(np.isnan(validation), np.nanmedian(validation), validation)
        weights = np.maximum(filled, max(LEAST * float(filled.max()), np.finfo(float).tiny))
        least = 1.0  # the noise is not less than that of the validation prompts alone, which all differences share one draw of
    both = ~np.isnan(differences)
    squares = np.where(both, differences, 0.0) ** 2 / weights
    prior = prior_of(squares[both], least)
    pooled = np.where(both, (prior.freedom * prior.scale + squares) / (prior.freedom + 1), prior.scale)
    return Noise(np.sqrt(weights * pooled), prior.freedom + both)


def prior_of(squares: Scores, least: float = 0.0) -> Prior:
    """Scale, at least `least`, and degrees of freedom of squares that are scale x F(1, freedom).

    The freedom is not the likeliest but the lowest whose likelihood is within exp(-1/2) of that, one standard error below: to think that
    variances are more alike than they are lists too much.
    """
    if not squares.any():
        return Prior(max(least, np.finfo(float).tiny), float(FREEDOMS[-1]))
    scales = [_scale(squares, freedom) for freedom in FREEDOMS]
    likelihoods = np.array([_log_likelihood(squares, *pair) for pair in zip(scales, FREEDOMS, strict=True)])
    lowest = int(np.flatnonzero(likelihoods >= likelihoods.max() - 0.5)[0])
    return Prior(max(least, scales[lowest]), float(FREEDOMS[lowest]))


def _scale(squares: Scores, freedom: float) -> float:
    """The likeliest scale for a freedom, by the usual iteration with weights (EM)."""
    scale = float(squares.mean())
    for _ in range(500):
        before, scale = scale, float(np.mean((freedom + 1) * squares / (freedom + squares / scale)))
        if abs(scale - before) <= 1e-7 * before:
            break
    return scale


def _log_likelihood(squares: Scores, scale: float, freedom: float) -> float:
    constant = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - np.log(freedom * scale) / 2
    return float(len(squares) * constant - (freedom + 1) / 2 * np.log1p(squares / (freedom * scale)).sum())


def below_zero(scores: Scores, noise: Noise) -> Scores:
    """One-sided p-values: how likely noise alone makes scores as low as these."""
    return np.asarray(stdtr(noise.freedom, scores / noise.deviation))
