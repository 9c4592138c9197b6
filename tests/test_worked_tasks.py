"""The tasks with worked answers (benchmarks/reproduce/worked_tasks.py): right where they should be, and wrong where they should be."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cropi_tools.rewards.verifiers import grade

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "reproduce"


def imported(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    return imported("worked_tasks")


def answer_to(prompt: str) -> int:
    """By another way than step by step."""
    kind, body = prompt.removesuffix(": ").split(" ")
    match kind:
        case "add" | "sum":
            return sum(map(int, body.split("+")))
        case "mul":
            return math.prod(map(int, body.split("*")))
        case "mod":
            number, by = map(int, body.split("%"))
            return number % by
        case "gcd":
            return math.gcd(*map(int, body.split(",")))
        case "dig":
            return sum(map(int, body))
        case "rev":
            return int(body[::-1])
        case "ord":
            return int("".join(sorted(body)))
        case "max":
            return max(map(int, body.split(",")))
        case _:
            factors, at = body.split("@")
            return sum(int(f) * int(at) ** power for power, f in enumerate(reversed(factors.split(","))))


def test_worked_answers_are_right_and_mistaken_ones_wrong(tasks: ModuleType) -> None:
    records = list(tasks.records(list(tasks.FAMILIES), 30, 7, set()))
    assert len(records) == 30 * len(tasks.LEVELS) * len(tasks.FAMILIES)
    assert len({record["prompt"] for record in records}) == len(records)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert int(record["answer"]) == answer_to(record["prompt"]), record
        worked, mistaken = record["extra"]["worked"], record["extra"]["mistaken"]
        assert worked.endswith(f" #### {record['answer']}")
        assert mistaken != worked
        assert not mistaken.endswith(f" #### {record['answer']}")
        # prompt, answer and end token fit the policy of bed (c)
        assert len(record["prompt"]) + max(len(worked), len(mistaken)) < 128


def test_the_verifier_reads_worked_answers(tasks: ModuleType) -> None:
    records: list[dict[str, Any]] = list(tasks.records(list(tasks.FAMILIES), 3, 1, set()))
    for record in records:
        right, wrong = (grade(record, record["extra"][kind]).reward for kind in ("worked", "mistaken"))
        assert (right, wrong) == (1, 0)


def test_excluded_prompts_do_not_come_again(tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for words in (["-o", str(first)], ["-o", str(second), "--exclude", str(first)]):
        monkeypatch.setattr(
            sys, "argv", ["worked_tasks.py", "--size", "20", "--seed", "1", "--only", "mod", "gcd", *words]
        )
        tasks.main()
    prompts = [{json.loads(line)["prompt"] for line in path.read_text().splitlines()} for path in (first, second)]
    assert len(prompts[0]) == len(prompts[1]) == 80
    assert not prompts[0] & prompts[1]


def test_the_warm_up_learns(tasks: ModuleType) -> None:
    warmup = imported("worked_warmup").warmup
    pairs = [(record["prompt"], record["extra"]["worked"]) for record in tasks.records(["rev"], 8, 1, set())]
    torch.manual_seed(0)
    tokenizer = warmup.make_tokenizer(128)
    model = warmup.make_model(tokenizer, 32, 2, 64)
    losses = warmup.train(model, [(warmup.encode(pairs, tokenizer), 60)], 0, 1e-2, batch=8)
    assert losses[-1] < losses[0] / 3
