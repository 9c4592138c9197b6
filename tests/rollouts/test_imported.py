"""Text of others as rollouts of ours: the prompt's exact tokens, the response's, an end token only where it must have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.data.records import read_rollouts
from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.policy.tokens import Tokens
from cropi_tools.rollouts.imported import imported_rollouts
from cropi_tools.runtime.errors import InputError

TEMPLATE = (
    "{% for m in messages %}<|pad|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant {% endif %}"
)
PROMPTS = [
    {"id": "a", "prompt": "1+1=", "answer": "2", "source": "sums", "verifier": "exact"},
    {
        "id": "b",
        "prompt": [{"role": "system", "content": "add"}, {"role": "user", "content": "2+2="}],
        "answer": "4",
        "source": "sums",
    },
]


@pytest.fixture
def tokens() -> Tokens:
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Tokens(tokenizer, [40, 1], "P0")


def ids(text: str) -> list[int]:
    return [tiny_policy.CHARACTERS.index(character) + 2 for character in text]


def authors(identity: Any, prompt: str, *responses: str, **fields: Any) -> dict[str, Any]:
    rewards = [float(place == 0) for place in range(len(responses))]
    return {"id": identity, "prompt": prompt, "answer": "2", "responses": list(responses), "rewards": rewards, **fields}


def dump(tokens: Tokens, record: dict[str, Any], output: str, score: float, step: int = 1) -> dict[str, Any]:
    text = tokens.tokenizer.decode(prompt_token_ids(tokens.tokenizer, record), skip_special_tokens=True)
    return {"input": text, "output": output, "gts": record["answer"], "score": score, "step": step}


def test_the_authors_rows_need_no_prompts(tokens: Tokens, tmp_path: Path) -> None:
    path = tiny_policy.write_jsonl(tmp_path / "gsm.r.jsonl", [authors(7, "1+1=", "2", "", "22")])
    (found,) = imported_rollouts([path], tokens)
    assert {key: found[key] for key in ("id", "prompt", "answer", "source")} == {
        "id": "7",
        "prompt": "1+1=",
        "answer": "2",
        "source": "authors",
    }
    assert found["prompt_token_ids"] == prompt_token_ids(tokens.tokenizer, {"id": "7", "prompt": "1+1="})
    assert found["samples"] == [
        {
            "token_ids": ids(text),
            "logprobs": None,
            "text": text,
            "finish_reason": "unknown",
            "reward": reward,
            "outcome": outcome,
        }
        for text, reward, outcome in (("2", 1.0, "correct"), ("", 0.0, "wrong"), ("22", 0.0, "wrong"))
    ]


def test_a_response_below_the_limit_ended_with_the_end_token(tokens: Tokens, tmp_path: Path) -> None:
    path = tiny_policy.write_jsonl(tmp_path / "r.jsonl", [authors("a", "1+1=", "2", "", "222", "2222")])
    (found,) = imported_rollouts([path], tokens, longest=3)
    samples = [(sample["token_ids"], sample["finish_reason"]) for sample in found["samples"]]
    # the tokenizer's own end token is among the policy's, though not the first of them
    assert samples == [([*ids("2"), 1], "stop"), ([1], "stop"), (ids("222"), "length"), (ids("222"), "length")]


def test_the_result_is_read_as_rollouts(tokens: Tokens, tmp_path: Path) -> None:
    path = tiny_policy.write_jsonl(tmp_path / "r.jsonl", [authors("a", "1+1=", "2", "")])
    ours = tiny_policy.write_jsonl(tmp_path / "ours.jsonl", list(imported_rollouts([path], tokens)))
    (rollout,) = read_rollouts([ours], vocabulary=len(tokens.tokenizer))
    assert rollout.rewards == [1.0, 0.0]
    assert [sample.token_ids for sample in rollout.samples] == [ids("2"), []]


def test_prompts_are_found_by_id_or_text(tokens: Tokens, tmp_path: Path) -> None:
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    rows = [authors("b", "the bare question", "4"), authors("other", "1+1=", "2")]
    path = tiny_policy.write_jsonl(tmp_path / "r.jsonl", rows)
    found = list(imported_rollouts([path], tokens, [prompts]))
    for rollout, record in zip(found, reversed(PROMPTS), strict=True):
        assert {key: rollout[key] for key in record} == record
        assert rollout["prompt_token_ids"] == prompt_token_ids(tokens.tokenizer, record)
    tiny_policy.write_jsonl(path, [authors("other", "3+3=", "2")])
    with pytest.raises(InputError, match=r"r.jsonl:1: no prompt of .*p.jsonl is 'other'"):
        list(imported_rollouts([path], tokens, [prompts]))


def test_a_dump_is_matched_by_what_its_prompts_decode_to(tokens: Tokens, tmp_path: Path) -> None:
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    a, b = PROMPTS
    lines = [dump(tokens, b, "4", 1.0), dump(tokens, a, "2", 1.0), dump(tokens, b, "5", 0.0)]
    path = tiny_policy.write_jsonl(tmp_path / "1.jsonl", lines)
    found = list(imported_rollouts([path], tokens, [prompts]))
    assert [(r["id"], [s["text"] for s in r["samples"]]) for r in found] == [("b", ["4", "5"]), ("a", ["2"])]
    assert found[0]["prompt_token_ids"] == prompt_token_ids(tokens.tokenizer, b)
    assert 0 in found[0]["prompt_token_ids"], "special tokens, which the dump lacks"
    with pytest.raises(InputError, match=r"1.jsonl:1: a verl dump has no special tokens"):
        list(imported_rollouts([path], tokens))


def test_the_first_step_of_a_prompt_is_kept(tokens: Tokens, tmp_path: Path) -> None:
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    steps = [
        tiny_policy.write_jsonl(tmp_path / f"{step}.jsonl", [dump(tokens, PROMPTS[0], f"{step}", 1.0, step)])
        for step in (1, 9)
    ]
    for order in (steps, steps[::-1]):
        (found,) = imported_rollouts(order, tokens, [prompts])
        assert [sample["text"] for sample in found["samples"]] == [order[0].stem]


def test_prompts_that_read_alike_are_not_guessed(tokens: Tokens, tmp_path: Path) -> None:
    twins = [PROMPTS[0], {**PROMPTS[0], "id": "twin"}]
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", twins)
    path = tiny_policy.write_jsonl(tmp_path / "1.jsonl", [dump(tokens, PROMPTS[0], "2", 1.0)])
    with pytest.raises(InputError, match=r"1.jsonl:1: several prompts of .*p.jsonl read like this one"):
        list(imported_rollouts([path], tokens, [prompts]))


def test_rollouts_without_rewards_are_left_to_be_verified(tokens: Tokens, tmp_path: Path) -> None:
    row = authors("a", "1+1=", "2")
    del row["rewards"]
    (found,) = imported_rollouts([tiny_policy.write_jsonl(tmp_path / "r.jsonl", [row])], tokens)
    assert (found["samples"][0]["reward"], found["samples"][0]["outcome"]) == (None, None)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"id": None}, "no field 'id'"), ({"answer": None}, "no field 'answer'"), ({"prompt": " "}, "'prompt' must be")],
)
def test_a_row_that_is_no_prompt(fields: dict[str, Any], said: str, tokens: Tokens, tmp_path: Path) -> None:
    path = tiny_policy.write_jsonl(tmp_path / "r.jsonl", [{**authors("a", "1+1=", "2"), **fields}])
    with pytest.raises(InputError, match=f"r.jsonl:1: {said}"):
        list(imported_rollouts([path], tokens))
