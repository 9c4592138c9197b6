"""Scores of prompts that were never sampled, predicted from those of prompts that were, by what a policy makes of the prompt itself.

A score is taken for the mean of the prompt's source plus something smooth in the features: ridge regression on the sources and on a
kernel's features (Gaussian kernel of the standardized features, its width their median distance; Nystroem's approximation, so that the
work is linear in the pool). scikit-learn does both. A measured prompt without a score, one whose samples all earned the same, counts as 0:
training on it moves nothing.

Scores of earlier stages are observations too, but of another policy: one that is `age` stages old weighs decay ** age. The decay and the
ridge are those that foretell best in cross-validation, where only fresh scores are foretold. Cross-validation is also what says how far a
prediction may be trusted: against chance, and against the mean of the source alone.

A prediction knows the prompt and not its reference: where references are wrong it finds the families that help and cannot find the prompts
that harm. The best are to be measured before they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge

from cropi_tools.data.digest_set import hash64
from cropi_tools.scores.rank_metrics import bootstrap_interval, precision_at, spearman

FOLDS = 10
FEWEST = 20  # fresh prompts
LANDMARKS = 1024  # of Nystroem's approximation, at most
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYS = (0.0, 0.3, 1.0)
SHARE = 0.1  # of the prompts, whose precision is told
_ROUNDS = 400  # of the bootstrap
_WIDER = 1.5  # intervals: predictions of different folds share what they were fitted on, which a bootstrap over prompts does not see

Values = NDArray[np.float64]


class Observations(NamedTuple):
    """What was measured: ids, sources, features [n, width], scores [n, sets], and age in stages (0 = now) [n]."""

    ids: Sequence[str]
    sources: Sequence[str]
    features: NDArray[np.float32]
    scores: Values
    ages: NDArray[np.int64]


class Trust(NamedTuple):
    """What cross-validation says of one set's predictions: rank correlation with the measured scores and precision at a tenth, each with its
    95 % interval over prompts; the same of the mean of the source; what a random ranking's precision is; and the prediction's squared error as
    a share of that of the source's mean. (Rank correlations of the two do not compare: the source's mean without a prompt is the lower, the
    higher that prompt's own score is.)
    """

    name: str
    prompts: int
    spearman: tuple[float, float, float]
    precision: tuple[float, float, float]
    source_spearman: float
    source_precision: float
    by_chance: float
    error_of_source: float

    @property
    def weakness(self) -> str | None:
        """Why the predictions should not be followed, in words; None where they may be."""
        if not (self.spearman[1] > 0 or self.precision[1] > self.by_chance):
            return f"on {self.name} the prediction is no better than chance"
        if not self.error_of_source < 1:
            return f"on {self.name} the prediction is no better than the mean score of the prompt's source"
        return None


class Predictor:
    """Predicts scores [n, sets] of prompts by features and sources, with a standard deviation for each.

    trust: by set, what cross-validation says. ridge, decay: those chosen.
    """

    def __init__(self, known: Observations, names: Sequence[str]) -> None:
        """known: FEWEST fresh observations at least."""
        assert np.count_nonzero(known.ages == 0) >= FEWEST
        self._sources = sorted(set(known.sources))
        self._mean, scale = known.features.mean(0), known.features.std(0)
        self._scale = np.where(scale > 0, scale, 1.0)
        standard = self._standardized(known.features)
        landmarks = min(LANDMARKS, len(standard))
        self._kernel = Nystroem(
            kernel="rbf", gamma=1.0 / _squared_width(standard), n_components=landmarks, random_state=0
        ).fit(standard)
        rows = self._rows(known.features, known.sources)
        fresh = np.flatnonzero(known.ages == 0)
        folds = _folds([known.ids[place] for place in fresh.tolist()])
        self.ridge, self.decay, foretold = _chosen(rows, known, fresh, folds)
        truth = known.scores[fresh]
        by_source = _source_means(truth, np.array([known.sources[place] for place in fresh.tolist()]), folds)
        self.trust = [
            _trust(name, truth[:, place], foretold[:, place], by_source[:, place]) for place, name in enumerate(names)
        ]
        weights = _weights(known.ages, self.decay)
        self._model = Ridge(alpha=self.ridge).fit(rows, known.scores, sample_weight=weights)
        # the variance of a prediction: the residual's, enlarged by how far the prompt lies from all that was measured
        residual = np.sqrt(np.mean((truth - foretold) ** 2, axis=0))
        self._gram = np.linalg.inv(rows.T @ (rows * weights[:, None]) + self.ridge * np.eye(rows.shape[1]))
        # cross-validation's residuals are of such predictions already
        self._noise = residual / np.sqrt(1.0 + np.mean(self._leverage(rows[fresh])))

    def __call__(self, features: NDArray[np.float32], sources: Sequence[str]) -> tuple[Values, Values]:
        """Scores and their standard deviations, [n, sets] each."""
        rows = self._rows(features, sources)
        spread = np.sqrt(1.0 + self._leverage(rows))
        return self._model.predict(rows).reshape(len(rows), -1), spread[:, None] * self._noise

    def _leverage(self, rows: Values) -> Values:
        found: Values = ((rows @ self._gram) * rows).sum(1)
        return found

    def _standardized(self, features: NDArray[np.float32]) -> Values:
        return ((features - self._mean) / self._scale).astype(np.float64)

    def _rows(self, features: NDArray[np.float32], sources: Sequence[str]) -> Values:
        """The columns of the ridge: the kernel's, then one a source; a source that was not measured has none."""
        kernel = self._kernel.transform(self._standardized(features))
        own = np.array([[source == name for name in self._sources] for source in sources], np.float64)
        return np.hstack([kernel, own.reshape(len(sources), len(self._sources))])


def _squared_width(standard: Values) -> float:
    """The median squared distance between prompts, of at most 512 of them spread over all."""
    some = standard[np.linspace(0, len(standard) - 1, min(len(standard), 512)).astype(int)]
    squares = (some**2).sum(1)
    apart = squares[:, None] + squares[None] - 2 * some @ some.T
    found = float(np.median(apart[np.triu_indices(len(some), 1)]))
    return found if found > 1e-9 else 1.0


def _weights(ages: NDArray[np.int64], decay: float) -> Values:
    return np.where(ages == 0, 1.0, float(decay) ** ages)


def _folds(ids: Sequence[str]) -> list[NDArray[np.int64]]:
    """Which of the fresh observations, by their places among these, are foretold together: told by a hash of their ids."""
    order = sorted(range(len(ids)), key=lambda place: (hash64(f"fold:{ids[place]}"), ids[place]))
    return [np.array(order[number::FOLDS]) for number in range(FOLDS)]


def _chosen(
    rows: Values, known: Observations, fresh: NDArray[np.int64], folds: Sequence[NDArray[np.int64]]
) -> tuple[float, float, Values]:
    """The ridge and the decay that foretell fresh scores best in cross-validation, and foretold scores [fresh, sets].

    A fold is foretold by what was best on the other folds: the best of all would be the best by chance too, and would
    find something where there is nothing.
    """
    # squared errors relative to each set's variance, so that every set counts alike
    scale = np.var(known.scores[fresh], axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    decays = DECAYS if (known.ages > 0).any() else (1.0,)
    settings = [(ridge, decay) for decay in decays for ridge in RIDGES]
    found = np.concatenate(
        [foretold_without_fold(rows, known.scores, _weights(known.ages, decay), fresh, folds) for decay in decays]
    )
    errors = (((found - known.scores[fresh]) ** 2) / scale).mean(2)
    foretold = np.empty(found.shape[1:])
    for fold in folds:
        others = np.setdiff1d(np.arange(len(fresh)), fold)
        foretold[fold] = found[int(np.argmin(errors[:, others].mean(1))), fold]
    return *settings[int(np.argmin(errors.mean(1)))], foretold


def foretold_without_fold(
    rows: Values, scores: Values, weights: Values, fresh: NDArray[np.int64], folds: Sequence[NDArray[np.int64]]
) -> Values:
    """What each of RIDGES foretells of every fold's fresh observations when fitted on all others, [ridges, fresh, sets].

    As from a fit without the fold, but from one decomposition for all: without fold F the residuals of a ridge regression are
    (1 - H_FF)^-1 times those of the whole fit, H being what maps the observed scores to fitted ones (R. D. Cook and S. Weisberg, Residuals
    and Influence in Regression, 1982, section 2.2, for a weighted fit with a penalty and a free intercept).
    """
    total = weights.sum()
    center, mean = weights @ rows / total, weights @ scores / total
    centered = rows - center
    values, axes = np.linalg.eigh(centered.T @ (centered * weights[:, None]))
    turned = centered @ axes
    fitted_by = turned.T @ ((scores - mean) * weights[:, None])
    found = np.empty((len(RIDGES), len(fresh), scores.shape[1]))
    for number, ridge in enumerate(RIDGES):
        shrunk = 1.0 / (np.maximum(values, 0.0) + ridge)
        for fold in folds:
            here = fresh[fold]
            truth, own = scores[here], turned[here]
            residual = truth - mean - (own * shrunk) @ fitted_by
            smoother = ((own * shrunk) @ own.T + 1.0 / total) * weights[here]
            found[number, fold] = truth - np.linalg.solve(np.eye(len(here)) - smoother, residual)
    return found


def _source_means(scores: Values, sources: NDArray[np.str_], folds: Sequence[NDArray[np.int64]]) -> Values:
    """For each fresh prompt the mean score of its source's prompts in other folds, [fresh, sets]; of all others, without any."""
    found = np.zeros_like(scores)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(scores)), fold)
        for place in fold:
            same = rest[sources[rest] == sources[place]]
            found[place] = scores[same if len(same) else rest].mean(0)
    return found


def _trust(name: str, truth: Values, foretold: Values, by_source: Values) -> Trust:
    def interval(agreement: Callable[[Values, Values], float]) -> tuple[float, float, float]:
        def of(places: NDArray[np.int64]) -> float:
            return agreement(foretold[places], truth[places])

        low, high = bootstrap_interval(of, len(truth), rounds=_ROUNDS)
        value = of(np.arange(len(truth)))
        return value, value - _WIDER * (value - low), value + _WIDER * (high - value)

    size = max(1, int(SHARE * len(truth) + 1e-9))
    return Trust(
        name,
        len(truth),
        interval(spearman),
        interval(partial(precision_at, share=SHARE)),
        spearman(by_source, truth),
        precision_at(by_source, truth, SHARE),
        size / len(truth),
        float(np.mean((foretold - truth) ** 2)) / max(float(np.mean((by_source - truth) ** 2)), 1e-30),
    )
