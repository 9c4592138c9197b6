"""Runs of one seed each, joined, against one run of all these seeds; and every seed's points against the rules of the synthetic run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic_run as synthetic

from cropi_tools.report.comparison import compare
from cropi_tools.report.page import page
from cropi_tools.report.plots import curves
from cropi_tools.report.reading import joined, read_run
from cropi_tools.report.tables import as_json


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """The synthetic run cut into three, a seed each."""
    return [synthetic.write_run(tmp_path / f"part-{seed}", seeds=(seed,)) for seed in ("1", "2", "3")]


def test_joined_runs_say_what_one_run_of_all_seeds_says(split: list[Path], whole_run: Path) -> None:
    whole = as_json(compare([read_run(whole_run)]))
    parts = as_json(compare([joined([read_run(folder) for folder in split])]))
    names = {seed: f"part-{seed}/{seed}" for seed in ("1", "2", "3")}
    for arm, expected in whole["arms"].items():
        found = parts["arms"][arm]
        assert found["target"] == expected["target"]
        assert found["cost"]["mean_of_one_seed"] == expected["cost"]["mean_of_one_seed"]
        assert found["seeds"] == [names[seed] for seed in expected["seeds"]]
        assert {name: found["points"][names[name]] for name in names} == expected["points"]
        for unit, speed in expected["speed"].items():
            assert found["speed"][unit]["ratio"] == speed["ratio"]
            assert found["speed"][unit]["interval"] == speed["interval"]
        if expected["difference"]:
            assert found["difference"]["interval"] == expected["difference"]["interval"]
            assert found["difference"]["seeds_left_out"] == []


def test_each_seed_pays_for_the_first_stage_of_its_own_run(split: list[Path]) -> None:
    path = split[1] / "start" / "train.rollouts.jsonl.manifest.json"
    made = json.loads(path.read_text())
    made["ledger"]["seconds"] = 1000.0
    path.write_text(json.dumps(made))
    arms = as_json(compare([joined([read_run(folder) for folder in split])]))["arms"]
    sampling = {name: cost["sampling"]["seconds"] for name, cost in arms["cropi"]["cost"]["by_seed"].items()}
    assert sampling == {"part-1/1": 30.0, "part-2/2": 1000.0, "part-3/3": 30.0}
    points = arms["cropi"]["points"]
    assert points["part-2/2"]["seconds"]["ready"][0] - points["part-1/1"]["seconds"]["ready"][0] == 970.0


def test_a_joined_comparison_can_be_shown(split: list[Path]) -> None:
    comparison = compare([joined([read_run(folder) for folder in split])])
    assert curves(comparison).startswith(b"\x89PNG")
    shown = page(comparison, {})
    assert "part-3/" in shown


def test_points_are_what_was_evaluated_and_spent(whole_run: Path) -> None:
    points = as_json(compare([read_run(whole_run)]))["arms"]["cropi"]["points"]["2"]
    assert points["steps"] == [0, 10, 20, 30, 40]
    assert points["accuracy"]["gcd"] == pytest.approx(
        [synthetic.accuracy("cropi", "2", step) - 0.1 for step in points["steps"]]
    )
    # 82 s of the first stage and 1 of selecting, 3 s a step, then 10 and 1 s for the second stage
    assert points["seconds"]["arrived"] == [0, 83 + 30, 83 + 60, 83 + 60 + 11 + 30, 83 + 60 + 11 + 60]
    assert points["seconds"]["ready"] == [83, 83 + 30, 83 + 60 + 11, 83 + 60 + 11 + 30, 83 + 60 + 11 + 60]
