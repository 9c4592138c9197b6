"""Rollouts of others as text: recognized, grouped by prompt, refused with their place. Real dumps of verl are in tests/peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.data.external_rollouts import foreign_form, text_rollouts
from cropi_tools.data.records import read_rollouts
from cropi_tools.runtime.errors import InputError

AUTHORS = {"id": "a", "prompt": "1+1?", "answer": "2", "responses": ["2", ""], "rewards": [1.0, 0]}


def dumped(text: str, output: str, score: float = 1.0, step: int = 1) -> dict[str, Any]:
    return {"input": text, "output": output, "gts": "2", "score": score, "step": step, "acc": 1.0}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_whose_rollouts_these_are() -> None:
    assert foreign_form(AUTHORS) == "authors"
    assert foreign_form(dumped("a", "b")) == "verl-dump"
    assert foreign_form({"id": "a", "prompt_token_ids": [1], "samples": []}) == "ours"
    assert foreign_form({"id": "a", "samples": [], "responses": []}) == "ours"
    assert foreign_form({"input": "a", "output": "b"}) == "ours"


def test_the_authors_rows(tmp_path: Path) -> None:
    (found,) = text_rollouts([write(tmp_path / "r.jsonl", AUTHORS)])
    assert (found.prompt, found.responses, found.rewards) == ("1+1?", ["2", ""], [1.0, 0.0])
    del AUTHORS["rewards"]
    (found,) = text_rollouts([write(tmp_path / "r.jsonl", AUTHORS)])
    AUTHORS["rewards"] = [1.0, 0]
    assert found.rewards is None


def test_lines_of_a_step_come_together_wherever_they_stand(tmp_path: Path) -> None:
    first = [dumped("a", "a0"), dumped("b", "b0", 0.0), dumped("a", "a1", 0.5), dumped("b", "")]
    later = [dumped("b", "b2", step=2), dumped("c", "c2", step=2), dumped("b", "b3", step=2)]
    paths = [write(tmp_path / "1.jsonl", *first, *later), write(tmp_path / "3.jsonl", dumped("a", "a3", step=2))]
    found = [(rollout.prompt, rollout.responses, rollout.rewards) for rollout in text_rollouts(paths)]
    assert found == [
        ("a", ["a0", "a1"], [1.0, 0.5]),
        ("b", ["b0", ""], [0.0, 1.0]),
        ("b", ["b2", "b3"], [1.0, 1.0]),
        ("c", ["c2"], [1.0]),
        ("a", ["a3"], [1.0]),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**AUTHORS, "responses": "2"}, "'responses' must be a list of at least one text"),
        ({**AUTHORS, "responses": []}, "'responses' must be a list of at least one text"),
        ({**AUTHORS, "responses": ["2", None]}, "'responses' must be a list of at least one text"),
        ({**AUTHORS, "rewards": [1.0]}, "'rewards' must have one number for each of the 2 responses"),
        ({**AUTHORS, "rewards": [1.0, None]}, "'rewards' must hold a finite number.*, found None"),
        ({**AUTHORS, "rewards": [1.0, float("nan")]}, "'rewards' must hold a finite number.*, found nan"),
        ({"id": "a", "responses": ["2"]}, "no field 'prompt'"),
        ({**dumped("a", "b"), "score": None}, "'score' must hold a finite number.*, found None"),
        ({**dumped("a", "b"), "output": 5}, "'output' must be text, found 5"),
        ({"input": "a", "output": "b", "step": 1}, "no field 'score'"),
        ({"id": "a", "samples": []}, "neither the authors' rollouts"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"r.jsonl:2: {said}") as raised:
        list(text_rollouts([write(tmp_path / "r.jsonl", AUTHORS, row)]))
    assert "\n" not in str(raised.value)


def test_a_file_without_rollouts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no record"):
        list(text_rollouts([write(tmp_path / "r.jsonl")]))


@pytest.mark.parametrize("row", [AUTHORS, dumped("a", "b")])
def test_what_reads_our_rollouts_names_the_command(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"r.jsonl:1: .*, text without tokens; cropi-verify FILE"):
        list(read_rollouts([write(tmp_path / "r.jsonl", row)]))
