"""What verl and TRL are given, and that we read it back. Their own loaders open it in tests/peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from cropi_tools.data.manifest import Fingerprint, read_manifest
from cropi_tools.prompts.datasets import open_dataset
from cropi_tools.prompts.exports import Format, TableOutput, exported, settings_needed, to_verl
from cropi_tools.prompts.recipes import reasoning_gym_prompts
from cropi_tools.prompts.row_formats import as_messages, dataset_prompts
from cropi_tools.runtime.errors import InputError

THINKING = {"enable_thinking": False}
RECORDS: list[dict[str, Any]] = [
    *reasoning_gym_prompts("gcd", 2, 1),
    *reasoning_gym_prompts("simple_equations", 2, 1),
    {"id": "x", "prompt": [{"role": "user", "content": "one?"}], "answer": "1", "source": "s"},
    {"id": "y", "prompt": "two?", "answer": "2", "source": "s", "extra": {"level": 3, "big": 2**70, "ok": True}},
    {"id": "z", "prompt": "three?", "answer": "3", "source": "s", "extra": {"level": 4, "images": "none"}},
]
RECORDS = [{**record, "chat_template_kwargs": THINKING} for record in RECORDS]


def written(form: Format, path: Path) -> Path:
    selected = {"rank": 1, "score": {"t": 0.25, "NAME/ID": -1.0}, "reciprocal_rank": 0.5, "pass_rate": 0.5}
    rows = list(exported([{**record, **selected} for record in RECORDS], form))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    target = TableOutput(path, Fingerprint.of("cropi-select", {}, {}), {})
    assert target.open()
    target.append(rows)
    target.finish()
    assert (read_manifest(path) or {})["rows"] == len(rows)
    return path


@pytest.mark.parametrize("name", ["s.parquet", "s.jsonl"])
def test_verl_rows_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    opened = open_dataset(str(written("verl", tmp_path / name)))
    assert [record for _, _, record in dataset_prompts(opened)] == RECORDS


@pytest.mark.parametrize("name", ["s.parquet", "s.jsonl"])
def test_trl_rows_come_back_with_their_text_as_messages(name: str, tmp_path: Path) -> None:
    opened = open_dataset(str(written("trl", tmp_path / name)))
    found = [record for _, _, record in dataset_prompts(opened)]
    assert found == [{**record, "prompt": as_messages(record["prompt"])} for record in RECORDS]


def test_trl_gets_plain_columns_for_its_rewards(tmp_path: Path) -> None:
    table = parquet.read_table(written("trl", tmp_path / "s.parquet")).to_pylist()
    assert {
        "prompt",
        "answer",
        "id",
        "source",
        "verifier",
        "level",
        "ok",
        "extra",
        "rank",
        "pass_rate",
        "score",
    } <= table[0].keys()
    assert not {"images", "big", "reasoning_gym"} & table[0].keys()
    assert [row["level"] for row in table[-3:]] == [None, 3, 4]
    assert json.loads(table[-2]["extra"]) == {"big": 2**70}
    assert table[0]["chat_template_kwargs"] == THINKING


def test_a_column_has_one_type() -> None:
    records = [{**RECORDS[-1], "extra": {"level": value}} for value in (3, "hard")]
    assert [json.loads(row["extra"]) for row in exported(records, "trl")] == [{"level": 3}, {"level": "hard"}]


@pytest.mark.parametrize("form", ["verl", "trl"])
@pytest.mark.parametrize("other", [{}, {"enable_thinking": True}])
def test_settings_of_templates_that_differ_are_no_one_setting(form: Any, other: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has other chat_template_kwargs"):
        settings_needed([RECORDS[0], {**RECORDS[1], "chat_template_kwargs": other}], form)


def test_verl_rows_have_one_type_a_field() -> None:
    assert {tuple(sorted(to_verl(record)["extra_info"])) for record in RECORDS} == {
        ("chat_template_kwargs", "extra", "index", "prompt_form", "rest", "split", "verifier")
    }
    assert all(type(value) is str for record in RECORDS for value in to_verl(record)["extra_info"].values())


def test_what_the_other_trainer_must_be_told() -> None:
    assert settings_needed(RECORDS, "jsonl") is None
    assert settings_needed([{**RECORDS[0], "chat_template_kwargs": {}}], "verl") is None
    assert "+data.apply_chat_template_kwargs.enable_thinking=false" in (settings_needed(RECORDS, "verl") or "")
    assert "GRPOConfig(chat_template_kwargs={'enable_thinking': False})" in (settings_needed(RECORDS, "trl") or "")
