"""Prompts and rollouts are checked line by line; every refusal names the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi_tools.data.records import pass_rate, read_prompts, read_rollouts, read_scores, shard_range
from cropi_tools.runtime.errors import InputError

PROMPT = {"id": "a", "prompt": "1+1=", "answer": "2", "source": "sums"}
SAMPLE = {"token_ids": [3, 4, 1], "logprobs": [-0.5, -1, -2.5], "text": "x", "finish_reason": "stop", "reward": 1}
ROLLOUT = {
    **PROMPT,
    "prompt_token_ids": [5, 6],
    "samples": [SAMPLE, {"token_ids": [], "logprobs": None, "reward": 0.5}],
}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return str(path)


def test_prompts_pass_with_all_they_hold(tmp_path: Path) -> None:
    chat = {
        **PROMPT,
        "id": "b",
        "prompt": [{"role": "user", "content": "1+1="}],
        "extra": {"any": [1]},
        "verifier": "exact",
    }
    assert list(read_prompts([write(tmp_path / "p.jsonl", PROMPT, "", chat)])) == [PROMPT, chat]


@pytest.mark.parametrize("field", ["id", "prompt", "answer", "source"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    broken = {key: value for key, value in {**PROMPT, "id": "b"}.items() if key != field}
    with pytest.raises(InputError, match=rf"p\.jsonl:2: no '?(field )?'{field}'"):
        list(read_prompts([write(tmp_path / "p.jsonl", PROMPT, broken)]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": 5}, "'prompt' must be text or a list of messages"),
        ({"prompt": []}, "'prompt' must be text or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "'prompt' must be text or a list of messages"),
        ({"source": None}, "'source' must be text"),
        ({"chat_template_kwargs": "enable_thinking=false"}, "'chat_template_kwargs' must be an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'chat_template_kwargs' sets tokenize"),
        ({"id": 7}, "no 'id'"),
        ({"id": ""}, "no 'id'"),
        ({"id": "first"}, "id 'first' comes twice"),
    ],
)
def test_malformed_prompts(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"p\.jsonl:2: {words}"):
        list(read_prompts([write(tmp_path / "p.jsonl", {**PROMPT, "id": "first"}, {**PROMPT, **change})]))


def test_ids_are_unique_over_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"q\.jsonl:1: id 'a' comes twice"):
        list(read_prompts([write(tmp_path / "p.jsonl", PROMPT), write(tmp_path / "q.jsonl", PROMPT)]))


def test_a_file_without_records(tmp_path: Path) -> None:
    full, empty = write(tmp_path / "p.jsonl", PROMPT), write(tmp_path / "q.jsonl", "", " ")
    for files in ([full, empty], [empty, full], [empty, full, empty]):
        assert [record["id"] for record in read_prompts(files)] == ["a"]
    with pytest.raises(InputError, match=r"q\.jsonl: holds no record"):
        list(read_prompts([empty]))
    with pytest.raises(InputError, match=r"q\.jsonl, .*q\.jsonl: hold no record"):
        list(read_prompts([empty, empty]))


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "broken JSON"), ("[1]", "expected a JSON object, found list"), ('{"a": "\x00"}', "broken JSON")],
)
def test_broken_lines(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(InputError, match=rf"p\.jsonl:2: {words}"):
        list(read_prompts([write(tmp_path / "p.jsonl", PROMPT, line)]))


def test_rollouts_read(tmp_path: Path) -> None:
    (found,) = read_rollouts([write(tmp_path / "r.jsonl", ROLLOUT)], vocabulary=7)
    assert (found.id, found.source, found.prompt_token_ids, found.rewards) == ("a", "sums", [5, 6], [1.0, 0.5])
    assert found.samples[0] == ([3, 4, 1], [-0.5, -1, -2.5], 1.0)
    assert found.samples[1] == ([], None, 0.5)
    assert found.record == ROLLOUT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_token_ids": []}, "'prompt_token_ids' is empty"),
        ({"prompt_token_ids": [1, -2]}, "'prompt_token_ids' must be a list of token ids"),
        ({"prompt_token_ids": [1, 7]}, "'prompt_token_ids' holds token 7, the policy has only 7"),
        ({"samples": []}, "'samples' must be a list of at least one sample"),
        ({"samples": [5]}, "sample 0: expected an object"),
        ({"samples": [SAMPLE, {"reward": 1}]}, "sample 1: no field 'token_ids'"),
        ({"samples": [{"token_ids": [1]}]}, "sample 0: no field 'reward'"),
        ({"samples": [{**SAMPLE, "token_ids": [3, 4, True]}]}, "sample 0: 'token_ids' must be a list of token ids"),
        ({"samples": [{**SAMPLE, "token_ids": [3, 4, 9]}]}, "sample 0: 'token_ids' holds token 9"),
        ({"samples": [{**SAMPLE, "reward": True}]}, "sample 0: 'reward' must be a finite number.*, found True"),
        ({"samples": [{**SAMPLE, "reward": "1"}]}, "sample 0: 'reward' must be a finite number"),
        ({"samples": [{**SAMPLE, "reward": float("nan")}]}, "sample 0: 'reward' must be a finite number.*, found nan"),
        (
            {"samples": [{**SAMPLE, "logprobs": [-1.0]}]},
            "sample 0: 'logprobs' must have one number for each of the 3 tokens",
        ),
        (
            {"samples": [{**SAMPLE, "logprobs": [-1.0, None, -2.0]}]},
            "sample 0: 'logprobs' holds something that is not a finite number",
        ),
        (
            {"samples": [{**SAMPLE, "logprobs": [-1.0, float("-inf"), -2.0]}]},
            "sample 0: 'logprobs' holds something that is not a finite",
        ),
    ],
)
def test_malformed_rollouts(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "r.jsonl", ROLLOUT, {**ROLLOUT, "id": "b", **change})
    with pytest.raises(InputError, match=rf"r\.jsonl:2: {words}"):
        list(read_rollouts([path], vocabulary=7))


@pytest.mark.parametrize("field", ["prompt_token_ids", "samples", "source"])
def test_prompts_are_not_rollouts(tmp_path: Path, field: str) -> None:
    with pytest.raises(InputError, match=rf"r\.jsonl:1: no field '{field}'; expected the output of cropi-rollout"):
        list(
            read_rollouts([write(tmp_path / "r.jsonl", {key: value for key, value in ROLLOUT.items() if key != field})])
        )


def test_scores_read(tmp_path: Path) -> None:
    scores = [
        {"id": i, "source": "s", "scores": s, "pass_rate": 0.5, "status": "ok"}
        for i, s in (("a", {"t": 0.5}), ("b", None))
    ]
    assert list(read_scores([write(tmp_path / "s.jsonl", *scores)])) == scores
    with pytest.raises(InputError, match=r"s\.jsonl:1: 'scores' must be an object"):
        list(read_scores([write(tmp_path / "s.jsonl", {**scores[0], "scores": 0.5})]))


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shards_are_a_partition_in_order(count: int, shards: int) -> None:
    ranges = [shard_range(count, index, shards) for index in range(1, shards + 1)]
    assert [n for start, stop in ranges for n in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_pass_rate_counts_full_rewards() -> None:
    assert pass_rate([1.0, 0.5, 0.0, 1.0]) == 0.5
