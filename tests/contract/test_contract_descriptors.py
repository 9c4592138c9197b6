"""Standard descriptors that are closed, pipes that are read once or never answer, and Ctrl-C before anything has begun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
SCORES = '{"id": "a", "source": "s", "scores": {"t": 0.5}, "pass_rate": 0.5, "norm": 1.0, "status": "ok"}\n'
PROMPTS = '{"id": "a", "prompt": "1+1=", "answer": "2", "source": "s"}\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "scores.jsonl").write_text(SCORES)
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    return tmp_path


def shell(line: str, place: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", line], cwd=place, capture_output=True, text=True, timeout=60, env=environment, **options
    )


SELECT = "cropi-select scores.jsonl --prompts prompts.jsonl --ratio 1"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_change_no_file(place: Path, closed: str) -> None:
    whole = shell(f"{SELECT} -o expected.jsonl", place)
    assert whole.returncode == 0, whole.stderr
    done = shell(f"{SELECT} -o found.jsonl {closed}", place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (place / "found.jsonl").read_bytes() == (place / "expected.jsonl").read_bytes()
    refused = shell(f"cropi-select nothing.jsonl --prompts prompts.jsonl --ratio 1 -o x.jsonl {closed}", place)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == ("2>&-" not in closed)


def test_data_for_a_closed_stdout_is_an_error(place: Path) -> None:
    done = shell(f"{SELECT} -o - --quiet >&-", place)
    assert done.returncode == 1
    assert done.stderr.startswith("cropi-select: ")
    assert done.stderr.count("\n") == 1


def test_closed_stdin_holds_no_record(place: Path) -> None:
    done = shell("cropi-select - --prompts prompts.jsonl --ratio 1 -o x.jsonl <&-", place)
    assert done.returncode == 1
    assert "standard input" in done.stderr
    assert done.stderr.count("\n") == 1


def test_process_substitution_is_read_once(place: Path) -> None:
    """Inputs are hashed and then read; a pipe cannot be read twice."""
    plain = shell(f"{SELECT} -o expected.jsonl", place)
    assert plain.returncode == 0, plain.stderr
    done = shell("cropi-select <(cat scores.jsonl) --prompts <(cat prompts.jsonl) --ratio 1 -o found.jsonl", place)
    assert done.returncode == 0, done.stderr
    assert (place / "found.jsonl").read_bytes() == (place / "expected.jsonl").read_bytes()


@pytest.mark.parametrize("writer", [False, True], ids=["nobody opens it", "nobody writes"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR2, 143), (signal.SIGINT, 130)],
    ids=["TERM", "USR2", "INT"],
)
def test_a_pipe_that_never_answers(place: Path, number: signal.Signals, code: int, writer: bool) -> None:
    os.mkfifo(place / "pipe.jsonl")
    words = [str(BIN / "cropi-select"), "pipe.jsonl", "--prompts", "prompts.jsonl", "--ratio", "1", "-o", "x.jsonl"]
    process = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    held = os.open(place / "pipe.jsonl", os.O_RDWR) if writer else None
    try:
        waiting(process)
        process.send_signal(number)
        said = process.communicate(timeout=5)
    finally:
        process.kill()
        if held is not None:
            os.close(held)
    assert process.returncode == code
    assert said[0] == ""
    assert said[1].count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == ["pipe.jsonl", "prompts.jsonl", "scores.jsonl"]


def waiting(process: subprocess.Popen[str]) -> None:
    """Until the command sleeps with its signal handlers set (its imports are done and it waits for the pipe)."""
    deadline = time.monotonic() + 30
    quiet = 0
    while quiet < 5:
        assert time.monotonic() < deadline
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        caught = int(Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
        quiet = quiet + 1 if fields[0] == "S" and caught >> (signal.SIGTERM - 1) & 1 else 0
        time.sleep(0.05)


def test_interrupted_while_it_is_imported(place: Path) -> None:
    """In the first tenths of a second: 130 and at most one line, whatever had been reached."""
    words = [str(BIN / "cropi-select"), "scores.jsonl", "--prompts", "prompts.jsonl", "--ratio", "1", "-o", "x.jsonl"]
    codes = []
    for step in range(12):
        process = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        caught = 0
        while not caught & 1 << (signal.SIGINT - 1) and process.poll() is None:
            caught = int(Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
        time.sleep(0.02 + 0.015 * step)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)
        codes.append(process.returncode)
        starting = process.returncode == -signal.SIGINT and "cropi_tools/cli/common.py" not in said[1]
        if starting or "Failed to import the site module" in said[1]:
            continue  # Python itself was still starting: nothing of ours could answer yet
        assert process.returncode in (0, 130), said
        assert "Traceback" not in said[1]
        if process.returncode == 130:
            assert said[1].count("\n") == 1
    assert 130 in codes


@pytest.mark.parametrize(
    "text", ["\x1b]0;owned\x07", "a\nwarning: all is lost", "\x9b31m", "\r", "\u202eneddih", "\u2028"]
)
@pytest.mark.parametrize("field", ["id", "source"])
def test_what_others_wrote_reaches_the_terminal_as_one_harmless_line(place: Path, text: str, field: str) -> None:
    record = {"id": "a", "prompt": "1+1=", "answer": "2", "source": "s", field: text}
    (place / "twice.jsonl").write_text(2 * (json.dumps(record) + "\n"))
    for line in ("cropi-select --by full --prompts twice.jsonl -o x.jsonl", "cropi-prompts twice.jsonl -o y.jsonl"):
        said = shell(line, place).stderr
        assert all(one.isprintable() for one in said.replace("\n", ""))
        assert said.count("\n") <= 2, said
    missing = shell(f"cropi-select $'{text.encode('unicode_escape').decode()}' --prompts twice.jsonl -o z.jsonl", place)
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    assert missing.stderr[:-1].isprintable()
