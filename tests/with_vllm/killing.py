"""cropi-rollout killed and started again, whatever samples for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PROGRAM = str(Path(sys.executable).parent / "cropi-rollout")


def finish(folder: Path, words: Sequence[str]) -> None:
    """Run to the end, quietly."""
    done = subprocess.run([PROGRAM, *words], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())


def stop(folder: Path, words: Sequence[str], output: str, number: signal.Signals) -> int:
    """Run until it has added to what is there, then send a signal; returns the exit status."""
    part = folder / f"{output}.part"
    before = part.stat().st_size if part.exists() else 0
    process = subprocess.Popen([PROGRAM, *words], cwd=folder, stderr=subprocess.PIPE)
    until = time.monotonic() + 240
    while not part.exists() or part.stat().st_size <= before:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert not (folder / output).exists()
    return process.returncode


def samples(path: Path) -> list[tuple[str, list[list[int]], list[list[float]]]]:
    """Ids, tokens and log-probabilities of a rollouts file."""
    return [
        (row["id"], [s["token_ids"] for s in row["samples"]], [s["logprobs"] for s in row["samples"]])
        for row in map(json.loads, path.read_text().splitlines())
    ]


def same_samples(first: Path, second: Path) -> None:
    """Fail unless two files have the same ids, the same tokens, and log-probabilities up to rounding, in the same order."""
    whole, resumed = samples(first), samples(second)
    assert [row[:2] for row in resumed] == [row[:2] for row in whole]
    for one, other in zip(whole, resumed, strict=True):
        for told, again in zip(one[2], other[2], strict=True):
            assert told == pytest.approx(again, abs=1e-4)
    facts = [facts_of(path) for path in (first, second)]
    assert facts[0]["summary"] == facts[1]["summary"]
    assert facts[0]["sampling"] == facts[1]["sampling"]


def facts_of(path: Path) -> dict[str, Any]:
    """The facts of an output's manifest."""
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())["facts"]
