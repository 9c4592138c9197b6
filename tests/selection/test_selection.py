"""Selection: merges worked by hand, a naive twin, and invariance to the order of the files."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.selection.rules import (
    RULES,
    Score,
    Selected,
    check_ratio,
    least_ratio,
    permutation,
    select,
    selection_size,
    tie_key,
)


def make_scores(
    table: Mapping[str, Mapping[str, float] | None], rates: Mapping[str, float | None] | None = None
) -> dict[str, Score]:
    rates = rates or {}
    return {
        name: Score(name, "source", scores, rates.get(name, 0.5), "zero-advantage" if scores is None else "ok")
        for name, scores in table.items()
    }


def ids(selected: list[Selected]) -> list[str]:
    return [one.id for one in selected]


def by_key(names: list[str], seed: int) -> list[str]:
    """An order by key got by repeatedly taking the smallest, apart from the library's sorting."""
    left, order = set(names), []
    while left:
        smallest = min(left, key=lambda name: tie_key(seed, name))
        left.remove(smallest)
        order.append(smallest)
    return order


# selection_size


@pytest.mark.parametrize(
    ("ratio", "population", "size"),
    [
        ("0.29", 100, 29),  # 0.29 * 100 is 28.999999999999996 in floats
        ("0.1", 4473, 447),
        ("0.57", 100, 57),
        ("1.1e-1", 100, 11),
        ("1", 7, 7),
        ("1.000", 7, 7),
        ("0.999", 7, 6),
        ("0.1", 9, 0),
        ("0.1", 0, 0),
        ("0." + "3" * 60, 3, 0),
        ("0." + "9" * 60, 10**9, 10**9 - 1),  # more digits than the default decimal precision
        ("1e-999999", 10**12, 0),
        (Decimal("0.29"), 100, 29),
        (Decimal("1"), 3, 3),
    ],
)
def test_selection_size(ratio: str | Decimal, population: int, size: int) -> None:
    assert selection_size(ratio, population) == size


@given(st.integers(1, 10**6), st.integers(0, 10**7))
def test_selection_size_matches_integer_division(millionths: int, population: int) -> None:
    assert selection_size(f"{millionths // 10**6}.{millionths % 10**6:06d}", population) == (
        millionths * population // 10**6
    )


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1.0001", "10%", "", "nan", "inf", "-inf", "sNaN", "one"])
def test_selection_size_refuses(ratio: str) -> None:
    with pytest.raises(UsageError, match="ratio") as caught:
        selection_size(ratio, 10)
    assert "\n" not in str(caught.value)


# tie_key


def test_tie_key_is_what_b2sum_prints() -> None:
    # printf '7:p1' | b2sum -l 64
    assert tie_key(7, "p1") == 0xB8DAADEA3A34867A
    assert tie_key(-3, "naïve") == 0x616718440BAA8B4D


def test_tie_key_tells_seeds_and_ids_apart() -> None:
    pairs = [(seed, str(name)) for seed in (0, 1, 11) for name in (0, 1, 10, 11)]
    assert len({tie_key(*pair) for pair in pairs}) == len(pairs)
    assert 0 <= tie_key(0, "\ud800") < 2**64


# influence, by hand


def test_two_sets_merge_by_reciprocal_ranks() -> None:
    # N = 3 of 6.  x: a b c | d e f    y: c e a | b d f    (the bar ends the top 3)
    # a: 1/1 + 1/3 = 4/3   b: 1/2   c: 1/3 + 1/1 = 4/3   e: 1/2 (from y; 5th in x does not count)   d, f: none
    table = {
        "a": {"x": 0.9, "y": 0.5},
        "b": {"x": 0.8, "y": 0.4},
        "c": {"x": 0.7, "y": 0.9},
        "d": {"x": 0.6, "y": 0.3},
        "e": {"x": 0.5, "y": 0.8},
        "f": {"x": -0.9, "y": -0.5},
    }
    orders = set()
    for seed in range(40):
        got = select("influence", list(table), make_scores(table), "0.5", seed, None)
        first = sorted(["a", "c"], key=lambda name: tie_key(seed, name))
        third = min(["b", "e"], key=lambda name: tie_key(seed, name))
        assert got == [
            Selected(first[0], 1, table[first[0]], 4 / 3),
            Selected(first[1], 2, table[first[1]], 4 / 3),
            Selected(third, 3, table[third], 0.5),
        ]
        orders.add(tuple(ids(got)))
    assert len(orders) == 4  # both ties fall both ways over the seeds


def test_one_set_is_ranked_as_it_is() -> None:
    table = {"a": {"x": -0.2}, "b": {"x": 0.3}, "c": {"x": 0.1}, "d": {"x": -0.4}}
    got = select("influence", list(table), make_scores(table), "0.75", 0, None)
    assert got == [Selected(name, rank, table[name], 1 / rank) for rank, name in enumerate("bca", start=1)]


def test_reciprocal_ranks_are_summed_exactly() -> None:
    # left stands at 2, 3, 6 in x, y, z and right at 3, 6, 2: both sums are 1, but in floats they differ.
    assert 1 / 2 + 1 / 3 + 1 / 6 != 1 / 3 + 1 / 6 + 1 / 2
    lines = {
        "x": ["a", "left", "right", "b", "c", "d"],
        "y": ["a", "b", "left", "c", "d", "right"],
        "z": ["a", "right", "b", "c", "d", "left"],
    }
    table: dict[str, dict[str, float]] = {
        name: {on: -1.0 * line.index(name) for on, line in lines.items()} for name in lines["x"]
    }
    firsts = set()
    for seed in range(20):
        got = [one for one in select("influence", list(table), make_scores(table), "1", seed) if "t" in one.id]
        assert [one.reciprocal_rank for one in got] == [1.0, 1.0]
        assert ids(got) == by_key(["left", "right"], seed)
        firsts.add(got[0].id)
    assert firsts == {"left", "right"}


def test_merge_may_drop_the_top_of_a_set() -> None:
    # N = 1: a leads x, b leads y, c leads z and w: 2/1 beats 1/1.
    table = {
        "a": {"x": 1.0, "y": 0.0, "z": 0.0, "w": 0.0},
        "b": {"x": 0.0, "y": 1.0, "z": 0.0, "w": 0.0},
        "c": {"x": 0.0, "y": 0.0, "z": 1.0, "w": 1.0},
    }
    for seed in range(10):
        assert select("influence", list(table), make_scores(table), "0.34", seed) == [Selected("c", 1, table["c"], 2.0)]


def test_size_counts_the_pool_and_only_live_prompts_are_selected() -> None:
    table = {"a": {"x": -0.5}, "b": None, "c": {"x": -0.1}, "d": None, "e": None, "f": {"x": -0.3}}
    for by in ("influence", "shuffled"):
        assert len(select(by, list(table), make_scores(table), "0.34", 0)) == 2  # of 6, not of the 3 live
        assert len(select(by, list(table), make_scores(table), "1", 0)) == 3
    assert set(ids(select("influence", list(table), make_scores(table), "1", 0))) == {"a", "c", "f"}
    assert ids(select("influence", list(table), make_scores(table), "0.34", 0)) == ["c", "f"]


def test_a_zero_is_a_score_and_signed_zeros_tie() -> None:
    table = {"a": {"x": 0.0}, "b": {"x": -0.0}, "c": {"x": -1e-300}}
    for seed in range(10):
        got = ids(select("influence", list(table), make_scores(table), "1", seed))
        assert got == [*by_key(["a", "b"], seed), "c"]


def test_nothing_to_select() -> None:
    table = {"a": {"x": 0.1}, "b": {"x": 0.2}}
    for by in RULES:
        assert select(by, [], {}, "0.5", 0) == []
        if by != "full":
            assert select(by, ["a", "b"], make_scores(table), "0.4", 0) == []
    assert select("influence", ["a", "b"], make_scores({"a": None, "b": None}), "1", 0) == []


# a naive twin

# few distinct values, so that ties are the rule
values = st.sampled_from([-0.5, -0.25, 0.0, 0.1, math.nextafter(0.1, 1.0), 0.5])
shares = st.integers(1, 20).map(lambda twentieths: str(Decimal(twentieths) / 20))


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[str], dict[str, Score]]:
    names = [f"p{number}" for number in range(draw(st.integers(1, 14)))]
    sets = [f"v{number}" for number in range(draw(st.integers(1, 4)))]
    records = {}
    for name in names:
        live = draw(st.integers(0, 4)) > 0
        scores = {on: draw(values) for on in sets} if live else None
        rate = draw(st.one_of(st.none(), st.integers(0, 10).map(lambda tenths: tenths / 10)))
        records[name] = Score(name, "s", scores, rate, "ok" if live else "zero-advantage")
    return names, records


def naive_influence(names: list[str], records: dict[str, Score], size: int, seed: int) -> list[tuple[str, float]]:
    """Ranks by counting who is ahead, sums over a common denominator, selection by repeated comparison."""
    live: dict[str, dict[str, float]] = {}
    for name in names:
        found = records[name].scores
        if found is not None:
            live[name] = dict(found)
    unit = math.lcm(*range(1, len(names) + 1))
    points = {name: 0 for name in live}
    for name, scores in live.items():
        for on, value in scores.items():
            ahead = 0
            for rival, theirs in live.items():
                if rival == name:
                    continue
                tied = theirs[on] == value
                ahead += theirs[on] > value or (tied and tie_key(seed, rival) < tie_key(seed, name))
            if ahead < size:
                points[name] += unit // (ahead + 1)
    chosen: list[tuple[str, float]] = []
    for _ in range(size):
        best = None
        for name, sum_of_ranks in points.items():
            if sum_of_ranks == 0 or any(name == one for one, _ in chosen):
                continue
            if (
                best is None
                or sum_of_ranks > points[best]
                or (sum_of_ranks == points[best] and tie_key(seed, name) < tie_key(seed, best))
            ):
                best = name
        if best is not None:
            chosen.append((best, points[best] / unit))
    return chosen


@settings(max_examples=300, deadline=None)
@given(pools(), shares, st.integers(-5, 2**40))
def test_influence_equals_the_naive_twin(pool: tuple[list[str], dict[str, Score]], ratio: str, seed: int) -> None:
    names, records = pool
    size = round(Decimal(ratio) * 20) * len(names) // 20
    got = select("influence", names, records, ratio, seed)
    assert [(one.id, one.reciprocal_rank) for one in got] == naive_influence(names, records, size, seed)
    assert all(one.score == records[one.id].scores for one in got)
    assert [one.rank for one in got] == list(range(1, len(got) + 1))
    assert len(got) == min(size, sum(record.scores is not None for record in records.values()))


@settings(max_examples=200, deadline=None)
@given(pools(), shares, st.integers(0, 9), st.randoms(use_true_random=False), st.sampled_from(RULES))
def test_order_of_the_files_does_not_matter(
    pool: tuple[list[str], dict[str, Score]], ratio: str, seed: int, shuffler: random.Random, by: str
) -> None:
    names, records = pool
    expected = select(by, names, records, ratio, seed)
    other_names, other_records = list(names), list(records.items())
    shuffler.shuffle(other_names)
    shuffler.shuffle(other_records)
    turned = {}
    for name, one in other_records:
        scores = None if one.scores is None else dict(reversed(list(one.scores.items())))
        turned[name] = Score(name, one.source, scores, one.pass_rate, one.status)
    if by == "full":
        expected = [Selected(name, rank, None) for rank, name in enumerate(other_names, start=1)]
    assert select(by, other_names, turned, ratio, seed) == expected


# the shuffled control


@settings(max_examples=100, deadline=None)
@given(pools(), shares, st.integers(0, 99), st.randoms(use_true_random=False))
def test_shuffled_is_influence_with_the_pool_permuted(
    pool: tuple[list[str], dict[str, Score]], ratio: str, seed: int, shuffler: random.Random
) -> None:
    names, records = pool
    moved = permutation(names, seed)
    assert set(moved) == set(moved.values()) == set(names)
    assert permutation(shuffler.sample(names, len(names)), seed) == moved
    expected = [
        Selected(moved[one.id], one.rank, one.score, one.reciprocal_rank)
        for one in select("influence", names, records, ratio, seed)
    ]
    assert select("shuffled", names, records, ratio, seed) == expected


def test_every_permutation_comes_up_about_as_often() -> None:
    seen = Counter(tuple(permutation("abc", seed)[name] for name in "abc") for seed in range(6000))
    assert len(seen) == 6
    # chi-square with 5 degrees of freedom: 20.5 is exceeded once in a thousand; the seeds are fixed
    assert sum((count - 1000) ** 2 / 1000 for count in seen.values()) < 20.5


@settings(max_examples=100, deadline=None)
@given(st.data(), shares, st.integers(0, 99))
def test_shuffled_selections_of_two_stages_overlap_as_those_of_influence(
    data: st.DataObject, ratio: str, seed: int
) -> None:
    """Whatever changes between the stages: scores, and who has one at all."""
    names, first = data.draw(pools())
    values = st.none() | st.integers(-3, 3).map(float)
    drawn = {name: data.draw(values) for name in names}
    second = make_scores({name: None if value is None else {"x": value} for name, value in drawn.items()})
    found = [
        [set(ids(select(by, names, stage, ratio, seed))) for stage in (first, second)]
        for by in ("influence", "shuffled")
    ]
    (one, two), (shuffled_one, shuffled_two) = found
    assert len(shuffled_one & shuffled_two) == len(one & two)
    assert (len(shuffled_one), len(shuffled_two)) == (len(one), len(two))


def test_a_known_overlap_of_two_stages_stays() -> None:
    """Of twenty prompts selected, seven are again; ten that have a score at one stage have none at the other."""
    names = [f"p{number}" for number in range(200)]
    first = {name: None if number < 10 else {"x": float(number)} for number, name in enumerate(names)}
    again = set(range(180, 187))
    second = {
        name: None if 10 <= number < 20 else {"x": float(number in again) + float(100 <= number < 113)}
        for number, name in enumerate(names)
    }
    for seed in range(5):
        stages = [select("shuffled", names, make_scores(table), "0.1", seed) for table in (first, second)]
        assert len(set(ids(stages[0])) & set(ids(stages[1]))) == 7
        influence = select("influence", names, make_scores(first), "0.1", seed)
        assert len(set(ids(stages[0])) & set(ids(influence))) < 10


def test_shuffled_selects_regardless_of_the_score() -> None:
    table: dict[str, dict[str, float] | None] = {f"p{number}": {"x": float(number)} for number in range(50)}
    records = make_scores(table)
    top = set(ids(select("influence", list(table), records, "0.2", 0)))
    assert top == {f"p{number}" for number in range(40, 50)}
    overlaps = [len(top & set(ids(select("shuffled", list(table), records, "0.2", seed)))) for seed in range(200)]
    # hypergeometric: mean 2, standard deviation of one draw 1.14, of the mean .081
    assert abs(sum(overlaps) / 200 - 2) < 0.33


# the other baselines


def test_random_takes_the_smallest_keys_of_the_whole_pool() -> None:
    names = [f"p{number}" for number in range(30)]
    expected = [Selected(name, rank, None) for rank, name in enumerate(by_key(names, 3)[:6], start=1)]
    assert select("random", names, None, "0.2", 3) == expected
    dead = make_scores(dict.fromkeys(names, None), dict.fromkeys(names, None))
    assert select("random", names, dead, "0.2", 3) == expected
    assert ids(select("random", names, None, "0.2", 4)) != ids(expected)


def test_random_is_uniform_over_seeds() -> None:
    names = [f"p{number}" for number in range(10)]
    counts = Counter(name for seed in range(2000) for name in ids(select("random", names, None, "0.3", seed)))
    # each prompt: mean 600, standard deviation 20.5
    assert all(abs(counts[name] - 600) < 4.5 * 20.5 for name in names)


def test_learnability_ties_p_with_its_mirror_image() -> None:
    assert 0.3 * (1 - 0.3) != 0.7 * (1 - 0.7)
    rates: dict[str, float | None] = {"a": 0.3, "b": 0.7, "c": 0.5, "d": 0.1, "e": 0.0, "f": 1.0, "g": None}
    records = make_scores(dict.fromkeys(rates, None), rates)
    orders = set()
    for seed in range(20):
        got = select("learnability", list(rates), records, "1", seed)
        assert ids(got) == ["c", *by_key(["a", "b"], seed), "d", *by_key(["e", "f"], seed)]
        assert [one.score for one in got] == [0.25, 0.21, 0.21, 0.09, 0.0, 0.0]
        orders.add(got[1].id)
    assert orders == {"a", "b"}
    assert ids(select("learnability", list(rates), records, "0.15", 0)) == ["c"]


def test_pass_rate_draws_at_random_inside_the_band() -> None:
    rates: dict[str, float | None] = {f"p{k}": k / 10 for k in range(11)} | {"none": None}
    records = make_scores(dict.fromkeys(rates, None), rates)
    inside = [f"p{k}" for k in range(2, 9)]
    for seed in range(20):
        got = select("pass-rate", list(rates), records, "0.34", seed)
        expected = by_key(inside, seed)[:4]
        assert got == [Selected(name, rank, rates[name]) for rank, name in enumerate(expected, start=1)]
    assert set(ids(select("pass-rate", list(rates), records, "1", 0))) == set(inside)
    assert set(ids(select("pass-rate", list(rates), records, "1", 0, (0.3, 0.3)))) == {"p3"}
    assert len(select("pass-rate", list(rates), records, "1", 0, (0.0, 1.0))) == 11


def test_band_includes_rates_averaged_in_single_precision() -> None:
    single = {"low": 0.20000000298023224, "high": 0.800000011920929, "out": 0.8125}
    records = make_scores(dict.fromkeys(single, None), dict(single))
    assert set(ids(select("pass-rate", list(single), records, "1", 0))) == {"low", "high"}


def test_full_keeps_the_order_of_the_pool() -> None:
    assert select("full", ["b", "a", "c"], None, "0.1", 0) == [
        Selected("b", 1, None),
        Selected("a", 2, None),
        Selected("c", 3, None),
    ]


@settings(max_examples=100, deadline=None)
@given(pools(), st.integers(1, 12), st.integers(0, 9), st.sampled_from(sorted(set(RULES) - {"full"})))
def test_a_number_is_the_share_that_it_is(
    pool: tuple[list[str], dict[str, Score]], number: int, seed: int, by: str
) -> None:
    """Beyond the pool it is all that can be selected."""
    names, records = pool
    ratio = Decimal(min(number, len(names))) / len(names) + Decimal("1e-9") if names else Decimal(1)
    assert select(by, names, records, "1", seed, number=number) == select(
        by, names, records, min(ratio, Decimal(1)), seed
    )


# errors

GOOD: dict[str, dict[str, float] | None] = {"a": {"x": 0.1, "y": 0.2}, "b": {"x": 0.3, "y": 0.4}, "c": None}


def refused(kind: type[Exception], *parts: str, **changes: object) -> None:
    usual = {"by": "influence", "prompt_ids": list(GOOD), "scores": make_scores(GOOD), "ratio": "0.5", "seed": 0}
    with pytest.raises(kind) as caught:
        select(**(usual | changes))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("by", RULES)
def test_the_pool_and_the_scores_must_match(by: str) -> None:
    refused(InputError, "'missing'", "no record", by=by, prompt_ids=["a", "missing", "b", "c"])
    refused(InputError, "'c'", "not in the pool", by=by, prompt_ids=["a", "b"])
    refused(InputError, "'b'", "twice", by=by, prompt_ids=["a", "b", "b", "c"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.5"])
def test_scores_must_be_finite_numbers(value: float) -> None:
    refused(InputError, "'b'", "'y'", "finite", scores=make_scores(GOOD | {"b": {"x": 0.3, "y": value}}))


def test_records_must_agree_on_the_sets() -> None:
    for other in ({"x": 0.3}, {"x": 0.3, "z": 0.4}, {"x": 0.3, "y": 0.4, "z": 0.5}):
        refused(InputError, "'a'", "'b'", "different validation sets", scores=make_scores(GOOD | {"b": other}))
    refused(InputError, "'a'", "no validation set", scores=make_scores(GOOD | {"a": {}}))


@pytest.mark.parametrize("by", ["influence", "shuffled", "learnability", "hardest", "pass-rate"])
def test_rules_that_need_scores(by: str) -> None:
    refused(UsageError, by, "needs scores", by=by, scores=None)


@pytest.mark.parametrize("rate", [-0.125, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("by", ["learnability", "hardest", "pass-rate"])
def test_pass_rates_lie_between_0_and_1(by: str, rate: float) -> None:
    refused(InputError, "'b'", "pass rate", by=by, scores=make_scores(GOOD, {"b": rate}))


def test_usage_errors() -> None:
    refused(UsageError, "'best'", "learnability", by="best")
    refused(UsageError, "band", band=(0.2, 0.8))
    for band in [(0.8, 0.2), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5), (0.1, math.nan)]:
        refused(UsageError, "band", by="pass-rate", band=band)
    for by in RULES:
        refused(UsageError, "ratio", by=by, ratio="1.5")


def test_imports_nothing_heavy() -> None:
    program = (
        "import sys; before = set(sys.modules); import cropi_tools.selection.rules; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["cropi_tools"]


@pytest.mark.parametrize("population", [1, 2, 3, 7, 9, 10, 11, 99, 1000, 1001, 123457])
def test_the_least_ratio_selects_one(population: int) -> None:
    least = least_ratio(population)
    check_ratio(f"{least:f}", population)
    assert selection_size(least, population) == 1
    assert least - Decimal(1) / population < Decimal("0.01")


def test_a_ratio_that_selects_none_is_refused_with_one_that_does() -> None:
    with pytest.raises(UsageError, match=r"ratio 0\.1 of 3 prompts selects none.*give 0\.34 or more"):
        check_ratio("0.1", 3)
    with pytest.raises(UsageError, match=r"give 0\.0001 or more"):
        check_ratio("0.00001", 10000)
    check_ratio("0.1", 10)
    check_ratio("0.1", 0)  # an empty pool has a word of its own


def test_hardest_takes_the_lowest_pass_rates_and_ties_by_seed() -> None:
    rates = {"a": 0.5, "b": 0.0, "c": 0.25, "d": 0.0, "e": None, "f": 1.0}
    records = {name: Score(name, "s", None, rate, "ok") for name, rate in rates.items()}
    firsts = set()
    for seed in range(8):
        got = select("hardest", list(rates), records, "1", seed)
        assert {item.id for item in got[:2]} == {"b", "d"}
        assert [(item.id, item.score) for item in got[2:]] == [("c", 0.25), ("a", 0.5), ("f", 1.0)]
        firsts.add(got[0].id)
    assert firsts == {"b", "d"}
