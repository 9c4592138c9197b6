"""Which answer a policy gives most often, as each verifier reads it, and the pools with wrong references made from that."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.data.manifest import read_manifest
from cropi_tools.rewards.answers import Given, most_frequent, read_answer
from cropi_tools.runtime.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import wrong_references


def samples(*texts: str, right: str = "") -> list[dict[str, Any]]:
    found = []
    for text in texts:
        reward = float(text == right)
        outcome = "correct" if reward else "wrong"
        found.append(
            {"token_ids": [5, 1], "logprobs": [-1.0, -1.0], "text": text, "reward": reward, "outcome": outcome}
        )
    return found


def rollout(name: str, *texts: str, answer: str, verifier: str | None = "exact") -> dict[str, Any]:
    own = {} if verifier is None else {"verifier": verifier}
    prompt = {"id": name, "prompt": "1+2=", "answer": answer, "source": "sums", **own}
    return {**prompt, "prompt_token_ids": [3, 12], "samples": samples(*texts, right=answer)}


@pytest.mark.parametrize(
    ("verifier", "text", "answer"),
    [
        ("exact", " 12 ", "12"),
        ("exact", "So <answer>12</answer>", "12"),
        ("choice", "I think the answer is (C).", "C"),
        ("choice", "no idea", "no idea"),
        (None, "3 + 4 = 7, so \\boxed{7}.", "7"),
        ("maths", "<think>\\boxed{9}</think>The answer is 8.", "8"),
        ("mine.py:reward", "<think>9</think> 8", "<think>9</think> 8"),
    ],
)
def test_an_answer_is_what_the_verifier_reads(verifier: str | None, text: str, answer: str) -> None:
    assert read_answer({"id": "p", "answer": "A", "verifier": verifier}, text) == answer


def test_the_most_frequent_answer_counts_spellings_and_right_answers_as_one() -> None:
    record = {"id": "p", "answer": "0.5", "verifier": "maths"}
    given = samples("\\boxed{3}", "\\boxed{ 3. }", "\\boxed{4}", "\\boxed{0.5}")
    assert most_frequent(record, given) == Given("3", 2)
    given[2] |= {"text": "\\boxed{1/2}", "reward": 1.0}
    given[3]["reward"] = 1.0
    assert most_frequent(record, [*given, {**given[3], "text": "\\boxed{.50}"}]) == Given("1/2", 3)
    assert most_frequent(record, []) is None


def test_a_share_of_the_references_becomes_the_most_frequent_wrong_answer(tmp_path: Path) -> None:
    rows = [rollout(f"p{n}", "3", "4", "4", "5", answer="3") for n in range(10)]
    rows += [rollout("right", "3", "3", answer="3"), rollout("silent", "", "", answer="3")]
    source = tiny_policy.write_jsonl(tmp_path / "rollouts.jsonl", rows)
    prompts = [{key: row[key] for key in ("id", "prompt", "answer", "source", "verifier")} for row in rows]
    pool = tiny_policy.write_jsonl(tmp_path / "pool.jsonl", prompts)
    made = wrong_references.corrupt(pool, source, tmp_path / "made", share=0.4, seed=3)

    changed = {record["id"] for record in made.changed}
    assert len(changed) == 4
    assert changed <= {f"p{n}" for n in range(10)}
    assert all((record["right"], record["wrong"]) == ("3", "4") for record in made.changed)
    assert read(made.wrong) == made.changed
    assert [row["answer"] for row in read(made.pool)] == ["4" if row["id"] in changed else "3" for row in rows]
    for before, after in zip(rows, read(made.rollouts), strict=True):
        assert after["answer"] == ("4" if after["id"] in changed else "3")
        for old, new in zip(before["samples"], after["samples"], strict=True):
            assert new["reward"] == float(old["text"] == after["answer"])
            assert {**new, "reward": old["reward"], "outcome": old["outcome"]} == old
    manifest = read_manifest(made.rollouts)
    assert manifest is not None
    assert manifest["facts"]["summary"]["prompts"] == 12

    stamp = made.rollouts.stat().st_mtime_ns
    assert wrong_references.corrupt(pool, source, tmp_path / "made", share=0.4, seed=3) == made
    assert made.rollouts.stat().st_mtime_ns == stamp  # kept
    again = wrong_references.corrupt(pool, source, tmp_path / "other", share=0.4, seed=4)
    assert {record["id"] for record in again.changed} != changed


def test_a_pool_without_wrong_answers_is_refused(tmp_path: Path) -> None:
    rows = [rollout("right", "3", "3", answer="3")]
    source = tiny_policy.write_jsonl(tmp_path / "rollouts.jsonl", rows)
    with pytest.raises(InputError, match="no prompt has a wrong answer"):
        wrong_references.corrupt(source, source, tmp_path / "made")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
