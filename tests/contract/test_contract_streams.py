"""`-` is a stream on both sides, and stdout holds nothing but data."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from command_table import CASES, Case, leftovers, own, same_content
from shell import Shell

LINES = [case for case in CASES if case.output.endswith(".jsonl")]


@pytest.mark.parametrize("case", LINES, ids=lambda case: case.name)
def test_the_same_lines_go_to_stdout(case: Case, place: Path, shell: Shell) -> None:
    assert shell(case.to("-"), place).stdout == (place / case.output).read_text()


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in case.inputs],
    ids=lambda value: getattr(value, "name", value),
)
def test_standard_input_is_read_like_a_file(case: Case, name: str, place: Path, shell: Shell) -> None:
    packed = name.endswith(".gz")
    text = gzip.decompress((place / name).read_bytes()).decode() if packed else (place / name).read_text()
    words = ["-" if word == name else word for word in case.to("from-stdin" + Path(case.output).suffix)]
    shell(words, place, stdin=text)
    if case.name == "prompts":  # its records name the file they came from only when they name no source themselves
        assert all(json.loads(line)["source"] in ("even", "odd") for line in text.splitlines())
    same_content(place / words[-1], place / case.output, case.exempt)


@pytest.mark.parametrize("case", LINES, ids=lambda case: case.name)
def test_a_reader_that_goes_away_ends_the_command_quietly(case: Case, place: Path, shell: Shell) -> None:
    pipe = place / "pipe"
    os.mkfifo(pipe)
    done = shell(
        [*case.to("-"), "--quiet"],
        place,
        code=1,
        stdout=pipe,
        meanwhile=lambda pid: os.close(os.open(pipe, os.O_RDONLY)),
    )
    assert done.stderr == ""


def test_quiet_says_nothing(place: Path, shell: Shell) -> None:
    for case in CASES:
        if case.light:
            said = shell([*case.to("quiet.jsonl"), "--quiet", "--force"], place).errors
            assert [line for line in said if not line.startswith("warning: ")] == []


def test_json_is_alone_on_stdout(place: Path, shell: Shell) -> None:
    rollout = next(case for case in CASES if case.name == "rollout")
    own(place / rollout.output)
    summary = json.loads(shell([*rollout.line, "--json"], place).stdout)  # up to date: the summary is still there
    assert summary["samples"] == 12 * 64
    done = shell([*rollout.to("-"), "--json"], place, code=2)
    assert done.stdout == ""
    assert leftovers(place / "-") == []
