"""Rollout records, their seeds, and the figures counted over them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import naive_policy
import pytest
import tiny_policy
import torch

from cropi_tools.data.jsonl import dump_line
from cropi_tools.data.records import read_rollouts
from cropi_tools.engines.protocol import Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.rewards.verifiers import Grade
from cropi_tools.rollouts import Tallies, Tally, chunks, pass_at_k, sample_and_verify


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(samples: int) -> None:
    """The share of all k-subsets of the samples that hold a correct one."""
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over all outcomes of 6 samples that are correct with probability p is 1 - (1 - p)^k."""
    for p, k in itertools.product((0.1, 0.5, 0.9), range(1, 7)):
        mean = sum(
            p ** sum(outcome) * (1 - p) ** (6 - sum(outcome)) * pass_at_k(6, sum(outcome), k)
            for outcome in itertools.product((0, 1), repeat=6)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k)


class Parity:
    """A pool in this process: correct when the response has an even number of characters, else a partial reward."""

    def grade_many(self, items: list[tuple[dict[str, Any], str]]) -> list[Grade]:
        self.seen = items
        return [Grade(1.0, "correct") if len(text) % 2 == 0 else Grade(0.25, "wrong") for _, text in items]


def sampled(prompts: list[dict[str, Any]], temperature: float = 1.0) -> tuple[list[dict[str, Any]], Parity]:
    policy, pool = naive_policy.policy(), Parity()
    keys = [(0, prompt["id"]) for prompt in prompts]
    rows = sample_and_verify(TransformersEngine(policy), policy, pool, prompts, 3, Sampling(8, temperature), keys)  # type: ignore[arg-type]
    return rows, pool


def test_records_hold_what_was_sampled() -> None:
    prompts = [{**prompt, "extra": {"kept": 1}} for prompt in tiny_policy.prompts(4)]
    rows, pool = sampled(prompts)
    model, tokenizer = naive_policy.double_copy(naive_policy.policy().model), tiny_policy.tokenizer()
    assert [{key: row[key] for key in prompt} for prompt, row in zip(prompts, rows, strict=True)] == prompts
    for row in rows:
        assert row["prompt_token_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert len(row["samples"]) == 3
        for sample in row["samples"]:
            with torch.no_grad():
                expected = naive_policy.logprobs(model, row["prompt_token_ids"], sample["token_ids"]).tolist()
            assert sample["logprobs"] == pytest.approx(expected, abs=1e-5)
            characters = [tiny_policy.CHARACTERS[token - 2] for token in sample["token_ids"] if token >= 2]
            assert sample["text"] == "".join(characters)  # neither end nor padding token
            assert (sample["finish_reason"] == "stop") == (sample["token_ids"][-1] == 1)
            assert sample["reward"] == (1.0 if len(characters) % 2 == 0 else 0.25)
            assert [float(torch.tensor(value)) for value in sample["logprobs"]] == pytest.approx(
                sample["logprobs"], rel=1e-8
            )
    assert [(record["id"], text) for record, text in pool.seen] == [
        (r["id"], s["text"]) for r in rows for s in r["samples"]
    ]


def test_samples_of_a_prompt_depend_on_its_id_only() -> None:
    prompts = tiny_policy.prompts(6)
    expected = {row["id"]: row for row in sampled(prompts)[0]}
    random.Random(1).shuffle(prompts)
    for part in (prompts, prompts[2:3], prompts[4:]):
        for row in sampled(part)[0]:
            other = expected[row["id"]]
            assert [s["token_ids"] for s in row["samples"]] == [s["token_ids"] for s in other["samples"]]
            for mine, theirs in zip(row["samples"], other["samples"], strict=True):
                assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-5)
    twins = [{**prompts[0], "id": "a"}, {**prompts[0], "id": "b"}]  # the same question under two ids: other samples
    first, second = sampled(twins)[0]
    assert [s["token_ids"] for s in first["samples"]] != [s["token_ids"] for s in second["samples"]]
    assert len({tuple(s["token_ids"]) for s in first["samples"]}) > 1


def test_greedy_rollouts_have_no_logprobs() -> None:
    rows, _ = sampled(tiny_policy.prompts(2), 0.0)
    assert all(sample["logprobs"] is None for row in rows for sample in row["samples"])


def test_written_rollouts_read_back(tmp_path: Path) -> None:

    rows, _ = sampled(tiny_policy.prompts(3))
    path = tmp_path / "r.jsonl"
    path.write_text("".join(dump_line(row) + "\n" for row in rows))
    for row, rollout in zip(rows, read_rollouts([path], 71), strict=True):
        assert (rollout.id, rollout.source, rollout.prompt_token_ids) == (
            row["id"],
            row["source"],
            row["prompt_token_ids"],
        )
        assert [list(sample) for sample in rollout.samples] == [
            [s["token_ids"], s["logprobs"], s["reward"]] for s in row["samples"]
        ]


def test_chunks_do_not_depend_on_where_a_run_was_resumed() -> None:
    records = [{"id": str(n)} for n in range(100)]
    whole = list(chunks(iter(records), 8))
    assert [record for group in whole for record in group] == records
    assert {len(group) for group in whole[:-1]} == {32}
    assert list(chunks(iter(records[64:]), 8)) == whole[2:]
    assert [len(group) for group in chunks(iter(records[:3]), 1000)] == [1, 1, 1]


def row(source: str, rewards: list[float], lengths: list[int]) -> dict[str, Any]:
    return {
        "source": source,
        "prompt_token_ids": [5, 6],
        "samples": [
            {
                "token_ids": [7] * length,
                "reward": reward,
                "outcome": "correct" if reward == 1.0 else "wrong",
                "finish_reason": "length" if length == 4 else "stop",
            }
            for reward, length in zip(rewards, lengths, strict=True)
        ],
    }


def test_summary() -> None:
    tallies = Tallies()
    tallies.add([row("a", [1.0, 0.0, 0.0], [1, 2, 4]), row("b", [0.5, 0.5, 0.5], [4, 4, 4])])
    tallies = Tallies(tallies.saved())  # as after a resume
    tallies.add([row("a", [1.0, 1.0, 0.0], [1, 1, 1])])
    found = tallies.summary()
    assert found["prompts"] == 3
    assert found["samples"] == 9
    assert found["accuracy"] == pytest.approx(3 / 9)
    assert found["mean_reward"] == pytest.approx(4.5 / 9)
    assert found["pass_at"] == {
        "1": pytest.approx(1 / 3),
        "2": pytest.approx((2 / 3 + 0 + 1) / 3),
        "3": pytest.approx(2 / 3),
    }
    assert found["response_tokens"] == pytest.approx(22 / 9)
    assert found["truncated_fraction"] == pytest.approx(4 / 9)
    assert found["equal_rewards_fraction"] == pytest.approx(1 / 3)
    assert found["outcomes"] == {"correct": 3, "wrong": 6}
    assert found["by_source"]["a"]["accuracy"] == pytest.approx(3 / 6)
    assert found["by_source"]["b"]["pass_at"]["3"] == 0.0
    assert Tally().samples == 0


def test_seeds_are_stable() -> None:
    """Seeds are part of the file format: a resumed or repeated run must draw the same samples under any version."""
    assert sample_seed(0, "p0", 0) == 0x8169E4FE266DCC9F
