"""Which prompts to train on: influence merged over validation sets, and the baselines it is compared with.

One function, `selection_size`, decides how many prompts are selected; one hash, `tie_key`, decides between equals.
Nothing depends on the order of the prompts or of the score records (`full`, which keeps the pool's order, apart), and
sums of reciprocal ranks are exact fractions, because ties among them are routine and float rounding would decide them.

Source: arXiv 2510.26491, selection by reciprocal ranks and its baselines; the shuffled control is ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, InvalidOperation, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Literal, get_args

from cropi_tools.data.digest_set import hash64
from cropi_tools.runtime.errors import InputError, UsageError

Among = Literal["measured", "predicted", "all"]
Rule = Literal["influence", "shuffled", "random", "learnability", "hardest", "pass-rate", "full"]

RULES: tuple[str, ...] = get_args(Rule)
RULES_BY_PASS_RATE = frozenset({"learnability", "hardest", "pass-rate"})
RULES_NEEDING_SCORES = frozenset({"influence", "shuffled"}) | RULES_BY_PASS_RATE
DEFAULT_BAND = (0.2, 0.8)


@dataclass(frozen=True, slots=True)
class Score:
    """The score record of one prompt, or what its rollouts say.

    `scores` holds the influence on each validation set (cosine, higher is better); None when the prompt has none, as
    one of zero advantage or one that was skipped. `pass_rate` is the share of its rollouts that pass, None if unknown.
    """

    id: str
    source: str
    scores: Mapping[str, float] | None
    pass_rate: float | None
    status: str
    measured: bool = True


@dataclass(frozen=True, slots=True)
class Selected:
    """One selected prompt: its rank from 1, and what it was selected by (None where nothing was).

    score: by influence, that on each validation set, and `reciprocal_rank` is the sum that they were merged into.
    """

    id: str
    rank: int
    score: float | Mapping[str, float] | None
    reciprocal_rank: float | None = None


def selection_size(ratio: str | Decimal, population: int) -> int:
    """The number of prompts to select: floor(ratio * population), exact in decimal ("0.29" of 100 is 29, not 28).

    Raises UsageError when `ratio` is not a number in (0, 1].
    """
    try:
        share = Decimal(str(ratio))
    except InvalidOperation:
        raise UsageError(f"ratio {str(ratio)!r} is not a number; give a decimal in (0, 1], as 0.1") from None
    if not share.is_finite() or not 0 < share <= 1:
        raise UsageError(f"ratio {ratio} lies outside (0, 1]; give the share of prompts to select, as 0.1")
    with localcontext() as context:
        context.prec = len(share.as_tuple().digits) + len(str(population))  # enough for the product to be exact
        return int((share * population).to_integral_value(ROUND_FLOOR))


def check_ratio(ratio: str | Decimal, population: int) -> None:
    """UsageError: the ratio selects none of the prompts, though there are some; or as `selection_size`."""
    if population and not selection_size(ratio, population):
        raise UsageError(
            f"ratio {ratio} of {population} prompts selects none, as it is rounded down; give {least_ratio(population):f} or more"
        )


def least_ratio(population: int) -> Decimal:
    """A short decimal that selects one prompt of so many, the smallest with its number of digits: 0.34 of 3."""
    digits = len(str(population)) + 1
    return (Decimal(1) / population).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING).normalize()


def tie_key(seed: int, prompt_id: str) -> int:
    """A seeded 64-bit number for a prompt; among equals, and at random, the smaller number goes first.

    It is BLAKE2b with 8 bytes of output over the text "SEED:ID", read big-endian: `printf 7:p1 | b2sum -l 64` shows it.
    """
    return hash64(f"{seed}:{prompt_id}")


def permutation(prompt_ids: Iterable[str], seed: int) -> dict[str, str]:
    """A seeded permutation of the pool: each prompt by the one in whose place it stands.

    It follows from the seed and the ids alone, and from neither their order nor who has a score. So selections of one seed at
    several stages are moved alike, and overlap as much as those that were moved.
    """
    names = sorted(prompt_ids)
    # The text hashed differs from that of `tie_key`, so that breaking ties does not undo or favor the permutation.
    takers = sorted(names, key=lambda prompt_id: (hash64(f"permute:{seed}:{prompt_id}"), prompt_id))
    return dict(zip(names, takers, strict=True))


def merge_sets(live: Mapping[str, Mapping[str, float]], size: int, keys: Mapping[str, int]) -> dict[str, Fraction]:
    """Sums, for each prompt, 1/rank over the validation sets in whose top `size` it stands; others are left out.

    `live` maps a prompt to its score on each set (all prompts have the same sets), `keys` a prompt to its tie key.
    Ranks start at 1, highest score first.
    """
    merged: dict[str, Fraction] = {}
    for name in sorted({name for scores in live.values() for name in scores}):
        on_set = {prompt_id: scores[name] for prompt_id, scores in live.items()}
        for rank, prompt_id in enumerate(_top(on_set, size, keys), start=1):
            merged[prompt_id] = merged.get(prompt_id, Fraction(0)) + Fraction(1, rank)
    return merged


def select(
    by: str,
    prompt_ids: Sequence[str],
    scores: Mapping[str, Score] | None,
    ratio: str | Decimal,
    seed: int,
    band: tuple[float, float] | None = None,
    number: int | None = None,
    among: Among = "measured",
    sources: Mapping[str, str] | None = None,
) -> list[Selected]:
    """Selects at most N prompts of the pool, best first: `number`, or without one `selection_size(ratio, len(prompt_ids))`.

    `scores` maps ids to records and must cover the pool exactly. Ties go to the smaller `tie_key(seed, id)`. The rules:

    * influence: the top N of each validation set, merged by the sum of reciprocal ranks (`merge_sets`), the top N of
      the merge; `score` has the influence on each set, `reciprocal_rank` that sum. Prompts without a score are never
      selected, so fewer than N come back when fewer have one. Static influence is this rule with the scores of the
      first stage in all stages. `among`: whether prompts with a measured score can be selected, those with a predicted
      one, or both.
    * shuffled: the control. What influence selects, with each prompt replaced by the one that `permutation` puts in its
      place: the same scores, on the wrong prompts. Any prompt of the pool may be that, one without a score included.
    * random: the N prompts of the pool with the smallest tie keys, those of zero advantage or without a score included.
      With `sources`, a source by prompt id, every source gives the same number, or all that it has.
    * learnability: p(1 - p) of the pass rate p, highest first; `score` is p(1 - p). Prompts with p = 0 or 1 come last,
      but do count; those of unknown pass rate do not.
    * hardest: the lowest pass rate first, those that never pass included; `score` is the pass rate (arXiv 2508.14094).
    * pass-rate: N at random (smallest tie keys) of the prompts whose pass rate lies in `band`, ends included; fewer
      when fewer do; `score` is the pass rate. The paper reports such a baseline, but no published band is known to us:
      the default of .2 to .8 is our choice.
    * full: every prompt in the order of the pool, whatever the ratio.

    The same seed gives the same random selection each time: stages that should differ need seeds that do. Stages of shuffled
    need one seed, or their selections overlap less than those of influence.

    Raises UsageError for an unknown rule, a ratio or band out of range, a band without pass-rate, or a rule that lacks
    its scores; InputError for a repeated id, records that do not cover the pool exactly, scores that are not finite
    numbers, records of different validation sets, and (where it is used) a pass rate outside [0, 1].
    """
    if by not in RULES:
        raise UsageError(f"unknown selection rule {by!r}; choose one of {', '.join(RULES)}")
    if scores is None and by in RULES_NEEDING_SCORES:
        also = ", or the rollouts of the pool with --rollouts" if by in RULES_BY_PASS_RATE else ""
        raise UsageError(f"selecting by {by} needs scores; give a scores file (cropi-score writes one){also}")
    if band is not None and by != "pass-rate":
        raise UsageError(f"a pass-rate band does not go with selecting by {by}; leave it out or select by pass-rate")
    size = selection_size(ratio, len(prompt_ids)) if number is None else number
    records = scores or {}
    _check_pool(prompt_ids)
    if scores is not None:
        _check_records(prompt_ids, records)
    if by == "full":
        return [Selected(prompt_id, rank, None) for rank, prompt_id in enumerate(prompt_ids, start=1)]

    keys = {prompt_id: tie_key(seed, prompt_id) for prompt_id in prompt_ids}
    shown: Mapping[str, Fraction] = {}
    live: Mapping[str, Mapping[str, float]] = {}
    merged: Mapping[str, Fraction] = {}
    if by == "random":
        chosen = _top(_turns(prompt_ids, sources, keys), size, keys)
    elif by == "pass-rate":
        low, high = _check_band(DEFAULT_BAND if band is None else band)
        shown = {prompt_id: rate for prompt_id, rate in _pass_rates(records).items() if low <= rate <= high}
        chosen = _top(dict.fromkeys(shown, 0), size, keys)
    elif by == "hardest":
        shown = _pass_rates(records)
        chosen = _top({prompt_id: -rate for prompt_id, rate in shown.items()}, size, keys)
    elif by == "learnability":
        shown = {prompt_id: rate * (1 - rate) for prompt_id, rate in _pass_rates(records).items()}
        chosen = _top(shown, size, keys)
    else:
        live = {
            prompt_id: record.scores
            for prompt_id, record in records.items()
            if record.scores is not None and among in ("all", "measured" if record.measured else "predicted")
        }
        merged = merge_sets(live, size, keys)
        chosen = _top(merged, size, keys)
    moved = permutation(prompt_ids, seed) if by == "shuffled" else {}
    return [
        Selected(moved.get(prompt_id, prompt_id), rank, live[prompt_id], float(merged[prompt_id]))
        if prompt_id in merged
        else Selected(prompt_id, rank, float(shown[prompt_id]) if prompt_id in shown else None)
        for rank, prompt_id in enumerate(chosen, start=1)
    ]


def _turns(prompt_ids: Sequence[str], sources: Mapping[str, str] | None, keys: Mapping[str, int]) -> dict[str, int]:
    """By prompt the number of its turn, negative: the sources take turns, each with its prompts by tie key. 0 for all without sources.

    So a source of few prompts is sampled like any other: what nobody has looked at cannot be found. In the last turn,
    where not all have one, larger sources mostly come first: their smallest keys are smaller.
    """
    if sources is None:
        return dict.fromkeys(prompt_ids, 0)
    taken: Counter[str] = Counter()
    found = {}
    for prompt_id in sorted(prompt_ids, key=lambda prompt_id: (keys[prompt_id], prompt_id)):
        taken[sources[prompt_id]] += 1
        found[prompt_id] = -taken[sources[prompt_id]]
    return found


def _top(values: Mapping[str, float | Fraction], size: int, keys: Mapping[str, int]) -> list[str]:
    """The `size` ids of highest value, best first; ties by smallest key, and by id should two keys ever be equal."""
    return sorted(values, key=lambda prompt_id: (-values[prompt_id], keys[prompt_id], prompt_id))[:size]


def _pass_rates(records: Mapping[str, Score]) -> dict[str, Fraction]:
    """The pass rates that are known, as the fractions they stand for.

    A pass rate is usually a count over a number of rollouts. As floats, .3 * (1 - .3) and .7 * (1 - .7) differ, and
    rounding would decide such ties, for the same side each time.
    """
    rates = {}
    for prompt_id, record in records.items():
        if record.pass_rate is None:
            continue
        if not 0 <= record.pass_rate <= 1:
            raise InputError(
                f"pass rate of prompt {prompt_id!r} is {record.pass_rate}, outside [0, 1]; "
                "give the share of its rollouts that pass, or null to leave it out"
            )
        rates[prompt_id] = _as_fraction(record.pass_rate)
    return rates


@lru_cache  # a pool has few distinct pass rates
def _as_fraction(number: float) -> Fraction:
    return Fraction(number).limit_denominator(1_000_000)


def _check_band(band: tuple[float, float]) -> tuple[Fraction, Fraction]:
    low, high = band
    if not 0 <= low <= high <= 1:
        raise UsageError(f"pass-rate band {low},{high} is not within 0 <= LO <= HI <= 1; give it as 0.2,0.8")
    return _as_fraction(low), _as_fraction(high)


def _check_pool(prompt_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for prompt_id in prompt_ids:
        if prompt_id in seen:
            raise InputError(f"prompt id {prompt_id!r} occurs twice in the pool; give each prompt an id of its own")
        seen.add(prompt_id)


def _check_records(prompt_ids: Sequence[str], records: Mapping[str, Score]) -> None:
    """Every prompt has a record, every record a prompt, and all scores are finite and on the same validation sets."""
    missing = [prompt_id for prompt_id in prompt_ids if prompt_id not in records]
    if missing:
        raise InputError(
            f"prompt {missing[0]!r} has no record in the scores or rollouts ({len(missing)} of {len(prompt_ids)} have none); "
            "give those of the whole pool, every shard of it"
        )
    pool = set(prompt_ids)
    unknown = [prompt_id for prompt_id in records if prompt_id not in pool]
    if unknown:
        raise InputError(
            f"prompt {unknown[0]!r} of the scores or rollouts is not in the pool ({len(unknown)} of {len(records)} are not); "
            "give the prompts file that they were made from"
        )
    first: tuple[str, set[str]] | None = None
    for prompt_id in prompt_ids:
        scores = records[prompt_id].scores
        if scores is None:
            continue
        if not scores:
            raise InputError(f"scores of prompt {prompt_id!r} name no validation set; score it against at least one")
        for name, value in scores.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(
                    f"score of prompt {prompt_id!r} on validation set {name!r} is {value}, not a finite number; "
                    "score it again, or give null for all its scores to leave it out"
                )
        if first is None:
            first = prompt_id, set(scores)
        elif set(scores) != first[1]:
            raise InputError(
                f"prompts {first[0]!r} and {prompt_id!r} are scored on different validation sets "
                f"({', '.join(sorted(first[1]))} and {', '.join(sorted(scores))}); score all prompts on the same sets"
            )
