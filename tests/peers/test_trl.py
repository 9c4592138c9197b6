"""TRL trains on what we write: its own trainer takes a step, and its reward function gets the answers and columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

pytestmark = pytest.mark.slow

PROMPTS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "1+2=", "answer": "3", "source": "sums", "extra": {"level": "easy", "steps": [1]}},
    {
        "id": "b",
        "prompt": [{"role": "system", "content": "add"}, {"role": "user", "content": "3+4="}],
        "answer": "7",
        "source": "sums",
        "verifier": "exact",
        "extra": {"level": "hard"},
    },
]


@pytest.mark.parametrize("name", ["s.parquet", "s.jsonl"])
def test_trl_takes_a_step_on_a_selection(
    name: str, run: Callable[..., Any], trl: Callable[..., Any], chat_policy: Path, tmp_path: Path
) -> None:
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    run("cropi-select", "--prompts", prompts, "--by", "full", "--format", "trl", "-o", name)
    found = trl(tmp_path / name, chat_policy)
    assert found["steps"] == 1
    assert found["seen"].keys() == {"a", "b"}
    for record in PROMPTS:
        seen = found["seen"][record["id"]]
        assert (seen["answer"], seen["level"]) == (record["answer"], record["extra"]["level"])
        assert {"source", "verifier", "extra", "rank"} <= set(seen["columns"])
        assert seen["completion"][0]["role"] == "assistant", "messages, so the chat template is applied"
    assert found["seen"]["a"]["prompt"] == [{"role": "user", "content": "1+2="}]
    assert found["seen"]["b"]["prompt"] == PROMPTS[1]["prompt"]
