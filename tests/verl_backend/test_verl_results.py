"""verl's figures under our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import options

from cropi_tools.verl_backend.results import METRICS, keep_metrics, write_figures

OPTIONS: dict[str, Any] = {
    "steps": 3,
    "batch": 4,
    "samples": 2,
    "max_tokens": 10,
    "aggregation": "token",
    "dynamic_sampling": 0,
    "eval_samples": 1,
    "learning_rate": 1e-6,
    "schedule": "constant",
    "warmup": 2,
}


def figures(folder: Path, *lines: dict[str, Any], **changed: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = write_figures(folder, folder, options(**{**OPTIONS, **changed}), {"a": [{}, {}]})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], ledger


def step(number: int, **data: Any) -> dict[str, Any]:
    return {"step": number, "data": {"critic/score/mean": 0.5, "response_length/mean": 4.0, **data}}


def test_the_entropy_of_either_of_verls_ways(tmp_path: Path) -> None:
    for name in ("actor/entropy", "actor/entropy_loss"):
        (found,), _ = figures(tmp_path, step(1, **{name: 2.0}))
        assert found["entropy"] == 2.0


def test_figures_are_a_tokens_where_verls_are_of_the_longest_response(tmp_path: Path) -> None:
    """With the constant aggregation verl divides sums over 4 tokens by 10."""
    (found,), _ = figures(tmp_path, step(1, **{"actor/entropy": 0.8, "actor/kl_loss": 0.4}), aggregation="constant")
    assert (found["entropy"], found["kl"]) == pytest.approx((2.0, 1.0))


def test_refilled_groups_count_as_sampled(tmp_path: Path) -> None:
    lines = [step(1, **{"training/filter_groups/evicted_samples": 12.0}), step(2)]
    found, ledger = figures(tmp_path, *lines, dynamic_sampling=3)
    assert [line["zero_variance_fraction"] for line in found] == [0.75, 0.0]
    assert [(line["tokens_generated"], line["tokens_trained"]) for line in found] == [(128, 32), (32, 32)]
    assert ledger == {"tokens_generated": 160, "tokens_trained": 64}
    assert "zero_variance_fraction" not in figures(tmp_path, *lines)[0][0]


def test_a_line_that_was_cut_short_is_left_out_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    earlier = [step(1), step(2, **{"actor/loss": 1.0})]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in earlier) + '{"step":3,"da')
    keep_metrics(tmp_path)
    assert not (tmp_path / METRICS).exists()
    evaluated = {"step": 1, "data": {"val-core/a/acc/mean@1": 0.25}}
    found, _ = figures(tmp_path, evaluated, step(2, **{"actor/loss": 2.0}), step(3))
    assert [(line["step"], line.get("loss"), line["learning_rate"]) for line in found] == [
        (1, None, 5e-7),
        (2, 2.0, 1e-6),
        (3, None, 1e-6),
    ]
    (evaluation,) = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert evaluation == {"step": 1, "set": "a", "accuracy": 0.25, "prompts": 2, "samples": 1}
