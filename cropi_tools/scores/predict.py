"""cropi-score --predict: scores of a whole pool, of which a part was measured; the rest is predicted and says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cropi_tools import runtime
from cropi_tools.data.features import Features
from cropi_tools.data.jsonl import Record, is_stream, read_jsonl
from cropi_tools.data.manifest import read_manifest
from cropi_tools.data.records import check_score, read_prompts, read_scores
from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError
from cropi_tools.scores.options import PREDICTED, ScoreOptions
from cropi_tools.scores.prediction import FEWEST, Observations, Predictor, Trust
from cropi_tools.scores.reliability import measure

PROMPTS_AT_ONCE = 8192
BY_PRODUCTS = "influence.jsonl"
"""In a policy's folder: the scores that cropi-train --against made on the side."""
_EQUAL = frozenset({"zero-advantage", "zero-gradient"})  # what the samples say of such prompts is: no influence


class Measured(NamedTuple):
    """The pool with what is known of it. fresh: records by id. old: (age, record) of prompts that are not fresh. names: of the sets."""

    pool: Sequence[str]
    fresh: Mapping[str, Record]
    old: Sequence[tuple[int, Record]]
    names: Sequence[str]
    sources: Mapping[str, str]


def gather(options: ScoreOptions, found: Iterable[Record]) -> Measured:
    """Pool, scores as they were just measured, and those of --old.

    InputError: a measured prompt is not in the pool, too few were measured, or scores of earlier stages are of other sets or another measure.
    """
    sources = {record["id"]: record["source"] for record in read_prompts(options.predict)}
    fresh = {record["id"]: record for record in found}
    for identity in fresh:
        if identity not in sources:
            raise InputError(f"prompt '{identity}' was measured and is not in the pool of --predict; give all of it")
    names = sorted({name for record in fresh.values() for name in record["scores"] or ()})
    telling = [record for record in fresh.values() if _tells(record)]
    if len(telling) < FEWEST or not names:
        raise InputError(
            f"{len(telling)} prompts were measured, too few to predict from; at least {FEWEST} are needed, and one of them with a gradient"
        )
    old = [
        (age, record)
        for age, path in enumerate(options.old, 1)
        for record in _read_old(path, names, options.measure)
        if record["id"] in sources and record["id"] not in fresh
    ]
    return Measured(list(sources), fresh, old, names, sources)


def _tells(record: Record) -> bool:
    """Whether a measured prompt is an observation: it has a score, or its samples say that it moves nothing."""
    return record["scores"] is not None or record["status"] in _EQUAL


def _read_old(path: str, names: Sequence[str], similarity: str) -> Iterator[Record]:
    made = None if is_stream(path) else read_manifest(path)
    before = (made or {}).get("options", {}).get("similarity", similarity)
    if before != similarity:
        raise InputError(f"{path}: its scores are by --similarity {before}, those of now by {similarity}")
    for record in _by_prompt(path):
        if not record.get("measured", True) or not _tells(record):
            continue
        if record["scores"] is not None and sorted(record["scores"]) != list(names):
            raise InputError(
                f"{path}: its scores are on {', '.join(sorted(record['scores']))}, those of now on {', '.join(names)}"
            )
        yield record


def _by_prompt(path: str) -> Iterator[Record]:
    """Score records; those that training made on the side, one a step (cropi-train --against), as one a prompt with the mean of its scores."""
    if Path(path).name != BY_PRODUCTS:
        yield from read_scores([path])
        return
    steps: dict[str, list[Record]] = {}
    for number, record in read_jsonl(path):
        check_score(record, f"{path}:{number}", "what cropi-train --against writes")
        if not isinstance(record.get("id"), str):
            raise InputError(f"{path}:{number}: no 'id' (text) in the record")
        steps.setdefault(record["id"], []).append(record)
    for identity, records in steps.items():
        found = [record["scores"] for record in records if record["scores"] is not None]
        if any(scores.keys() != found[0].keys() for scores in found):
            raise InputError(
                f"{path}: prompt '{identity}' has scores on other sets at one step than at another; train again"
            )
        mean = {name: float(np.mean([scores[name] for scores in found])) for name in found[0]} if found else None
        yield {**records[0], "scores": mean, "status": "ok" if found else "zero-advantage"}


def fitted(options: ScoreOptions, known: Measured, features: Features) -> Predictor:
    """The predictor, told about. InputError: it is weak, and --if-weak does not say to go on."""
    told = [(0, record) for record in known.fresh.values() if _tells(record)] + list(known.old)
    none = dict.fromkeys(known.names, 0.0)
    scores = np.array([[(record["scores"] or none)[name] for name in known.names] for _, record in told])
    ids = [record["id"] for _, record in told]
    ages = np.array([age for age, _ in told])
    observed = Observations(ids, [known.sources[name] for name in ids], features.rows(ids), scores, ages)
    predictor = Predictor(observed, known.names)
    older = (
        f" and {len(known.old)} of earlier stages, each weighing {predictor.decay:g} a stage of age"
        if known.old
        else ""
    )
    runtime.notify(f"predicting from {len(told) - len(known.old)} prompts measured now{older}")
    for trust in predictor.trust:
        runtime.notify(in_words(trust))
    weak = [trust.weakness for trust in predictor.trust if trust.weakness is not None]
    if weak and options.if_weak == "refuse":
        raise InputError(
            f"{'; '.join(weak)}: measure more prompts, or select from those that were; --if-weak warn goes on all the same"
        )
    for words in weak:
        runtime.warn(f"{words}; its choice is not to be trusted")
    return predictor


def in_words(trust: Trust) -> str:
    """What cross-validation says of a set's predictions, for a person."""
    rank, top = trust.spearman, trust.precision
    return (
        f"{trust.name}: foretold scores correlate {rank[0]:.2f} [{rank[1]:.2f}, {rank[2]:.2f}] with measured ones "
        f"(the source's mean alone {trust.source_spearman:.2f}); precision of the top tenth {top[0]:.2f} [{top[1]:.2f}, {top[2]:.2f}] "
        f"(the source's mean alone {trust.source_precision:.2f}, by chance {trust.by_chance:.2f}); squared error {trust.error_of_source:.2f} "
        "of that of the source's mean"
    )


def tell_ceiling(stores: Sequence[Store], options: ScoreOptions) -> None:
    """Say how well even a perfect prediction would agree with what was measured, where the stores have halves."""
    against = stores[0].attributes["against"]
    if options.valid or not against or not all("halves" in mean for mean in against.values()):
        runtime.notify(
            "what a perfect prediction would reach is not known: the stores have no halves (cropi-grad --halves)"
        )
        return
    for found in measure(stores, options.similarity).sets:
        if found.whole is None:
            runtime.notify(f"{found.name}: what a perfect prediction would reach is not known ({found.in_words})")
        else:
            runtime.notify(
                f"{found.name}: a perfect prediction would correlate about {found.whole[0]:.2f}, among prompts with a gradient"
            )


def records(known: Measured, predictor: Predictor, features: Features) -> Iterator[Record]:
    """One record a prompt of the pool, in its order: as it was measured, or predicted."""
    for start in range(0, len(known.pool), PROMPTS_AT_ONCE):
        some = known.pool[start : start + PROMPTS_AT_ONCE]
        rest = [name for name in some if name not in known.fresh]
        scores: dict[str, tuple[list[float], list[float]]] = {}
        if rest:
            values, spread = predictor(features.rows(rest), [known.sources[name] for name in rest])
            scores = dict(zip(rest, zip(values.tolist(), spread.tolist(), strict=True), strict=True))
        for name in some:
            if name in known.fresh:
                yield {**known.fresh[name], "measured": True}
                continue
            found, deviation = scores[name]
            yield {
                "id": name,
                "source": known.sources[name],
                "scores": dict(zip(known.names, found, strict=True)),
                "pass_rate": None,
                "norm": None,
                "status": PREDICTED,
                "measured": False,
                "deviation": dict(zip(known.names, deviation, strict=True)),
            }


def facts(known: Measured, predictor: Predictor) -> dict[str, Any]:
    """What the manifest keeps of a prediction."""
    return {
        "measured": len(known.fresh),
        "old": len(known.old),
        "ridge": predictor.ridge,
        "decay": predictor.decay,
        "trust": [{**trust._asdict(), "weakness": trust.weakness} for trust in predictor.trust],
    }
