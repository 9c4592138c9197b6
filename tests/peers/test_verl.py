"""verl opens what we write, and we open what verl writes: by verl's own data set, reward and trainers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.rollouts.imported import imported_rollouts

pytestmark = pytest.mark.peers

PROMPTS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "1+2=", "answer": "3", "source": "sums", "verifier": "exact"},
    {
        "id": "b",
        "prompt": [{"role": "system", "content": "add"}, {"role": "user", "content": "3+4="}],
        "answer": "7",
        "source": "openai/gsm8k",
        "extra": {"level": 2, "steps": [1, {"x": None}]},
    },
    {"id": "c", "prompt": "10-4=", "answer": "6", "source": "sums", "extra": {"other": "kind"}, "note": "kept"},
]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["s.parquet", "s.jsonl"])
def test_verl_loads_a_selection(
    name: str, run: Callable[..., Any], verl: Callable[..., Any], chat_policy: Path, tmp_path: Path
) -> None:
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    run("cropi-select", "--prompts", prompts, "--by", "full", "--format", "verl", "-o", name)
    rows = {row["index"]: row for row in verl("load", tmp_path / name, chat_policy)}
    tokenizer = load_tokens(str(chat_policy)).tokenizer
    assert rows.keys() == {"a", "b", "c"}
    for record in PROMPTS:
        row = rows[record["id"]]
        assert row["data_source"] == record["source"]
        assert row["reward_model"] == {"style": "rule", "ground_truth": record["answer"]}
        assert json.loads(row["extra_info"]["extra"]) == record.get("extra", {})
        assert row["token_ids"] == prompt_token_ids(tokenizer, record), "verl asks with the tokens we ask with"
    run("cropi-prompts", name, "-o", "back.jsonl")
    back = {record["id"]: record for record in read(tmp_path / "back.jsonl")}
    assert back == {record["id"]: record for record in PROMPTS}


def test_which_sources_verl_can_score(verl: Callable[..., Any]) -> None:
    assert verl("score", "openai/gsm8k", "so it is #### 7", "7") == 1.0
    assert verl("score", "sums", "7", "7") == "NotImplementedError"


@pytest.mark.parametrize("writer", ["ray", "v1"])
def test_a_rollout_dump_is_read_as_rollouts(
    writer: str, run: Callable[..., Any], verl: Callable[..., Any], chat_policy: Path, tmp_path: Path
) -> None:
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    run("cropi-select", "--prompts", prompts, "--by", "full", "--format", "verl", "-o", "s.parquet")
    sampled = verl("dump", tmp_path / "s.parquet", chat_policy, tmp_path / "dumps")
    tokens = load_tokens(str(chat_policy))
    found = list(imported_rollouts([tmp_path / "dumps" / writer / "3.jsonl"], tokens, [prompts], longest=12))
    assert sorted(rollout["id"] for rollout in found) == ["a", "b", "c"]
    for rollout in found:
        own = [one for one in sampled if one["id"] == rollout["id"]]
        assert rollout["prompt_token_ids"] == own[0]["prompt_token_ids"]
        assert [sample["token_ids"] for sample in rollout["samples"]] == [one["response"] for one in own]
        assert [sample["reward"] for sample in rollout["samples"]] == [one["score"] for one in own]
