"""--dry-run of every command that can take minutes: it says what all of the work will take, writes nothing, and minds nothing that is there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from command_table import CASES, COMMANDS, Case
from shell import Shell

ESTIMATED = ("rollout", "verify", "grad", "project", "score", "train")
ASKED = [case for case in CASES if case.line[0].removeprefix("cropi-") in ESTIMATED]


def test_the_commands_that_have_one() -> None:
    have = {
        name
        for name in COMMANDS
        if hasattr(importlib.import_module(f"cropi_tools.cli.{name}").main.record, "dry_run")  # its field's default
    }
    assert have == set(ESTIMATED)


@pytest.mark.parametrize("case", ASKED, ids=lambda case: case.name)
def test_it_says_what_all_will_take_and_writes_nothing(case: Case, place: Path, shell: Shell) -> None:
    """Though a result of other options is there."""
    before = sorted(place.rglob("*"))
    done = shell([*case.line, *case.other.split(), "--dry-run"], place)
    assert sorted(place.rglob("*")) == before
    first, *lines = done.stdout.splitlines()
    assert first[0].isdigit()
    assert [line.partition(":")[0] for line in lines[:3]] == ["time", "disk", "memory"]
    assert lines[-1].startswith("from ")
    assert lines[-1].endswith("; nothing was written")
    assert "trained for" not in done.stderr  # of the probe
    assert "up to date" not in done.stderr


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        *(("rollout", 0.8, 1.2), ("verify", 0.9, 1.1), ("grad-mean", 0.9, 1.1), ("grad-store", 0.9, 1.1)),
        *(("project", 0.9, 1.1), ("score", 0.99, 1.01)),
    ],
)
def test_the_disk_it_says_is_what_is_taken(name: str, low: float, high: float, place: Path, shell: Shell) -> None:
    (case,) = (case for case in CASES if case.name == name)
    said = json.loads(shell([*case.line, "--dry-run", "--json"], place).stdout)
    assert said["seconds"] > 0
    output = place / case.output
    taken = sum(path.stat().st_size for path in (output.rglob("*") if output.is_dir() else [output]) if path.is_file())
    assert low < said["disk"] / taken < high


def test_an_update_is_timed_where_no_prompt_has_an_advantage(place: Path, shell: Shell) -> None:
    words = "cropi-train --model P0 selected.jsonl --steps 10 --batch 4 -n 2 --max-tokens 4 --verifier exact -o P9"
    done = shell([*words.split(), "--dry-run", "--json"], place)
    said = json.loads(done.stdout)
    assert not said["live"]
    assert said["seconds_update"] > 0
    assert said["seconds"] == pytest.approx(10 * (said["seconds_sampling"] + said["seconds_update"]))
    told = shell([*words.split(), "--dry-run"], place).stdout
    assert "no sampled prompt had responses of different rewards" in told


def test_an_estimate_as_json_is_of_a_dry_run(place: Path, shell: Shell) -> None:
    for words in ("cropi-grad --model P0 rollouts.jsonl -o g.zarr", "cropi-train --model P0 p.jsonl --steps 1 -o P9"):
        done = shell([*words.split(), "--json"], place, code=2)
        assert "--json prints the estimate of --dry-run" in done.errors[0]
