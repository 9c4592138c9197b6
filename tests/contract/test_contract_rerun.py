"""The same line again does nothing, another line does not replace a result unasked."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_table import CASES, HEAVY, Case, leftovers, own, same_content
from shell import PATIENCE, Shell, signalled

MODULES = """
import sys
from cropi_tools.cli.{name} import main
try:
    main()
finally:
    print("MODULES", *sys.modules, file=sys.stderr)
"""
# numpy and zarr come with what light commands read; a finished output needs no policy
UNNEEDED = HEAVY - {"numpy", "zarr"}

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def state_of(output: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a result and of its manifest."""
    beside = output.with_name(output.name + ".manifest.json")
    files = [*output.rglob("*"), output, *([beside] if beside.exists() else [])]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()}


@each
def test_a_finished_output_is_up_to_date_at_once(case: Case, place: Path) -> None:
    output = own(place / case.output)
    before = state_of(output)
    program, *words = case.line
    code = MODULES.format(name=program.removeprefix("cropi-"))
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=place, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    said, _, modules = done.stderr.partition("MODULES")
    assert f"{case.output}: up to date" in said.splitlines()[0]
    assert UNNEEDED & {module.partition(".")[0] for module in modules.split()} == set()
    assert state_of(output) == before
    assert leftovers(output) == []


@each
def test_other_options_are_refused_and_force_replaces(case: Case, chain: Path, place: Path, shell: Shell) -> None:
    output = own(place / case.output)
    before = state_of(output)
    words = [*case.line, *case.other.split(), "--quiet"]
    done = shell(words, place, code=1)
    assert len(done.errors) == 1
    for part in (case.output, case.differs, "--force"):
        assert part in done.errors[0]
    assert state_of(output) == before
    assert leftovers(output) == []
    shell([*words, "--force"], place)
    assert leftovers(output) == []
    with pytest.raises(AssertionError):
        same_content(output, chain / case.output, case.exempt)
    assert "up to date" in shell(words[:-1], place).stderr


def test_changed_inputs_are_refused(place: Path, shell: Shell) -> None:
    case = by_name("select")
    own(place / case.output)
    prompts = own(place / "prompts.jsonl")
    prompts.write_text(prompts.read_text().replace('"answer": "0"', '"answer": "1"'))
    done = shell(case.line, place, code=1)
    assert "the contents of prompts" in done.errors[0]
    shell([*case.line, "--force"], place)


def test_a_moved_input_is_the_same_input(place: Path, shell: Shell) -> None:
    case = by_name("select")
    own(place / case.output)
    (place / "prompts.jsonl").rename(place / "moved.jsonl")
    words = ["moved.jsonl" if word == "prompts.jsonl" else word for word in case.line]
    assert "up to date" in shell(words, place).stderr


def test_an_output_changed_by_hand_is_refused(place: Path, shell: Shell) -> None:
    case = by_name("select")
    output = own(place / case.output)
    output.write_text(output.read_text() + "\n")
    done = shell(case.line, place, code=1)
    assert "selected.jsonl was changed since it was written" in done.errors[0]


def test_a_file_of_somebody_else_is_refused(place: Path, shell: Shell) -> None:
    (place / "mine").write_text("precious")
    for case in (by_name("select"), by_name("train")):
        done = shell(case.to("mine"), place, code=1)
        assert len(done.errors) == 1
        assert "mine" in done.errors[0]
    assert (place / "mine").read_text() == "precious"


def test_a_folder_that_is_missing_is_named(place: Path, shell: Shell) -> None:
    for case in CASES:
        done = shell(case.to("nowhere/" + case.output), place, code=1)
        assert done.errors == [f"{case.line[0]}: nowhere: no such folder; make it first"]


def test_two_processes_do_not_write_one_output(place: Path, shell: Shell) -> None:
    case = by_name("select")
    with open(place / "mine.jsonl.part.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = shell(case.to("mine.jsonl"), place, code=1)
    assert "another process is writing it" in done.errors[0]
    shell(case.to("mine.jsonl"), place)


def test_unfinished_work_of_other_options_is_refused(place: Path, shell: Shell) -> None:
    case = by_name("rollout")
    progress = place / "mine.jsonl.part.json"
    stop = signalled(signal.SIGTERM, progress.exists)
    shell(case.to("mine.jsonl"), place, code=143, meanwhile=stop)
    kept = json.loads(progress.read_text())["committed"]["lines"]
    assert 0 < kept < 12
    words = [*case.to("mine.jsonl"), *case.other.split()]
    done = shell(words, place, code=1)
    assert len(done.errors) == 1
    for part in ("mine.jsonl.part", case.differs, "--force"):
        assert part in done.errors[0]
    assert json.loads(progress.read_text())["committed"]["lines"] == kept
    shell([*words, "--force"], place)
    assert leftovers(place / "mine.jsonl") == []
