"""How far a ranking by influence can be trusted: one half of the rollouts against the other.

cropi-grad --halves takes every prompt's inner products twice, from either half of its samples with the mean over either half of the
validation prompts, so the noise of one half has nothing to do with that of the other. What both halves agree on is then signal, and
classical test theory says the rest (Spearman 1910, Brown 1910; Lord and Novick 1968, chapters 3 and 4): with correlation r between the
halves, a perfect estimator would reach sqrt(r) against one half, two halves together have the reliability 2r / (1 + r), and correlate
with the truth by its square root.

That theory is about correlations of values. Scores are told here in ranks, so a rank correlation is taken to the correlation of normal
values that has it (2 sin(pi r / 6)), carried through the theory there, and back. What a correlation means for the top of the ranking is
taken from the same normal values. Neither holds to the last digit for scores of another shape: these are expectations, not measurements. Of
cosines they are upper bounds: noise makes a prompt's gradient longer and so its cosine smaller, more for some prompts than for others and
alike in both halves, which makes the halves agree on something that is not the truth.

Intervals. All prompts of a half are scored with the same validation prompts, so the noise of these moves the whole ranking at once. The
bootstrap therefore draws the prompts of the pool and, in each half by itself, groups of validation prompts (`half_sums.py`): drawn c times
instead of once, a group adds (c - 1) sqrt(G / (G - 1)) times its part to every score, the factor of G groups making up for what drawing from
few loses (Efron and Tibshirani 1993, section 5.3). Drawing adds the noise of validation a second time, so the draws agree less than the halves
do; the interval covers the draws' percentiles both where they lie and moved by what their median lacks to the value. Where validation has
no direction at all it excludes 0 in fewer than 5 % of trials, however few the dimensions in which gradients vary
(tests/scores/test_reliability_null.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError, printable
from cropi_tools.scores.half_products import Scores, read_halves
from cropi_tools.scores.influence import Similarity, shared_means
from cropi_tools.scores.rank_metrics import BOOTSTRAP_ROUNDS, precision_at, spearman
from cropi_tools.selection.options import RATIO
from cropi_tools.selection.rules import selection_size

FEWEST = 20  # prompts
FEWEST_GROUPS = 2  # of validation prompts in a half: what is drawn from a single one never varies
_NORMAL = NormalDist()
TOO_NARROW = (
    "the intervals leave out the noise of the validation prompts, which all scores of a half share, and are too narrow: they may exclude 0 "
    "where there is no direction at all"
)
UPPER_BOUND = (
    "for cosines the expected figures are upper bounds: noise makes cosines smaller, more for some prompts than for others, and alike in both "
    "halves"
)


class IntervalEstimate(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class HalfAgreement(NamedTuple):
    """One validation set: how the halves agree, and what follows from it.

    prompts: those with a gradient in both halves. by_chance: the precision of a random ranking. one_half and whole: the Spearman correlation
    and precision expected of a perfect estimator against one half, and of the ranking by all samples against the truth (upper bounds for
    cosines); None where the halves share nothing. in_words: what to make of it, where there is no ranking to speak of. interval_in_words:
    what the intervals leave out, or None.
    """

    name: str
    prompts: int
    spearman: IntervalEstimate | None
    precision: IntervalEstimate | None
    by_chance: float
    one_half: tuple[float, float] | None
    whole: tuple[float, float] | None
    in_words: str | None
    interval_in_words: str | None = None


class Reliability(NamedTuple):
    """All sets of a pool. prompts: of the pool; live: those with a gradient; in_words: why nothing can be ranked, with no sets then.

    ratio: of the pool that is selected; selected: that many prompts, the top that precision looks at.
    """

    similarity: Similarity | None
    prompts: int
    live: int
    sets: list[HalfAgreement]
    in_words: str | None
    ratio: str = RATIO
    selected: int = 0


def measure(stores: Sequence[Store], similarity: Similarity | None = None, ratio: str | Decimal = RATIO) -> Reliability:
    """Half against half in stores of cropi-grad --halves.

    similarity: None is cosine where the halves have norms, else dot. ratio: of all prompts, those without a gradient too, that will be
    selected. InputError: the stores hold no halves, or no norms for a cosine. UsageError: the ratio is not in (0, 1].
    """
    prompts, live = sum(store.prompts for store in stores), sum(store.rows for store in stores)
    size = selection_size(ratio, prompts)
    nothing = _nothing_to_rank(stores) if not live else None
    if nothing:
        return Reliability(similarity, prompts, live, [], nothing, str(ratio), size)
    against = shared_means(stores)
    halves = read_halves(stores, against).of_both()
    has_norms = not np.isnan(halves.norms).any()
    if similarity is None:
        similarity = "cosine" if has_norms else "dot"
    elif similarity == "cosine" and not has_norms:
        raise InputError(
            f"{stores[0].path}: its halves have no norms (forward mode); compare them with --similarity dot"
        )
    sets = []
    for place, name in enumerate(against):
        # the norm of a mean is the same for all prompts and changes no rank, so it is not divided by
        scale = halves.norms if similarity == "cosine" else np.ones_like(halves.norms)
        groups = None
        if halves.groups is not None:
            groups = [part / scale[:, half, None] for half, part in enumerate(halves.groups[place])]
        sets.append(_agreement(name, halves.inner[:, :, place] / scale, groups, size))
    return Reliability(similarity, prompts, live, sets, None, str(ratio), size)


def _nothing_to_rank(stores: Sequence[Store]) -> str:
    rates = Counter(entry["pass_rate"] for store in stores for entry in store.entries())
    count = sum(rates.values())
    if set(rates) <= {0.0, 1.0}:
        return (
            f"nothing to rank, the pool is saturated: of {count} prompts the policy always solves {rates[1.0]} and never solves {rates[0.0]}; "
            "take prompts of other difficulty, or more samples a prompt"
        )
    return f"nothing to rank: none of the {count} prompts has samples of different rewards, so none has a gradient"


def _agreement(name: str, scores: Scores, groups: list[Scores] | None, size: int) -> HalfAgreement:
    """scores: [prompts, 2]. groups: the parts of groups of validation prompts in them, [prompts, groups] in either half. size: of the top."""
    count = len(scores)
    few = groups is not None and min(part.shape[1] for part in groups) < FEWEST_GROUPS
    by_chance = min(1.0, size / count) if count else 1.0
    words = f"{TOO_NARROW}; {_remedy(few)}" if groups is None or few else None
    nothing = HalfAgreement(name, count, None, None, by_chance, None, None, None, words)
    if count < FEWEST:
        few_prompts = f"too few prompts to say: {count} have a gradient in both halves, at least {FEWEST} are needed"
        return nothing._replace(in_words=few_prompts)
    first, second = np.ascontiguousarray(scores.T)
    if math.isnan(spearman(first, second)):
        return nothing._replace(in_words="nothing to rank: all prompts have the same score")
    correlation, precision = _estimates(scores, None if few else groups, size)
    measured = nothing._replace(spearman=correlation, precision=precision)
    if precision is None:
        what = "none is" if size == 0 else "all with a gradient are"
        measured = measured._replace(
            in_words=f"the ranking decides nothing here: of {size} prompts to select, {what} selected"
        )
    if correlation.value <= 0:
        return measured._replace(in_words="no ranking information found: one half says nothing about the other")
    one_half, whole = attainable(correlation.value)
    warning = measured.in_words
    if correlation.low <= 0:
        warning = "the halves' agreement cannot be told from chance; more prompts or more samples would say"
        if words is None:
            warning = "the halves' agreement cannot be told from chance; more prompts, validation prompts or samples would say"
    elif precision is not None and precision.low > normal_precision(correlation.value, by_chance):
        warning = (
            "the top agrees better than that of normally distributed scores would: they have groups or heavy tails, "
            "and the expected precisions are too low"
        )
    return measured._replace(
        one_half=(one_half, normal_precision(one_half, by_chance)),
        whole=(whole, normal_precision(whole, by_chance)),
        in_words=warning,
    )


def _remedy(few: bool) -> str:
    if few:
        return f"a half has fewer than {FEWEST_GROUPS} groups of validation prompts, take more of them"
    return (
        "making mean and store again by cropi-grad --halves measures it (--method jvp cannot, nor could older versions)"
    )


def _estimates(
    scores: Scores, groups: list[Scores] | None, size: int
) -> tuple[IntervalEstimate, IntervalEstimate | None]:
    """Spearman's correlation of the halves, and the precision of one's top `size` by the other's; None where that is no choice."""
    count = len(scores)
    chosen = 0 < size < count

    def figures(first: Scores, second: Scores) -> tuple[float, float]:
        return spearman(first, second), precision_at(first, second, size=size) if chosen else math.nan

    draw = np.random.default_rng(0)
    rounds = max(100, min(BOOTSTRAP_ROUNDS, 5_000_000 // count))  # large pools have narrow intervals and take long
    found = np.empty((rounds, 2))
    for number in range(rounds):
        drawn = draw.integers(count, size=count)
        sides = [scores[drawn, half] for half in (0, 1)]
        for half, part in enumerate(groups or ()):
            width = part.shape[1]
            times = draw.multinomial(width, np.full(width, 1 / width))
            sides[half] = sides[half] + part[drawn] @ ((times - 1) * math.sqrt(width / (width - 1)))
        found[number] = figures(sides[0], sides[1])
    values = figures(*np.ascontiguousarray(scores.T))
    correlation = _interval(values[0], found[:, 0], -1.0, groups is not None)
    return correlation, _interval(values[1], found[:, 1], 0.0, groups is not None) if chosen else None


def _interval(value: float, found: Scores, least: float, moved: bool) -> IntervalEstimate:
    """The value with the percentiles of the draws, `moved` ones united with those moved to it; draws on which nothing varies do not count."""
    found = found[~np.isnan(found)]
    if not len(found):
        return IntervalEstimate(value, math.nan, math.nan)
    low, middle, high = (float(x) for x in np.quantile(found, [0.025, 0.5, 0.975]))
    if moved:
        low, high = min(low, value - (middle - low)), max(high, value + (high - middle))
    return IntervalEstimate(value, max(low, least), min(high, 1.0))


def attainable(half_half: float) -> tuple[float, float]:
    """What follows from the Spearman correlation of two halves, 0 < r <= 1, as Spearman correlations.

    That of a perfect estimator with one half, and that of a ranking by both halves together with the truth. Both are approximate, see
    the head of this module.
    """
    reliability = _of_values(half_half)
    return _of_ranks(math.sqrt(reliability)), _of_ranks(math.sqrt(2 * reliability / (1 + reliability)))


def normal_precision(correlation: float, share: float) -> float:
    """Of the top `share` by one of two normal values of this Spearman correlation, the part in the top `share` by the other; 0 of none."""
    rho = _of_values(correlation)
    if rho >= 1.0 or not 0 < share < 1:
        return float(share > 0)
    cut = _NORMAL.inv_cdf(1 - share)
    # P(X > cut, Y > cut) = integral over x > cut of density(x) * P(Y > cut | x), by the middle of 4000 strips
    width = 10.0 / 4000
    middles = cut + width * (np.arange(4000) + 0.5)
    spread = math.sqrt(1 - rho * rho)
    joint = sum(_NORMAL.pdf(x) * _NORMAL.cdf((rho * x - cut) / spread) for x in middles.tolist()) * width
    return joint / share


def _of_values(ranks: float) -> float:
    """The correlation of normal values whose Spearman correlation is `ranks` (Pearson 1907)."""
    return 2 * math.sin(math.pi * ranks / 6)


def _of_ranks(values: float) -> float:
    return 6 / math.pi * math.asin(values / 2)


def as_json(found: Reliability) -> dict[str, Any]:
    """The figures as one JSON object."""

    def estimate(value: IntervalEstimate | None) -> dict[str, float | None] | None:
        # an interval is NaN where no draw varied, which JSON lacks
        return value and {key: None if math.isnan(x) else x for key, x in value._asdict().items()}

    def expected(value: tuple[float, float] | None) -> dict[str, float] | None:
        return value and {"spearman": value[0], "precision": value[1]}

    sets = [
        {
            **one._asdict(),
            "spearman": estimate(one.spearman),
            "precision": estimate(one.precision),
            "one_half": expected(one.one_half),
            "whole": expected(one.whole),
        }
        for one in found.sets
    ]
    bound = UPPER_BOUND if found.similarity == "cosine" and found.sets else None
    return {**found._asdict(), "expected_in_words": bound, "sets": sets}


def as_table(found: Reliability) -> str:
    """The figures for people."""
    lines = [f"{found.live} of {found.prompts} prompts have a gradient"]
    if found.in_words:
        lines.append(found.in_words)
    told = "at most" if found.similarity == "cosine" else "expected"
    top = f"precision@{found.selected}"
    for one in found.sets:
        lines += ["", f"{one.name}: {one.prompts} prompts with a gradient in both halves, ranked by {found.similarity}"]
        if one.spearman:
            lines.append(f"  {'':47}{'Spearman':24}{top}")
            precision = _shown(one.precision) if one.precision else "-"
            lines.append(f"  {'half against half':47}{_shown(one.spearman):24}{precision}")
            lines.append(f"  {'by chance':47}{'0':24}{one.by_chance:.3f}")
        for what, expected in (
            (f"a perfect estimator against one half, {told}", one.one_half),
            (f"all samples against the truth, {told}", one.whole),
        ):
            if expected:
                lines.append(f"  {what:47}{expected[0]:<24.3f}{expected[1]:.3f}")
        lines += [f"  {words}" for words in (one.in_words, one.spearman and one.interval_in_words) if words]
    if any(one.spearman for one in found.sets):
        lines += [
            "",
            f"{top}: the top {found.selected}, {found.ratio} of all {found.prompts} prompts, as cropi-select takes it",
        ]
        if found.similarity == "cosine":
            lines.append(UPPER_BOUND)
    return "\n".join(map(printable, lines))


def _shown(value: IntervalEstimate) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
