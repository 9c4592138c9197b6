"""Prompts that pull away from a target which others of their source pull towards: where references are wrong, the first to look at.

Scores are those of cropi-score; what noise does to them is told by halves (`noise.py`). Only prompts of the target's kind are looked at, those
whose source pulls towards it on average: a prompt of another kind that pulls away competes with the target, and mostly is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cropi_tools.data.jsonl import Record
from cropi_tools.data.questions import without_examples
from cropi_tools.data.records import Rollout, pass_rate, read_rollouts
from cropi_tools.data.store import Store
from cropi_tools.rewards.answers import most_frequent
from cropi_tools.runtime.errors import InputError
from cropi_tools.scores.half_products import HalfProducts, Scores, read_halves
from cropi_tools.scores.influence import Similarity, exact_scores, shared_means
from cropi_tools.scores.noise import Noise, below_zero, noise_of

CHANCE, LEVEL = 0.05, 0.025
"""Which share of the prompts without influence is listed, at most; and the p-value up to which a prompt is listed, two deviations below zero:
half of the share is left for noise that is not as alike between prompts as it is taken for."""

TOWARDS = 3.0
"""By how many of its deviations the mean score of a source that pulls towards a target lies above zero."""

FEWEST, FEWEST_OF_SOURCE = 20, 10
"""Prompts with a gradient in both halves, from which the noise is known; prompts with a gradient, from which a source's mean is."""

Flags = NDArray[np.bool_]


class Audit(NamedTuple):
    """All prompts with a gradient. records: as cropi-score writes them. By set, in the order of names: scores, their deviations, p, and kind,
    whether the prompt's source pulls towards the set: [prompts, sets]. in_words: why nothing can be said, or None; deviations are NaN then, and
    p is 1. without_groups: the noise of the validation prompts is not known for itself.
    """

    names: list[str]
    records: list[Record]
    scores: Scores
    deviations: Scores
    p: Scores
    kind: Flags
    in_words: str | None
    without_groups: bool

    @property
    def away(self) -> Flags:
        """Which prompts pull away from which sets."""
        return self.kind & (self.p <= LEVEL)


def audit(stores: Sequence[Store], similarity: Similarity | None = None) -> Audit:
    """Scores and their noise. similarity: None is cosine where there are norms, else dot. InputError: the stores hold no halves, or no norms
    for a cosine."""
    against = shared_means(stores)
    halves = read_halves(stores, against)
    if similarity is None:
        similarity = "cosine" if all(store.has_vectors for store in stores) else "dot"
    records = [record for record in exact_scores(stores, similarity) if record["scores"] is not None]
    names, count = list(against), len(records)
    scores = np.array([[record["scores"][name] for name in names] for record in records]).reshape(count, len(names))
    shape = scores.shape
    nothing = Audit(names, records, scores, np.full(shape, np.nan), np.ones(shape), np.zeros(shape, bool), None, False)
    both = len(halves.of_both().norms)
    if both < FEWEST:
        words = f"{both} prompts have a gradient in both halves, at least {FEWEST} are needed to know the noise"
        return nothing._replace(in_words=words)
    sources = [record["source"] for record in records]
    units = [_unit(records, mean, similarity) for mean in against.values()]
    columns = list(scores.T)
    noise = [_noise(halves, place, unit, columns[place]) for place, unit in enumerate(units)]
    kind = [_towards(columns[place], sources, _parts(halves, place, unit)) for place, unit in enumerate(units)]
    return nothing._replace(
        deviations=np.stack([one.deviation for one in noise], axis=1),
        p=np.stack([below_zero(column, one) for column, one in zip(columns, noise, strict=True)], axis=1),
        kind=np.stack(kind, axis=1),
        without_groups=any(_parts(halves, place, unit) is None for place, unit in enumerate(units)),
    )


def _unit(records: Sequence[Record], mean: Mapping[str, Any], similarity: Similarity) -> Scores:
    """What the inner products of each prompt with a mean are divided by to be its score."""
    if similarity == "dot":
        return np.ones(len(records))
    return np.array([record["norm"] for record in records]) * mean["norm"]


def _noise(halves: HalfProducts, place: int, unit: Scores, scores: Scores) -> Noise:
    first, second = halves.inner[:, 0, place], halves.inner[:, 1, place]
    difference = _without_length(((first - second) / 2 / unit)[:, None], scores)[:, 0]
    parts = _parts(halves, place, unit)
    return noise_of(
        difference, None if parts is None else _of_validation([_without_length(part, scores) for part in parts])
    )


def _without_length(columns: Scores, scores: Scores) -> Scores:
    """What is not in proportion to the scores: the noise of a mean gradient's length moves all scores in proportion, and none past zero."""
    known = ~np.isnan(columns).any(axis=1)
    square = float(scores[known] @ scores[known])
    share = scores[known] @ columns[known] / square if square else np.zeros(columns.shape[1])
    found: Scores = columns - scores[:, None] * share
    return found


def _parts(halves: HalfProducts, place: int, unit: Scores) -> list[Scores] | None:
    """What groups of validation prompts add to the score of each half, [prompts, groups] in either half; None where they cannot vary."""
    if halves.groups is None or any(part.shape[1] < 2 for part in halves.groups[place]):
        return None
    return [part / unit[:, None] for part in halves.groups[place]]


def _of_validation(parts: Sequence[Scores]) -> Scores:
    """The variance of scores by the validation prompts, NaN where neither half has a gradient.

    Of a sum of G groups it is G / (G - 1) times the squares of what they differ by. The whole is the mean of two halves; where only one of
    them has a gradient, it stands for both.
    """
    of_halves = np.stack([part.var(axis=1, ddof=1) * part.shape[1] for part in parts])
    known = ~np.isnan(of_halves)
    total = np.where(known, of_halves, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1) / 2, np.nan)


def _towards(scores: Scores, sources: Sequence[str], parts: Sequence[Scores] | None) -> Flags:
    """Whether each prompt's source pulls towards a set: its mean score is above zero by more than its noise, that of the validation prompts
    and that of having these prompts."""
    found = np.zeros(len(scores), bool)
    names = np.array(sources)
    for source in np.unique(names):
        own = names == source
        if own.sum() < FEWEST_OF_SOURCE:
            continue
        variance = float(scores[own].var(ddof=1)) / int(own.sum())
        if parts is not None:
            means = [part[own][~np.isnan(part[own]).any(axis=1)] for part in parts]
            if all(map(len, means)):
                variance += float(_of_validation([part.mean(axis=0, keepdims=True) for part in means])[0])
        found[own] = scores[own].mean() > TOWARDS * np.sqrt(variance)
    return found


def suspect_records(found: Audit, rollouts: Sequence[str], store: Store) -> Iterator[Record]:
    """The prompts that pull away, most suspicious first, with their references and what the policy answers. InputError: rollouts of other
    prompts, or graded otherwise than those that the store was made of."""
    p = np.where(found.away, found.p, 1.0).min(axis=1)
    order = [int(place) for place in np.argsort(p, kind="stable") if found.away[place].any()]
    wanted = {found.records[place]["id"] for place in order}
    answered = {rollout.id: rollout for rollout in read_rollouts(rollouts) if rollout.id in wanted}
    for place in order:
        record = found.records[place]
        rollout = answered.get(record["id"])
        if rollout is None or abs(pass_rate(rollout.rewards) - record["pass_rate"]) > 1e-6:
            what = "are not there" if rollout is None else "have other rewards"
            raise InputError(
                f"{store.path}: the rollouts of its prompt '{record['id']}' {what}; give --suspects those that the store was made of"
            )
        yield _record(found, place, rollout)


def _record(found: Audit, place: int, rollout: Rollout) -> Record:
    scored, record = found.records[place], rollout.record
    usual = most_frequent(record, record["samples"])
    assert usual is not None  # a prompt with a gradient has samples
    return {
        "id": rollout.id,
        "source": rollout.source,
        "prompt": without_examples(record) if "prompt" in record else None,
        "answer": record.get("answer"),
        "usual_answer": usual.answer,
        "usual_share": usual.samples / len(record["samples"]),
        "pass_rate": scored["pass_rate"],
        "away_from": [name for name, away in zip(found.names, found.away[place].tolist(), strict=True) if away],
        "scores": scored["scores"],
        "deviations": dict(zip(found.names, found.deviations[place].tolist(), strict=True)),
        "p": float(found.p[place][found.away[place]].min()),
    }
