"""Tables as pandas and others leave them: NaN in columns, messages as text, shards that hold nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from cropi_tools.data.message_text import messages_of
from cropi_tools.data.records import read_prompts, read_rollouts, read_scores
from cropi_tools.prompts.datasets import open_dataset
from cropi_tools.prompts.row_formats import dataset_prompts, prompt_texts
from cropi_tools.prompts.templates import PromptTemplate
from cropi_tools.runtime.errors import InputError

NAN, INF = math.nan, math.inf
ROW: dict[str, Any] = {"id": "a", "prompt": "1+1=", "answer": "2", "source": "s"}
SAMPLE = {"token_ids": [3, 1], "logprobs": [-0.5, -1.0], "reward": 1.0, "text": "2", "finish_reason": "stop"}
ROLLOUT = {**ROW, "prompt_token_ids": [5], "samples": [SAMPLE, SAMPLE]}
SCORE = {"id": "a", "source": "s", "scores": {"t": 0.5}, "pass_rate": 0.5, "status": "ok", "norm": 1.0}


def jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def table(path: Path, *rows: dict[str, Any]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def made(path: Path, **mapping: str) -> list[dict[str, Any]]:
    """What cropi-prompts makes of a file."""
    return [record for _, _, record in dataset_prompts(open_dataset(str(path)), mapping)]


def warned(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


class TestNotFinite:
    @pytest.mark.parametrize("value", [NAN, INF, -INF, {"deep": [{"er": NAN}]}, [NAN, 1.0]], ids=str)
    @pytest.mark.parametrize("write", [jsonl, table])
    @pytest.mark.parametrize("column", ["weight", "extra", "level", "pass_rate"])
    def test_a_column_nobody_reads_is_null(
        self, column: str, write: Callable[..., Path], value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        held = {"x": value} if column == "extra" else value
        rows = [{**ROW, "id": "a", column: held}, {**ROW, "id": "b", column: held}, {**ROW, "id": "c"}]
        path = write(tmp_path / f"q.{'jsonl' if write is jsonl else 'parquet'}", *rows)
        found = made(path)
        assert [record["id"] for record in found] == ["a", "b", "c"]
        json.dumps(found, allow_nan=False)
        (said,) = warned(capsys)
        assert said.startswith(f"warning: {path}: numbers that are not finite")
        assert f"'{column}" in said
        assert "(2 rows)" in said

    def test_it_is_told_once_in_a_process(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = jsonl(tmp_path / "p.jsonl", {**ROW, "extra": {"x": NAN, "y": 1.5}})
        for _ in range(3):
            (record,) = read_prompts([path])
            assert record["extra"] == {"x": None, "y": 1.5}
        assert len(warned(capsys)) == 1

    def test_beside_characters_that_json_escapes(self, tmp_path: Path) -> None:
        """Half of a surrogate pair is looked for where escapes may write one."""
        path = tmp_path / "p.jsonl"
        path.write_text('{"id": "a", "prompt": "\\ud83d\\ude00", "answer": "1", "source": "s", "x": 1e999, "y": NaN}\n')
        (record,) = read_prompts([path])
        assert (record["prompt"], record["x"], record["y"]) == ("\U0001f600", None, None)

    def test_a_reader_that_wants_no_more_is_told_too(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        reader = read_prompts([jsonl(tmp_path / "p.jsonl", {**ROW, "x": NAN}, {**ROW, "id": "b"})])
        next(reader)
        reader.close()
        assert "'x' (1 row)" in warned(capsys)[0]

    @pytest.mark.parametrize(
        ("read", "record"),
        [
            (read_prompts, {**ROW, "score": NAN}),
            (read_prompts, {**ROW, "extra": {"x": INF}}),
            (read_rollouts, {**ROLLOUT, "extra": {"x": NAN}}),
            (read_rollouts, {**ROLLOUT, "samples": [SAMPLE, {**SAMPLE, "seconds": NAN}]}),
            (read_scores, {**SCORE, "norm": NAN}),
            (read_scores, {**SCORE, "note": [NAN]}),
        ],
    )
    def test_every_reader_carries_null(self, read: Any, record: dict[str, Any], tmp_path: Path) -> None:
        (found,) = read([jsonl(tmp_path / "f.jsonl", record)])
        json.dumps(getattr(found, "record", found), allow_nan=False)

    @pytest.mark.parametrize(
        ("read", "record", "column"),
        [
            (read_prompts, {**ROW, "prompt": [{"role": "user", "content": NAN}]}, "prompt.content"),
            (read_prompts, {**ROW, "answer": NAN}, "answer"),
            (read_prompts, {**ROW, "source": NAN}, "source"),
            (read_prompts, {**ROW, "id": NAN}, "id"),
            (read_prompts, {**ROW, "chat_template_kwargs": {"x": INF}}, "chat_template_kwargs.x"),
            (read_rollouts, {**ROLLOUT, "samples": [{**SAMPLE, "reward": NAN}]}, "reward"),
            (read_rollouts, {**ROLLOUT, "samples": [{**SAMPLE, "logprobs": [0.0, NAN]}]}, "logprobs"),
            (read_scores, {**SCORE, "scores": {"t": NAN}}, "scores.t"),
            (read_scores, {**SCORE, "pass_rate": NAN}, "pass_rate"),
        ],
    )
    def test_what_is_read_is_refused_with_its_place(
        self, read: Any, record: dict[str, Any], column: str, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=rf"f\.jsonl:1: .*'{column}'.* finite number"):
            list(read([jsonl(tmp_path / "f.jsonl", record)]))

    @pytest.mark.parametrize("column", ["id", "prompt", "answer", "source", "verifier"])
    def test_so_it_is_in_tables(self, column: str, tmp_path: Path) -> None:
        row = {**ROW, "verifier": "exact", column: NAN}
        with pytest.raises(InputError, match=rf"q\.parquet: row 1: .*'{column}'"):
            made(table(tmp_path / "q.parquet", row))
        mapped = {**ROW, "own": NAN}
        with pytest.raises(InputError, match=r"q\.parquet: row 1: .*'own'"):
            made(table(tmp_path / "q.parquet", mapped), **{column: "own"})

    def test_the_answer_of_another_column_is_not_read(self, tmp_path: Path) -> None:
        (found,) = made(table(tmp_path / "q.parquet", {**ROW, "solution": NAN}))
        assert found["answer"] == "2"
        assert "extra" not in found or found["extra"].get("solution") is None

    def test_a_template_reads_its_columns(self, tmp_path: Path) -> None:
        path = table(tmp_path / "q.parquet", {**ROW, "level": NAN, "other": NAN})
        ((where, row, record),) = dataset_prompts(open_dataset(str(path)))
        PromptTemplate(template="{prompt} please").of_row(record, row, where)
        for templates in ({"template": "{prompt} at {level}"}, {"answer_template": "{level}"}):
            with pytest.raises(InputError, match=r"row 1: .*'level' is nan, not a finite number"):
                PromptTemplate(**templates).of_row(record, row, where)


MESSAGES = [{"role": "system", "content": 'Don\'t\nguess \\ "x"'}, {"role": "user", "content": "1+1=é?"}]
AS_TEXT: dict[str, str] = {
    "JSON": json.dumps(MESSAGES),
    "JSON, indented": json.dumps(MESSAGES, indent=2, ensure_ascii=False),
    "as Python prints it": str(MESSAGES),
    "as numpy prints it": str(np.array(MESSAGES, dtype=object)),
    "with more keys": json.dumps([{**message, "name": None} for message in MESSAGES]),
    "with white space around": f"\n {MESSAGES!r} ",
}
PLAIN = [
    "Which role and content? [1, 2]",
    "[1, 2]",
    "[]",
    '["role", "content"]',
    '[{"role": "user"}]',
    '[{"role": 1, "content": "x"}]',
    '[{"role": "user", "content": ["x"]}]',
    '[{"role": "user", "content": "x"}, 5]',
    '[{"role": "user", "content": "x"}] and more, of role and content',
    '{"role": "user", "content": "x"}',
    '[{"role": "user", "content": "x"',
    "[__import__('os').system('echo role content')]",
    '[{"role": "user", "content": "\\ud800"}]',
    "[" * 5000 + "role content" + "]" * 5000,
]


class TestMessagesAsText:
    @pytest.mark.parametrize("name", AS_TEXT)
    def test_they_are_read_as_messages(self, name: str) -> None:
        assert messages_of(AS_TEXT[name]) == MESSAGES

    @pytest.mark.parametrize("text", PLAIN, ids=lambda text: text[:30])
    def test_other_texts_stay_texts(self, text: str) -> None:
        assert messages_of(text) is None

    @pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
    def test_by_every_reader_and_told_once(self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [
            {**ROW, "id": "a", "prompt": AS_TEXT["JSON"]},
            {**ROW, "id": "b"},
            {**ROW, "id": "c", "prompt": str(MESSAGES)},
        ]
        path = tmp_path / f"q.{kind}"
        if kind == "csv":
            import csv

            with open(path, "w", newline="") as stream:
                writer = csv.DictWriter(stream, ROW)
                writer.writeheader()
                writer.writerows(rows)
        else:
            (jsonl if kind == "jsonl" else table)(path, *rows)
        found = made(path)
        assert [record["prompt"] for record in found] == [MESSAGES, "1+1=", MESSAGES]
        assert warned(capsys) == [f"{path}: 2 prompts are texts that list messages; they are read as messages"]
        assert list(prompt_texts(open_dataset(str(path)))) == [MESSAGES, "1+1=", MESSAGES]
        if kind == "jsonl":
            assert [record["prompt"] for record in read_prompts([path])] == [MESSAGES, "1+1=", MESSAGES]

    def test_verl_rows_of_structs_and_of_texts_are_the_same(self, tmp_path: Path) -> None:
        """As its own preprocessing writes them, and as they are after a detour by CSV."""
        row = {
            "data_source": "s",
            "prompt": MESSAGES,
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": 7},
        }
        structs = made(table(tmp_path / "q.parquet", row))
        texts = {name: value if isinstance(value, str) else str(value) for name, value in row.items()}
        assert made(table(tmp_path / "t.parquet", texts)) == [{**structs[0], "id": "t-7"}]
        assert structs[0]["prompt"] == MESSAGES
