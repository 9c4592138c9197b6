"""Prompts that pull away from a target by more than noise: where references are wrong, these are the first to look at.

Their scores are those of cropi-score; what noise does to them is told by halves (`noise.py`). A prompt's p-value is that of its lowest z,
times the number of targets, and Benjamini and Hochberg's rule over all prompts with a gradient decides how many are listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cropi_tools.data.jsonl import Record
from cropi_tools.data.questions import without_examples
from cropi_tools.data.records import Rollout, pass_rate, read_rollouts
from cropi_tools.data.store import Store
from cropi_tools.rewards.answers import most_frequent
from cropi_tools.runtime.errors import InputError
from cropi_tools.scores.half_products import HalfProducts, Scores, read_halves
from cropi_tools.scores.influence import Similarity, exact_scores, shared_means
from cropi_tools.scores.noise import Noise, below_zero, listed, noise_of

FALSE_SHARE = 0.05
"""Of the prompts that are listed, the share that may not pull away from any target, on average."""

FEWEST = 20
"""Prompts with a gradient in both halves, from which the noise is known."""


class Audit(NamedTuple):
    """All prompts with a gradient. records: as cropi-score writes them; scores and noise by set, in order; p: of pulling away from no set;
    suspects: whether each is listed. in_words: why there is nothing to say, with no prompt listed then, or None. without_groups: the
    noise of the validation prompts is not known for itself.
    """

    names: list[str]
    records: list[Record]
    scores: Scores
    deviations: Scores
    p: Scores
    suspects: Any
    in_words: str | None
    without_groups: bool


def audit(stores: Sequence[Store], similarity: Similarity | None = None) -> Audit:
    """Scores and their noise. similarity: None is cosine where there are norms, else dot. InputError: the stores hold no halves, or no norms
    for a cosine."""
    against = shared_means(stores)
    halves = read_halves(stores, against)
    if similarity is None:
        similarity = "cosine" if all(store.has_vectors for store in stores) else "dot"
    records = [record for record in exact_scores(stores, similarity) if record["scores"] is not None]
    scores = np.array([[record["scores"][name] for name in against] for record in records]).reshape(-1, len(against))
    both = int((~np.isnan(halves.inner).any(axis=(1, 2))).sum())
    nothing = Audit(
        list(against), records, scores, np.full_like(scores, np.nan), np.ones(len(records)), None, None, False
    )
    if both < FEWEST:
        words = f"{both} prompts have a gradient in both halves, at least {FEWEST} are needed to know the noise"
        return nothing._replace(suspects=np.zeros(len(records), bool), in_words=words)
    found = [_noise(halves, place, _unit(records, mean, similarity)) for place, mean in enumerate(against.values())]
    p_values = np.stack([below_zero(scores[:, place], noise) for place, noise in enumerate(found)])
    p = np.minimum(p_values.min(axis=0) * len(found), 1.0)
    return nothing._replace(
        deviations=np.stack([noise.deviation for noise in found], axis=1),
        p=p,
        suspects=listed(p, FALSE_SHARE),
        without_groups=halves.groups is None,
    )


def _unit(records: Sequence[Record], mean: Mapping[str, Any], similarity: Similarity) -> Scores:
    """What the inner products of each prompt with a mean are divided by to be its score."""
    if similarity == "dot":
        return np.ones(len(records))
    return np.array([record["norm"] for record in records]) * mean["norm"]


def _noise(halves: HalfProducts, place: int, unit: Scores) -> Noise:
    first, second = halves.inner[:, 0, place], halves.inner[:, 1, place]
    validation = None
    if halves.groups is not None:
        validation = _of_validation(halves.groups[place], unit)
    return noise_of((first - second) / 2 / unit, validation)


def _of_validation(parts: Sequence[Scores], unit: Scores) -> Scores:
    """The variance of scores by the validation prompts: of a sum of G groups it is G / (G - 1) times the squares of what they differ by. The
    whole is the mean of two halves; what only one of them has stands for both. NaN where neither has a gradient."""
    of_halves = []
    for part in parts:
        width = part.shape[1]
        spread = part.var(axis=1) * width if width > 1 else np.full(len(part), np.nan)
        of_halves.append(spread * width / max(width - 1, 1))
    both = np.stack(of_halves)
    known = ~np.isnan(both)
    return np.where(known.any(axis=0), np.nansum(both, axis=0) / np.maximum(known.sum(axis=0), 1), np.nan) / 2 / unit**2


def suspect_records(found: Audit, rollouts: Sequence[str], store: Store) -> Iterator[Record]:
    """The listed prompts, most suspicious first, with their references and what the policy answers. InputError: rollouts of other prompts, or
    graded otherwise than those that the store was made of."""
    lowest = (found.scores / found.deviations).min(axis=1)
    order = sorted(np.flatnonzero(found.suspects), key=lambda place: (found.p[place], lowest[place], place))
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
        yield _record(found, int(place), rollout)


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
        "scores": scored["scores"],
        "deviations": dict(zip(found.names, found.deviations[place].tolist(), strict=True)),
        "p": float(found.p[place]),
    }
