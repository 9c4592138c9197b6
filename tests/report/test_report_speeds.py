"""Speed-ups: what their intervals hold, what is censored, and the null beside them."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_run as synthetic
from numpy.typing import NDArray

from cropi_tools.report.page import page
from cropi_tools.report.run import compare_runs
from cropi_tools.report.speeds import (
    SMOOTH_FROM,
    Curves,
    crossing,
    factors,
    late_accuracy,
    null_of,
    paired_bootstrap,
    speed,
)
from cropi_tools.report.tables import as_json, print_tables

Floats = NDArray[np.float64]


def curves(values: Any, step: float = 10.0) -> Curves:
    found = np.atleast_2d(np.array(values, dtype=np.float64))
    at = np.broadcast_to(step * np.arange(found.shape[1]), found.shape)
    return Curves(found, at, at)


def test_late_accuracy_by_hand() -> None:
    assert late_accuracy(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9])) == pytest.approx(2.0 / 3)
    assert late_accuracy(np.array([0.1, 0.2, 0.3, 0.4, 0.6])) == pytest.approx(0.5)  # the last half of four
    assert late_accuracy(np.array([0.1, 0.5])) == 0.5


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean of three where there are many evaluations; the ends average what they have."""
    if len(values) < SMOOTH_FROM:
        return list(values)
    return [statistics.fmean(values[max(0, index - 1) : index + 2]) for index in range(len(values))]


def first_crossing(positions: Sequence[float], values: Sequence[float], threshold: float) -> float | None:
    """Where a curve first reaches the threshold, by linear interpolation between its points; None if it never does."""
    for index, value in enumerate(values):
        if value >= threshold:
            if index == 0:
                return positions[0]
            before = values[index - 1]
            share = (threshold - before) / (value - before)
            return positions[index - 1] + share * (positions[index] - positions[index - 1])
    return None


def test_crossing_is_the_first_and_interpolated() -> None:
    positions, values = [0, 10, 20, 30], [0.1, 0.3, 0.2, 0.5]
    assert first_crossing(positions, values, 0.2) == pytest.approx(5)
    assert first_crossing(positions, values, 0.4) == pytest.approx(20 + 10 * 2 / 3)
    assert first_crossing(positions, values, 0.6) is None
    assert first_crossing(positions, values, 0.1) == 0
    # A plateau (selection is being paid for) is crossed where it begins.
    assert first_crossing([0, 10, 50, 60], [0.1, 0.3, 0.3, 0.5], 0.3) == 10


def test_smoothing_only_with_many_points() -> None:
    assert smoothed([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    values = [float(index % 2) for index in range(12)]
    naive = []
    for index in range(12):
        near = [values[other] for other in range(12) if abs(other - index) <= 1]
        naive.append(sum(near) / len(near))
    assert smoothed(values) == pytest.approx(naive)


def test_crossings_and_smoothing_are_those_of_the_plain_functions() -> None:
    generator = np.random.default_rng(2)
    for points in (3, 11, 12, 20):
        values = np.cumsum(generator.normal(0.1, 0.3, (1, points)), axis=1)
        ready = np.cumsum(generator.uniform(1, 2, (1, 2 * points)), axis=1)
        found = Curves(values, ready[:, ::2], ready[:, 1::2]).of(np.ones((1, 1)))
        plain = smoothed(values[0].tolist())
        assert found.values[0] == pytest.approx(plain)
        positions = [float(cost) for cost in ready[0]]
        heights = [value for value in plain for _ in range(2)]
        for goal in (-1.0, 0.2, 0.7, 5.0):
            expected = first_crossing(positions, heights, goal)
            if heights[0] >= goal:
                expected = 0.0
            got = crossing(found, np.array([goal]))[0]
            assert math.isnan(got) if expected is None else got == pytest.approx(expected)


def test_a_factor_is_censored_on_either_side() -> None:
    never, early, late = curves([0.1, 0.1, 0.1]), curves([0.1, 0.5, 0.5]), curves([0.1, 0.1, 0.5])
    start = curves([0.6, 0.6, 0.6])
    goal = np.array([0.5])

    def of(ours: Curves, theirs: Curves) -> Any:
        return factors(ours, theirs, goal)[0]

    assert of(early, late)[:2] == (2, 2)
    assert of(never, early)[:2] == (0, 0.5)  # more than 20 steps against 10
    assert of(early, never)[:2] == (2, math.inf)
    assert of(never, never)[:2] == (0, math.inf)
    assert of(start, late)[:2] == (math.inf, math.inf)
    assert of(late, start)[:2] == (0, 0)
    assert of(start, start).at_start
    assert of(start, start).exact is None


def run_of(
    seeds: int, points: int, shape: Callable[[Floats], Floats], wobble: float, noise: float
) -> Callable[[Any], Curves]:
    """A maker of arms that differ by nothing but chance: learning curves whose height varies by seed, read off with noise."""
    time = np.linspace(0, 1, points)

    def make(generator: np.random.Generator) -> Curves:
        height = 1 + wobble * generator.standard_normal((seeds, 1))
        return curves(0.4 + 0.2 * height * shape(time) + noise * generator.standard_normal((seeds, points)))

    return make


SHAPES: dict[str, Callable[[Floats], Floats]] = {
    "rising": lambda time: time,
    "flattening": lambda time: 1 - np.exp(-3 * time),
    "flat": lambda time: 1 - np.exp(-8 * time),
}


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_identical_arms_have_one_in_the_interval(shape: str, threshold: float | None) -> None:
    trials, generator = 100, np.random.default_rng(7)
    held, count = 0, 0
    for seeds, points, wobble, noise in ((5, 11, 0.1, 0.01), (5, 21, 0.3, 0.02), (8, 11, 0.0, 0.02)):
        make = run_of(seeds, points, SHAPES[shape], wobble, noise)
        for _ in range(trials):
            low, high = paired_bootstrap(make(generator), make(generator), threshold)
            held += low <= 1 <= high
            count += 1
    assert held / count >= 0.9


def test_a_real_speed_up_excludes_one_and_the_null_is_around_it() -> None:
    generator, found = np.random.default_rng(1), []
    for _ in range(50):
        full = run_of(5, 11, SHAPES["rising"], 0.05, 0.005)(generator)
        twice = run_of(5, 11, lambda time: 2 * time, 0.05, 0.005)(generator)
        value = speed(twice, full, list("12345"), "full", None, null_of(full, None))
        assert value.interval is not None
        assert value.null is not None
        assert value.null.low is not None
        assert value.null.high is not None
        assert value.null.pairs == 20
        assert value.null.low <= 1 <= value.null.high
        found.append((value.interval[0] > 1, value.interval[0] <= 2 <= value.interval[1]))
    excluded, held = np.mean(found, axis=0)
    assert excluded == 1
    assert held >= 0.8


def test_one_threshold_for_all_seeds() -> None:
    """A seed that ends low is not asked less than the others: it did not reach what the arm is asked."""
    full = curves([[0.1, 0.3, 0.5], [0.1, 0.2, 0.3]])
    fast = curves([[0.1, 0.5, 0.5], [0.1, 0.5, 0.5]])
    value = speed(fast, full, ["1", "2"], "full", None, None)
    assert value.threshold == pytest.approx(0.4)
    assert value.by_seed["1"].exact == pytest.approx(15 / 7.5)
    assert value.by_seed["2"][:2] == (pytest.approx(20 / 7.5), math.inf)


def shown(folder: Path, **asked: Any) -> tuple[str, dict[str, Any]]:
    comparison = compare_runs([folder], **asked)
    stream = io.StringIO()
    print_tables(comparison, stream)
    return stream.getvalue(), json.loads(json.dumps(as_json(comparison), allow_nan=False))


def test_the_null_is_beside_every_speed_up(whole_run: Path) -> None:
    text, figures = shown(whole_run)
    assert "null: full, seed against seed" in text
    assert "null: full, seed against seed" in page(compare_runs([whole_run]))
    for arm in ("random", "cropi"):
        for unit in ("steps", "seconds", "tokens"):
            assert figures["arms"][arm]["speed"][unit]["null"]["pairs"] == 6
            assert figures["arms"][arm]["speed"][unit]["threshold_chosen"] == "after the fact"


def test_a_threshold_at_the_start_is_reached_there(whole_run: Path) -> None:
    text, figures = shown(whole_run, threshold=0.3)
    assert "at the start" in text
    assert "not reached" not in text
    steps = figures["arms"]["cropi"]["speed"]["steps"]
    assert (steps["needed"], steps["ratio"], steps["in_words"]) == (0, None, "at the start")
    assert steps["threshold_chosen"] == "beforehand"
    assert set(steps["seeds"].values()) == {"both at the start"}
    assert "starts at or above 30.0 %" in figures["summary"]


def test_an_arm_that_starts_there_while_the_reference_does_not(run_folder: Path) -> None:
    synthetic.write_run(run_folder)
    for path in (run_folder / "cropi").rglob("evaluations.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        synthetic.write_lines(path, [{**line, "accuracy": 0.9} for line in lines])
    steps = shown(run_folder)[1]["arms"]["cropi"]["speed"]["steps"]
    assert (steps["needed"], steps["ratio"], steps["in_words"]) == (0, None, "at the start")
    assert set(steps["seeds"].values()) == {"at the start"}
    assert steps["interval"] is None


def test_a_threshold_that_nobody_reaches(whole_run: Path) -> None:
    text, figures = shown(whole_run, threshold=0.99)
    steps = figures["arms"]["cropi"]["speed"]["steps"]
    assert steps["in_words"] == "not reached"
    assert steps["open"] == ["low", "high"]
    assert set(steps["seeds"].values()) == {"neither reached"}
    assert "anything" in text


def test_one_seed_says_that_it_has_neither_interval_nor_null(run_folder: Path) -> None:
    text, figures = shown(synthetic.write_run(run_folder, seeds=["1"]))
    assert "1 seed: no interval" in text
    assert "1 seed: no null" in text
    steps = figures["arms"]["cropi"]["speed"]["steps"]
    assert (steps["interval"], steps["null"]) == (None, None)
    assert figures["arms"]["cropi"]["target"]["interval"] is not None


def test_a_reference_that_does_not_rise_is_said(run_folder: Path) -> None:
    synthetic.write_run(run_folder)
    for path in (run_folder / "full").rglob("evaluations.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        synthetic.write_lines(path, [{**line, "accuracy": 0.5} for line in lines])
    figures = shown(run_folder)[1]
    assert any("full does not rise above its start" in note for note in figures["notes"])
    assert figures["arms"]["cropi"]["speed"] == {}
    assert shown(run_folder, threshold=0.55)[1]["arms"]["cropi"]["speed"]["steps"]["needed"] > 0


def test_what_is_missing_is_said(run_folder: Path) -> None:
    synthetic.write_run(run_folder, seeds=["1", "2", "3"])
    (run_folder / "random" / "3").rename(run_folder / "random" / "4")
    for path in (run_folder / "full/2").rglob("evaluations.jsonl"):
        path.write_text("")
    path = run_folder / "cropi/1/1/policy/evaluations.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] != 10]
    path.write_text("".join(kept))
    notes = shown(run_folder)[1]["notes"]
    assert any("cropi: seed 3, 4 is not in both this arm and random" in note for note in notes)
    assert any("full: seed 2 was never evaluated" in note for note in notes)
    assert any("cropi: not every counted seed was evaluated at step 10" in note for note in notes)


def test_accuracies_of_zero_and_one_are_no_points(run_folder: Path) -> None:
    synthetic.write_run(run_folder, seeds=["1"])
    for path in run_folder.rglob("evaluations.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        synthetic.write_lines(path, [{**line, "accuracy": 0.0, "prompts": 30, "samples": 8} for line in lines])
    figures = shown(run_folder)[1]["arms"]["cropi"]["target"]
    assert figures["mean"] == 0
    # two sets of 30 prompts: each up to .1135
    assert figures["interval"] == pytest.approx([0, 0.1135 / math.sqrt(2)], abs=1e-3)
    assert figures["error_at_least"] > 0.01
