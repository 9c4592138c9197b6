"""Half against half on simulated pools whose truth, and so every figure, is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from halves_stores import halves_store
from scipy import stats

from cropi_tools.cli.score import score
from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError
from cropi_tools.scores.options import ScoreOptions
from cropi_tools.scores.rank_metrics import precision_at, spearman
from cropi_tools.scores.reliability import as_json, as_table, attainable, measure, normal_precision


def pool(count: int, signal: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truth [count] and two noisy halves [count, 2] whose correlation is signal^2 / (signal^2 + 1)."""
    draw = np.random.default_rng(seed)
    truth = signal * draw.normal(size=count)
    return truth, truth[:, None] + draw.normal(size=(count, 2))


def ranked(correlation: float) -> float:
    """The Spearman correlation of normal values with this correlation."""
    return 6 / math.pi * math.asin(correlation / 2)


@pytest.mark.parametrize("signal", [0.5, 1.0, 3.0])
def test_a_pool_of_known_signal_to_noise(tmp_path: Path, signal: float) -> None:
    """Everything told is near its theory, and the expectations near what the truth, which only the test knows, gives."""
    truth, halves = pool(4000, signal)
    found = measure([halves_store(tmp_path / "s.zarr", halves)]).sets[0]
    r = signal**2 / (signal**2 + 1)
    assert found.spearman is not None
    assert found.precision is not None
    assert found.one_half is not None
    assert found.whole is not None
    assert found.spearman.value == spearman(halves[:, 0], halves[:, 1])
    assert found.precision.value == precision_at(halves[:, 0], halves[:, 1])
    assert (found.prompts, found.by_chance, found.in_words) == (4000, 0.1, None)
    # 4000 prompts: standard errors up to .016 of a correlation, .024 of a precision of 400
    assert found.spearman.value == pytest.approx(ranked(r), abs=0.05)
    assert found.spearman.low < ranked(r) < found.spearman.high
    assert found.one_half[0] == pytest.approx(ranked(math.sqrt(r)), abs=0.05)
    assert found.whole[0] == pytest.approx(ranked(math.sqrt(2 * r / (1 + r))), abs=0.05)
    both = halves.mean(axis=1)
    for expected, ranking in ((found.one_half, halves[:, 0]), (found.whole, both)):
        assert expected[0] == pytest.approx(spearman(ranking, truth), abs=0.05)
        assert expected[1] == pytest.approx(precision_at(ranking, truth), abs=0.08)
    # a ranking with no noise of its own cannot pass the bound by more than its sampling error
    assert spearman(truth, halves[:, 1]) <= found.one_half[0] + 0.05
    # and no half does as well as it, nor as well as both together
    assert found.spearman.value < found.one_half[0] < found.whole[0]


@pytest.mark.parametrize(("ranks_of", "r"), [(ranked(0.5), 0.5), (ranked(0.04), 0.04), (1.0, 1.0)])
def test_what_follows_from_a_correlation(ranks_of: float, r: float) -> None:
    one_half, whole = attainable(ranks_of)
    assert one_half == pytest.approx(ranked(math.sqrt(r)), abs=1e-12)
    assert whole == pytest.approx(ranked(math.sqrt(2 * r / (1 + r))), abs=1e-12)


@pytest.mark.parametrize("correlation", [0.0, 0.2, 0.7, 0.95, 0.999, 1.0])
def test_precision_of_normal_values(correlation: float) -> None:
    """Against the closed form at one half, and scipy's bivariate normal at one tenth."""
    rho = 2 * math.sin(math.pi * correlation / 6)
    assert normal_precision(correlation, 0.5) == pytest.approx(0.5 + math.asin(min(rho, 1.0)) / math.pi, abs=2e-4)
    if correlation < 1.0:
        cut = stats.norm.isf(0.1)
        both = stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([-cut, -cut])
        assert normal_precision(correlation, 0.1) == pytest.approx(both / 0.1, abs=2e-4)


def test_a_cosine_divides_by_the_norms_of_the_halves(tmp_path: Path) -> None:
    """Where norms differ by orders of magnitude, inner products rank by them: a false agreement that cosines do not have."""
    _, halves = pool(400, 1.0)
    draw = np.random.default_rng(1)
    norms = np.exp(3 * draw.normal(size=(400, 1))) * np.exp(0.1 * draw.normal(size=(400, 2)))
    store = halves_store(tmp_path / "s.zarr", halves * norms, norms)
    by_default, cosine, dot = measure([store]), measure([store], "cosine"), measure([store], "dot")
    assert by_default == cosine
    assert cosine.similarity == "cosine"
    assert cosine.sets[0].spearman is not None
    assert dot.sets[0].spearman is not None
    assert cosine.sets[0].spearman.value == pytest.approx(spearman(*halves.T), abs=1e-12)
    assert dot.sets[0].spearman.value == pytest.approx(spearman(*(halves * norms).T), abs=1e-12)
    assert abs(dot.sets[0].spearman.value - cosine.sets[0].spearman.value) > 0.02


def test_prompts_with_one_half_do_not_count(tmp_path: Path) -> None:
    _, halves = pool(60, 1.0)
    parts = [
        halves_store(tmp_path / "a.zarr", halves[:30], missing=[3, 4, 5], dead=4),
    ]
    found = measure(parts)
    assert (found.prompts, found.live, found.sets[0].prompts) == (34, 30, 27)
    kept = np.delete(halves[:30], [3, 4, 5], axis=0)
    assert found.sets[0].spearman is not None
    assert found.sets[0].spearman.value == pytest.approx(spearman(*kept.T), abs=1e-12)
    # cropi-select takes a tenth of all 34 prompts, those without a gradient counted
    assert (found.selected, found.sets[0].by_chance) == (3, pytest.approx(3 / 27))


@pytest.mark.parametrize(
    ("ratio", "size"), [("0.1", 20), ("0.29", 58), ("0.005", 1), ("0.3", 60), ("0.4", 80), ("0.001", 0), ("1", 200)]
)
def test_precision_is_of_as_many_as_will_be_selected(tmp_path: Path, ratio: str, size: int) -> None:
    """Of 200 prompts, of which 80 have a gradient in both halves."""
    _, halves = pool(80, 1.0)
    store = halves_store(tmp_path / "s.zarr", halves, dead=120)
    found = measure([store], ratio=ratio)
    (one,) = found.sets
    assert (found.ratio, found.selected) == (ratio, size)
    assert one.by_chance == pytest.approx(min(1.0, size / 80))
    assert one.spearman is not None
    if 0 < size < 80:
        assert one.precision is not None
        tops = [set(np.argsort(-halves[:, half], kind="stable")[:size].tolist()) for half in (0, 1)]
        assert one.precision.value == pytest.approx(len(tops[0] & tops[1]) / size)
        assert one.precision.low <= one.precision.value <= one.precision.high
    else:
        assert one.precision is None
        assert one.in_words is not None
        assert "the ranking decides nothing here" in one.in_words
    assert f"precision@{size}" in as_table(found)
    json.dumps(as_json(found), allow_nan=False)


def test_expectations_of_cosines_are_called_upper_bounds(tmp_path: Path) -> None:
    _, halves = pool(100, 1.5)
    cosine = measure([halves_store(tmp_path / "c.zarr", halves, np.ones((100, 2)))])
    assert "against one half, at most" in as_table(cosine)
    assert "upper bounds" in as_table(cosine)
    assert "upper bounds" in as_json(cosine)["expected_in_words"]
    dot = measure([halves_store(tmp_path / "d.zarr", halves)])
    assert "against one half, expected" in as_table(dot)
    assert as_json(dot)["expected_in_words"] is None


def test_noise_alone_is_said_in_words(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    first = draw.normal(size=200)
    opposed = np.stack([first, draw.normal(size=200) - 0.3 * first], axis=1)
    found = measure([halves_store(tmp_path / "o.zarr", opposed)]).sets[0]
    assert found.in_words == "no ranking information found: one half says nothing about the other"
    assert found.one_half is found.whole is None
    assert found.spearman is not None
    assert found.spearman.value < 0
    # a little above zero by luck: the interval says so
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=(200, 2))
        if 0 < spearman(*noise.T) < 0.1:
            break
    lucky = measure([halves_store(tmp_path / "l.zarr", noise)]).sets[0]
    assert lucky.in_words is not None
    assert "cannot be told from chance" in lucky.in_words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ({"dead": 6}, "nothing to rank: none of the 6 prompts has samples of different rewards"),
        (
            {"dead": 6, "pass_rate": 1.0},
            "the pool is saturated: of 6 prompts the policy always solves 3 and never solves 3",
        ),
    ],
)
def test_pools_with_nothing_to_rank(tmp_path: Path, make: dict[str, Any], words: str) -> None:
    found = measure([halves_store(tmp_path / "s.zarr", np.empty((0, 2)), **make)])
    assert found.in_words is not None
    assert words in found.in_words
    assert found.in_words in as_table(found)
    assert json.loads(json.dumps(as_json(found)))["sets"] == []


def test_too_few_prompts_or_equal_scores(tmp_path: Path) -> None:
    few = measure([halves_store(tmp_path / "f.zarr", pool(21, 1.0)[1], missing=[0, 1])])
    assert few.sets[0].in_words is not None
    assert "too few prompts to say: 19 have a gradient in both halves, at least 20" in few.sets[0].in_words
    same = measure([halves_store(tmp_path / "e.zarr", np.zeros((30, 2)))])
    assert same.sets[0].in_words == "nothing to rank: all prompts have the same score"
    for found in (few, same):
        assert str(found.sets[0].in_words) in as_table(found)
        json.dumps(as_json(found), allow_nan=False)


def test_refusals(tmp_path: Path) -> None:
    _, halves = pool(30, 1.0)
    plain = halves_store(tmp_path / "plain.zarr", halves, mean={"norm": 1.0, "sha256": "x"})
    with pytest.raises(InputError, match=r"plain\.zarr: holds no halves to compare; cropi-grad --halves makes them"):
        measure([plain])
    forward = halves_store(tmp_path / "forward.zarr", halves)
    assert measure([forward]).similarity == "dot"
    with pytest.raises(InputError, match=r"forward\.zarr: its halves have no norms .*--similarity dot"):
        measure([forward], "cosine")


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(halves_store(tmp_path / "s.zarr", pool(100, 1.5)[1]).path)
    score(ScoreOptions(stores=(path,), reliability=True))
    table = capsys.readouterr().out
    assert "100 of 100 prompts have a gradient" in table
    for words in ("half against half", "by chance", "a perfect estimator against one half", "against the truth"):
        assert words in table
    score(ScoreOptions(stores=(path,), reliability=True, as_json=True))
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(json.dumps(as_json(measure([Store(path)]))))
    assert said["sets"][0]["spearman"]["value"] > 0


def test_a_pool_of_groups_is_told_from_a_normal_one(tmp_path: Path) -> None:
    """A tenth of the prompts stands apart, so the top tenth is found again far better than the correlation tells."""
    _, halves = pool(1000, 0.7)
    assert measure([halves_store(tmp_path / "normal.zarr", halves)]).sets[0].in_words is None
    halves[:100] += 6.0
    found = measure([halves_store(tmp_path / "groups.zarr", halves)]).sets[0]
    assert found.precision is not None
    assert found.one_half is not None
    assert found.precision.value > 0.9 > found.one_half[1]
    assert found.in_words is not None
    assert "groups or heavy tails" in found.in_words
