"""Rows of ours, verl's, TRL's and the authors', and any columns by name, as records of prompts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.prompts.datasets import open_dataset
from cropi_tools.prompts.row_formats import dataset_prompts, parse_mapping, prompt_texts
from cropi_tools.runtime.errors import InputError, UsageError

MESSAGES = [{"role": "user", "content": "How many?"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(path: Path, mapping: str | None = None, source: str | None = None) -> list[dict[str, Any]]:
    columns = None if mapping is None else parse_mapping(mapping)
    return [record for _, _, record in dataset_prompts(open_dataset(str(path)), columns, source)]


def test_our_own_and_the_authors_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "one?", "answer": "1", "source": "s", "verifier": "exact", "extra": {"k": [1]}},
        {"id": 7, "prompt": MESSAGES, "answer": 2, "responses": ["2"], "rewards": [1.0]},
        {"prompt": "three?", "answer": "3"},
        {"id": "b", "prompt": "four?", "answer": "4", "chat_template_kwargs": {"enable_thinking": False}, "rank": 3},
    ]
    path = tmp_path / "my.data.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    del rows[3]["rank"]
    assert records(path) == [
        rows[0],
        {"id": "my-7", "prompt": MESSAGES, "answer": "2", "source": "my"},
        {"id": "my-2", "prompt": "three?", "answer": "3", "source": "my"},
        {**rows[3], "source": "my"},
    ]
    assert {record["source"] for record in records(path, source="other")} == {"other"}
    assert [record["id"] for record in records(path, source="other")] == ["a", "other-7", "other-2", "b"]


def test_a_plain_verl_row(tmp_path: Path) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": MESSAGES,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 3},
        "tools": "calculator",
    }
    path = write(tmp_path / "gsm.jsonl", row)
    expected = {
        "id": "gsm-3",
        "prompt": MESSAGES,
        "answer": "72",
        "source": "openai/gsm8k",
        "extra": {"split": "train", "tools": "calculator"},
    }
    assert records(path) == [expected]
    assert records(path, "source=extra_info.split,answer=ability") == [
        {**expected, "source": "train", "answer": "math"}
    ]


@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth"])
def test_trl_rows_keep_their_columns(answer: str, tmp_path: Path) -> None:
    row = {"prompt": MESSAGES, answer: "#### 42", "level": 3, "hint": None, "extra": {"level": "kept", "x": 1}}
    assert records(write(tmp_path / "t.jsonl", row)) == [
        {"id": "t-0", "prompt": MESSAGES, "answer": "#### 42", "source": "t", "extra": {"level": "kept", "x": 1}}
    ]
    del row["extra"]
    assert records(write(tmp_path / "t.jsonl", row))[0]["extra"] == {"level": 3}


def test_columns_by_name(tmp_path: Path) -> None:
    row = {
        "question": "How many?",
        "answer": "long",
        "reward": {"gold": 42},
        "meta.kind": "maths",
        "messages": [*MESSAGES, {"role": "assistant", "content": "It is 42."}],
        "number": 5,
    }
    path = write(tmp_path / "q.jsonl", row)
    (found,) = records(path, "prompt=question, answer=reward.gold, source=meta.kind, id=number, verifier=question")
    assert found == {
        "id": "q-5",
        "prompt": "How many?",
        "answer": "42",
        "source": "maths",
        "verifier": "How many?",
        "extra": {"messages": row["messages"], "meta.kind": "maths"},
    }
    (found,) = records(path, "prompt=messages,answer=messages.-1.content")
    assert (found["prompt"], found["answer"]) == (row["messages"], "It is 42.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt", "expected NAME=COLUMN"),
        ("prompt=", "expected NAME=COLUMN"),
        ("promt=question", "no 'promt' to fill; did you mean prompt"),
        ("prompt=a,prompt=b", "'prompt' is filled twice"),
    ],
)
def test_a_faulty_mapping(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--map {text}: {said}"):
        parse_mapping(text)


@pytest.mark.parametrize(
    ("row", "mapping", "said"),
    [
        ({"answer": "1", "q": 2}, None, r"no 'prompt'; .* --map prompt=COLUMN \(the columns are answer, q\)"),
        ({"question": "a", "final": "1"}, None, "no 'prompt'; .* --map prompt=question,answer=final "),
        ({"prompt": "a", "target": 2}, None, "no 'answer'; .* --map answer=target "),
        ({"question": "a", "answer": "1"}, "prompt=quest", "no 'quest'; .*; did you mean question"),
        ({"question": "a", "answer": "1"}, "prompt=question,id=idx", "no 'idx'; --map takes 'id' from there"),
        ({"question": "a", "answer": "1", "m": {}}, "prompt=question,source=m", "no 'm'; --map takes 'source'"),
        ({"prompt": "", "answer": "1"}, None, "'prompt' must be"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, None, "'prompt' must be"),
        ({"prompt": [{"role": None, "content": "a"}], "answer": "1"}, None, "'prompt' must be"),
        ({"prompt": "a", "answer": ["1", "2"]}, None, "'answer' must be a text or a number"),
        ({"prompt": "a", "answer": True}, None, "'answer' must be a text or a number"),
        ({"prompt": "a", "answer": " "}, None, "'answer' is empty"),
        ({"prompt": "a", "answer": "1", "extra": 5}, None, "'extra' must be an object, found int"),
        ({"prompt": "a", "answer": "1", "extra": "{"}, None, "'extra' must be an object, found a text"),
        ({"prompt": "a", "answer": "1", "chat_template_kwargs": [1]}, None, "'chat_template_kwargs' must be"),
        ({"prompt": "a", "data_source": "s"}, None, "no 'reward_model'"),
        ({"prompt": "a", "reward_model": {}}, None, "no 'reward_model.ground_truth'"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, row: dict[str, Any], mapping: str | None, said: str) -> None:
    good = {"prompt": "a", "question": "a", "quest": "a", "idx": 1, "m": "s", "answer": "1"}
    path = write(tmp_path / "p.jsonl", good, row)
    with pytest.raises(InputError, match=f"p.jsonl:2: {said}") as raised:
        records(path, mapping)
    assert "\n" not in str(raised.value)


def test_an_empty_answer_that_a_verifier_of_its_own_reads(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "a", "answer": "", "source": "s", "verifier": "reasoning-gym"}
    assert records(write(tmp_path / "p.jsonl", row)) == [row]


def test_prompts_alone_need_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"question": "b"}, {"prompt": MESSAGES})
    assert list(prompt_texts(open_dataset(str(path)), {"prompt": "question"})) == ["a", "b", MESSAGES]
    with pytest.raises(InputError, match=r"p.jsonl:2: no 'prompt'"):
        list(prompt_texts(open_dataset(str(path))))
