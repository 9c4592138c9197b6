"""Rollout records and their seeds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import naive_policy
import pytest
import tiny_policy
import torch
from transformers import AddedToken

from cropi_tools.data.jsonl import dump_line
from cropi_tools.data.records import read_rollouts
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.tokens import Tokens
from cropi_tools.rewards.verifiers import Grade
from cropi_tools.rollouts.grading import graded
from cropi_tools.rollouts.sampling import SamplingTask, chunks, sample_groups


class Parity:
    """A pool in this process: correct when the response has an even number of characters, else a partial reward."""

    def __init__(self, verifier: str = "exact") -> None:
        self.verifier = verifier

    def grade_many(self, items: list[tuple[dict[str, Any], str]]) -> list[Grade]:
        self.seen = items
        return [Grade(1.0, "correct") if len(text) % 2 == 0 else Grade(0.25, "wrong") for _, text in items]


def sampled(prompts: list[dict[str, Any]], temperature: float = 1.0) -> tuple[list[dict[str, Any]], Parity]:
    policy, pool = naive_policy.policy(), Parity()
    tasks = [SamplingTask(prompt, (0, prompt["id"]), 3) for prompt in prompts]
    (rows,) = sample_groups(TransformersEngine(policy), policy.tokens, pool, [tasks], Sampling(8, temperature))  # type: ignore[arg-type]
    return [row.record for row in rows], pool


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


def test_seeds_are_stable() -> None:
    """Seeds are part of the file format: a resumed or repeated run must draw the same samples under any version."""
    assert sample_seed(0, "p0", 0) == 0x8169E4FE266DCC9F


class Scripted(Engine):
    """Answers with given token ids, in order."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        for requests in groups:
            yield [Completion(self.answers.pop(0), None, "length") for _ in requests]

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_is_kept_apart_from_the_answer(special: bool, opened: bool) -> None:
    """The verifier sees what follows the reasoning, the record keeps all of it; markers that are special tokens are no less markers."""
    tokenizer = tiny_policy.tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in ("[THINK]", "[/THINK]")])
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    start, end, tool = (tokenizer.convert_tokens_to_ids(mark) for mark in ("[THINK]", "[/THINK]", "<|tool|>"))
    digit = {c: tokenizer.convert_tokens_to_ids(c) for c in "0123456789"}
    begin = [] if opened else [start]
    answers = [[*begin, digit["7"], end, digit["4"], tool, 1], [*begin, digit["4"], digit["2"]], [digit["4"]]]
    prompt = {**tiny_policy.prompts(1)[0], "prompt": "1+2=" + ("[THINK]" if opened else "")}
    pool = Parity()
    tokens = Tokens(tokenizer, [1], "")
    tasks = [SamplingTask(prompt, (0, "p"), 3)]
    ((found,),) = sample_groups(Scripted(answers), tokens, pool, [tasks], Sampling(8, 1.0))  # type: ignore[arg-type]
    row = found.record
    shown = "" if opened else "[THINK]"
    assert [sample["text"] for sample in row["samples"]] == [f"{shown}7[/THINK]4", f"{shown}42", "4"]
    assert [text for _, text in pool.seen] == ["4", "", "" if opened else "4"]
    assert row.get("reasoning_open", False) is opened
    again = Parity()
    assert graded(again, [row]) == [row]  # cropi-verify sees the same
    assert [text for _, text in again.seen] == [text for _, text in pool.seen]
    whole = Parity("mine.py:reward")  # a function of the user's own may reward how the model reasons
    graded(whole, [row])
    assert [text for _, text in whole.seen] == [sample["text"] for sample in row["samples"]]
