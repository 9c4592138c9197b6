"""How far a ranking by influence can be trusted: one half of the rollouts against the other.

cropi-grad --halves takes every prompt's inner products twice, from either half of its samples with the mean over either half of the
validation prompts, so the noise of one half has nothing to do with that of the other. What both halves agree on is then signal, and
classical test theory says the rest (Spearman 1910, Brown 1910; Lord and Novick 1968, chapters 3 and 4): with correlation r between the
halves, a perfect estimator would reach sqrt(r) against one half, two halves together have the reliability 2r / (1 + r), and correlate
with the truth by its square root.

That theory is about correlations of values. Scores are told here in ranks, so a rank correlation is taken to the correlation of normal
values that has it (2 sin(pi r / 6)), carried through the theory there, and back. What a correlation means for the top tenth is
taken from the same normal values. Neither holds to the last digit for scores of another shape: these are expectations, not measurements.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cropi_tools.data.errors import InputError
from cropi_tools.data.store import Store
from cropi_tools.influence.agreement import BOOTSTRAP_ROUNDS, bootstrap_interval, precision_at, spearman
from cropi_tools.influence.scoring import Similarity, shared_means

SHARE = 0.1
FEWEST = 20  # prompts; with fewer, the top tenth is one prompt
_NORMAL = NormalDist()


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Agreement(NamedTuple):
    """One validation set: how the halves agree, and what follows from it.

    prompts: those with a gradient in both halves. by_chance: the precision of a random ranking. one_half and whole: the Spearman correlation
    and precision expected of a perfect estimator against one half, and of the ranking by all samples against the truth; None where the
    halves share nothing. in_words: what to make of it, where there is no ranking to speak of.
    """

    name: str
    prompts: int
    spearman: Estimate | None
    precision: Estimate | None
    by_chance: float
    one_half: tuple[float, float] | None
    whole: tuple[float, float] | None
    in_words: str | None


class Reliability(NamedTuple):
    """All sets of a pool. prompts: of the pool; live: those with a gradient; in_words: why nothing can be ranked, with no sets then."""

    similarity: Similarity | None
    prompts: int
    live: int
    sets: list[Agreement]
    in_words: str | None


def measure(stores: Sequence[Store], similarity: Similarity | None = None) -> Reliability:
    """Half against half in stores of cropi-grad --halves.

    similarity: None is cosine where the halves have norms, else dot. InputError: the stores hold no halves, or no norms for a cosine.
    """
    prompts, live = sum(store.prompts for store in stores), sum(store.rows for store in stores)
    nothing = _nothing_to_rank(stores) if not live else None
    if nothing:
        return Reliability(similarity, prompts, live, [], nothing)
    against = shared_means(stores)
    if not all("halves" in mean for mean in against.values()):
        raise InputError(f"{stores[0].path}: holds no halves to compare; cropi-grad --halves makes them")
    numbers = _halves(stores, list(against))
    has_norms = not np.isnan(numbers[:, :, 0]).any()
    if similarity is None:
        similarity = "cosine" if has_norms else "dot"
    elif similarity == "cosine" and not has_norms:
        raise InputError(
            f"{stores[0].path}: its halves have no norms (forward mode); compare them with --similarity dot"
        )
    sets = []
    for place, name in enumerate(against, 1):
        scores = numbers[:, :, place]
        sets.append(_agreement(name, scores / numbers[:, :, 0] if similarity == "cosine" else scores))
    return Reliability(similarity, prompts, live, sets, None)


def _nothing_to_rank(stores: Sequence[Store]) -> str:
    rates = Counter(entry["pass_rate"] for store in stores for entry in store.entries())
    count = sum(rates.values())
    if set(rates) <= {0.0, 1.0}:
        return (
            f"nothing to rank, the pool is saturated: of {count} prompts the policy always solves {rates[1.0]} and never solves {rates[0.0]}; "
            "take prompts of other difficulty, or more samples a prompt"
        )
    return f"nothing to rank: none of the {count} prompts has samples of different rewards, so none has a gradient"


def _halves(stores: Sequence[Store], names: Sequence[str]) -> NDArray[np.float64]:
    """Norm (NaN if unknown) and inner products of either half, float64 [prompts, 2, 1 + sets], of prompts with a gradient in both."""
    numbers = array("d")
    for store in stores:
        for entry in store.entries():
            if entry["row"] is None:
                continue
            halves = entry.get("halves")
            if not isinstance(halves, list) or len(halves) != 2:
                raise InputError(
                    f"{store.path}: prompt '{entry['id']}' has no halves; the store is damaged, make it again"
                )
            if None in halves:
                continue
            for half in halves:
                norm = half["gradient_norm"]
                numbers.append(math.nan if norm is None else norm)
                numbers.extend(half["inner"][name] for name in names)
    return np.array(numbers, np.float64).reshape(-1, 2, 1 + len(names))


def _agreement(name: str, scores: NDArray[np.float64]) -> Agreement:
    """scores: [prompts, 2]. The norm of a mean is the same for all prompts and changes no rank, so it is not divided by."""
    count = len(scores)
    size = max(1, int(SHARE * count + 1e-9))
    by_chance = size / count if count else SHARE
    nothing = Agreement(name, count, None, None, by_chance, None, None, None)
    if count < FEWEST:
        words = f"too few prompts to say: {count} have a gradient in both halves, at least {FEWEST} are needed"
        return nothing._replace(in_words=words)
    first, second = np.ascontiguousarray(scores.T)
    if math.isnan(spearman(first, second)):
        return nothing._replace(in_words="nothing to rank: all prompts have the same score")
    correlation = _estimate(spearman, first, second)
    precision = _estimate(lambda one, other: precision_at(one, other, SHARE), first, second)
    measured = Agreement(name, count, correlation, precision, by_chance, None, None, None)
    if correlation.value <= 0:
        return measured._replace(in_words="no ranking information found: one half says nothing about the other")
    one_half, whole = attainable(correlation.value)
    warning = None
    if correlation.low <= 0:
        warning = "the halves' agreement cannot be told from chance; more prompts or more samples would say"
    elif precision.low > normal_precision(correlation.value, by_chance):
        warning = (
            "the top tenth agrees better than normally distributed scores would: they have groups or heavy tails, "
            "and the expected precisions are too low"
        )
    return measured._replace(
        one_half=(one_half, normal_precision(one_half, by_chance)),
        whole=(whole, normal_precision(whole, by_chance)),
        in_words=warning,
    )


def _estimate(
    of: Callable[[NDArray[Any], NDArray[Any]], float], first: NDArray[np.float64], second: NDArray[np.float64]
) -> Estimate:
    count = len(first)
    rounds = max(100, min(BOOTSTRAP_ROUNDS, 5_000_000 // count))  # large pools have narrow intervals and take long
    interval = bootstrap_interval(lambda drawn: of(first[drawn], second[drawn]), count, rounds=rounds)
    return Estimate(of(first, second), *interval)


def attainable(half_half: float) -> tuple[float, float]:
    """What follows from the Spearman correlation of two halves, 0 < r <= 1, as Spearman correlations.

    That of a perfect estimator with one half, and that of a ranking by both halves together with the truth. Both are approximate, see
    the head of this module.
    """
    reliability = _of_values(half_half)
    return _of_ranks(math.sqrt(reliability)), _of_ranks(math.sqrt(2 * reliability / (1 + reliability)))


def normal_precision(correlation: float, share: float) -> float:
    """Of the top `share` by one of two normal values of this Spearman correlation, the part that is in the top `share` by the other."""
    rho = _of_values(correlation)
    if rho >= 1.0:
        return 1.0
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

    def estimate(value: Estimate | None) -> dict[str, float | None] | None:
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
    return {**found._asdict(), "share": SHARE, "sets": sets}


def as_table(found: Reliability) -> str:
    """The figures for people."""
    lines = [f"{found.live} of {found.prompts} prompts have a gradient"]
    if found.in_words:
        lines.append(found.in_words)
    for one in found.sets:
        lines += ["", f"{one.name}: {one.prompts} prompts with a gradient in both halves, ranked by {found.similarity}"]
        if one.spearman and one.precision:
            lines.append(f"  {'':47}{'Spearman':24}precision@10%")
            lines.append(f"  {'half against half':47}{_shown(one.spearman):24}{_shown(one.precision)}")
            lines.append(f"  {'by chance':47}{'0':24}{one.by_chance:.3f}")
        for what, expected in (
            ("a perfect estimator against one half, expected", one.one_half),
            ("all samples against the truth, expected", one.whole),
        ):
            if expected:
                lines.append(f"  {what:47}{expected[0]:<24.3f}{expected[1]:.3f}")
        if one.in_words:
            lines.append(f"  {one.in_words}")
    return "\n".join(lines)


def _shown(value: Estimate) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
