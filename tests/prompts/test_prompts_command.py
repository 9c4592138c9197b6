"""cropi-prompts and cropi-select as a shell runs them: data of others in and out, what is said, what the manifest keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import tiny_policy

Run = Callable[..., CompletedProcess[str]]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())


def table(path: Path, *lines: str) -> None:
    path.write_text("question,final,level\n" + "".join(line + "\n" for line in lines))


def test_what_is_left_out_is_said_file_by_file(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "q.csv", "a,1,x", "b,2,x", "A,1,x", "c,3,x", "a,7,x", "d,4,x", "d,4,y")
    tiny_policy.write_jsonl(tmp_path / "valid.jsonl", [{"prompt": "B"}])
    tiny_policy.write_jsonl(tmp_path / "test.jsonl", [{"prompt": [{"role": "user", "content": "c"}]}, {"prompt": "z"}])
    tiny_policy.write_jsonl(tmp_path / "other.jsonl", [{"prompt": "d"}])
    words = ["cropi-prompts", "q.csv", "--map", "prompt=question", "--exclude", "valid.jsonl"]
    answer, other = ["--map", "answer=final"], ["--map", "answer=level"]
    words += ["--exclude", "test.jsonl", "--check-overlap", "other.jsonl", "-o", "p.jsonl"]
    said = run(*words, *answer).stderr.splitlines()
    assert said == [
        "p.jsonl: 2 prompts (2 excluded: 1 in valid.jsonl, 1 in test.jsonl; 2 exact and 1 normalized repetitions dropped)",
        "warning: 1 of the 2 questions stand in other.jsonl too; --exclude other.jsonl leaves them out",
        "warning: repetitions dropped whose answer is not that of the one kept: 1",
    ]
    assert read(tmp_path / "p.jsonl") == [
        {"id": "q-0", "prompt": "a", "answer": "1", "source": "q", "extra": {"level": "x"}},
        {"id": "q-5", "prompt": "d", "answer": "4", "source": "q", "extra": {"level": "x"}},
    ]
    made = manifest(tmp_path / "p.jsonl")
    assert made["skipped"] == {"excluded": 2, "exact repetitions": 2, "normalised repetitions": 1}
    assert made["facts"]["excluded"] == {"valid.jsonl": 1, "test.jsonl": 1}
    assert made["facts"]["overlap"] == {"other.jsonl": 1}
    assert list(made["inputs"]) == ["data", "excluded", "excluded 2", "overlap"]
    assert "up to date" in run(*words, *answer).stderr
    assert "map {'answer': 'final', 'prompt': 'question'}" in run(*words, *other, code=1).stderr


def test_the_record_carries_the_final_prompt(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "q.csv", "a,1,x")
    run(
        *("cropi-prompts", "q.csv", "--map", "prompt=question,answer=final", "--system", "Be brief."),
        *(
            "--template",
            "{prompt} ({level}) \\boxed{}",
            "--chat-template-kwargs",
            "enable_thinking=false",
            "-o",
            "p.jsonl",
        ),
    )
    (record,) = read(tmp_path / "p.jsonl")
    assert record["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a (x) \\boxed{}"},
    ]
    assert record["chat_template_kwargs"] == {"enable_thinking": False}
    run("cropi-prompts", "reasoning-gym:gcd", "--size", 1, "--system", "Be brief.", "-o", "g.jsonl")
    assert read(tmp_path / "g.jsonl")[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    # the bare question is known again under all this
    tiny_policy.write_jsonl(tmp_path / "test.jsonl", [{"prompt": "A"}])
    words = ["cropi-prompts", "q.csv", "--map", "prompt=question,answer=final", "--template", "Q: {prompt}"]
    assert "1 are in the excluded files" in run(*words, "--exclude", "test.jsonl", code=1).stderr


def test_there_and_back_through_verl_and_trl(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "q.csv", *(f"what is {i}?,{i},{i % 3}" for i in range(30)))
    run("cropi-prompts", "q.csv", "--map", "prompt=question,answer=final", "-o", "p.jsonl")
    selected = {record["id"]: record for record in read(tmp_path / "p.jsonl")}
    for form, name in (("verl", "s.parquet"), ("verl", "s.jsonl"), ("trl", "t.parquet"), ("trl", "t.jsonl")):
        words = [
            "cropi-select",
            "--prompts",
            "p.jsonl",
            "--by",
            "random",
            "--ratio",
            "0.5",
            "--format",
            form,
            "-o",
            name,
        ]
        run(*words)
        first = (tmp_path / name).read_bytes()
        assert "up to date" in run(*words).stderr
        run(*words, "--force")
        assert (tmp_path / name).read_bytes() == first, "the same line gives the same bytes"
        run("cropi-prompts", name, "--force", "-o", "back.jsonl")
        back = read(tmp_path / "back.jsonl")
        assert len(back) == manifest(tmp_path / name)["rows"] == 15
        for record in back:
            if form == "trl":
                record["prompt"] = record["prompt"][0]["content"]
            assert record == selected[record["id"]]
    refused = run("cropi-select", "--prompts", "p.jsonl", "--by", "full", "-o", "x.parquet", code=2).stderr
    assert "--format verl or trl" in refused


def test_the_other_trainers_settings_are_named(run: Run, tmp_path: Path) -> None:
    record = {
        "id": "a",
        "prompt": "1?",
        "answer": "1",
        "source": "s",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", [record])
    said = run("cropi-select", "--prompts", "p.jsonl", "--by", "full", "--format", "verl").stderr
    assert "warning: verl takes chat_template_kwargs from its settings: +data.apply_chat_template_kwargs" in said


def test_a_compressed_file_and_a_folder_are_sources_too(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "q.csv", "a,1,x", "b,2,y")
    run("cropi-prompts", "q.csv", "--map", "prompt=question,answer=final", "-o", "p.jsonl.zst")
    (tmp_path / "hub").mkdir()
    run("cropi-select", "--prompts", "p.jsonl.zst", "--by", "full", "--format", "trl", "-o", "hub/train-0.parquet")
    run(
        "cropi-select",
        "--prompts",
        "p.jsonl.zst",
        "--by",
        "random",
        "--ratio",
        "0.5",
        "--format",
        "trl",
        "-o",
        "hub/test-0.jsonl",
    )
    (tmp_path / "hub" / "test-0.jsonl.manifest.json").unlink()
    (tmp_path / "hub" / "train-0.parquet.manifest.json").unlink()
    assert "holds the splits test, train; choose one with --split" in run("cropi-prompts", "hub", code=1).stderr
    assert len(run("cropi-prompts", "hub", "--split", "train").stdout.splitlines()) == 2
    assert len(run("cropi-prompts", "hub", "--split", "test").stdout.splitlines()) == 1


def test_ids_that_two_files_share_are_refused(run: Run, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        table(tmp_path / folder / "q.csv", f"{folder},1,x")
    words = ["cropi-prompts", "one/q.csv", "two/q.csv", "--map", "prompt=question,answer=final"]
    assert "two/q.csv:2: id 'q-0' comes twice" in run(*words, "-o", "p.jsonl", code=1).stderr
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("-o q.csv --force", 2, "name it .jsonl"),
        ("-o p.parquet", 2, "name it .jsonl"),
        ("-o p.jsonl --template=", 2, "--template is empty"),
        ("-o p.jsonl --answer-template=", 2, "--answer-template is empty"),
        ("-o p.jsonl --check-overlap empty.jsonl", 1, "empty.jsonl: holds no record"),
        ("-o p.jsonl --map prompt=level", 2, "'prompt' is filled twice"),
    ],
)
def test_what_would_go_wrong_later_is_refused(run: Run, tmp_path: Path, words: str, code: int, message: str) -> None:
    table(tmp_path / "q.csv", "a,1,x")
    (tmp_path / "empty.jsonl").write_text("")
    before = (tmp_path / "q.csv").read_text()
    command = ("cropi-prompts", "q.csv", "--map", "prompt=question,answer=final", *words.split())
    assert message in run(*command, code=code).stderr
    assert (tmp_path / "q.csv").read_text() == before
    assert not (tmp_path / "p.jsonl").exists()


def test_an_input_is_never_the_output(run: Run, tmp_path: Path) -> None:
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(3))
    before = (tmp_path / "p.jsonl").read_text()
    (tmp_path / "same.jsonl").symlink_to("p.jsonl")
    for name in ("p.jsonl", "same.jsonl"):
        said = run("cropi-prompts", "p.jsonl", "--size", "1", "-o", name, "--force", code=1).stderr
        assert "is an input of this command" in said
    assert (tmp_path / "p.jsonl").read_text() == before


def test_no_number_is_no_answer(run: Run, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "a?", "answer": NaN}\n')
    assert "is nan, which is no answer" in run("cropi-prompts", "q.jsonl", "-o", "p.jsonl", code=1).stderr


def test_columns_have_names_of_their_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("prompt,answer,answer\na,1,2\n")
    assert "two columns are named 'answer'" in run("cropi-prompts", "q.csv", "-o", "p.jsonl", code=1).stderr


def test_fewer_than_asked_for_is_said(run: Run, tmp_path: Path) -> None:
    tiny_policy.write_jsonl(tmp_path / "q.jsonl", tiny_policy.prompts(3))
    said = run(*["cropi-prompts", "q.jsonl", "--size", "5", "-o", "p.jsonl"]).stderr
    assert "q.jsonl has only 3 further questions, not 5" in said


def test_the_names_of_files_count_where_they_name_records(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer\nx,1\n")
    run(*["cropi-prompts", "a.csv", "-o", "p.jsonl"])
    (tmp_path / "a.csv").rename(tmp_path / "b.csv")
    assert "names ['a'], now ['b']" in run(*["cropi-prompts", "b.csv", "-o", "p.jsonl"], code=1).stderr
    run(*["cropi-prompts", "b.csv", "--source", "s", "-o", "s.jsonl"])
    (tmp_path / "b.csv").rename(tmp_path / "c.csv")
    assert "up to date" in run(*["cropi-prompts", "c.csv", "--source", "s", "-o", "s.jsonl"]).stderr
