"""The wish to stop: asked for once, insisted on the second time. And how far a command has come, on terminals and elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cropi_tools import runtime

PROGRAM = """
import time
from cropi_tools import runtime
runtime.install_signal_handlers()
print("ready", flush=True)
until = time.monotonic() + 30
while time.monotonic() < until:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_second_signal_ends_at_once_unless_it_is_the_first_passed_on(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # as make and shells do
    time.sleep(0.5)
    assert process.poll() is None
    time.sleep(2)
    process.send_signal(number)
    assert process.wait(10) == -number
    process.stdout.close()


NOTE = "reward 0.50  accuracy 0.25  entropy 2.00  KL 0.001  12.1k tokens/s"


def on_terminal(script: str, columns: int, kind: str = "xterm") -> list[list[str]]:
    """What a program draws on a terminal so wide, a list of lines for every time that it draws."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    surroundings = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=end, stdout=end, stderr=end, env={**surroundings, "TERM": kind}
    )
    os.close(end)
    told = b""
    # the other end closed is an error here
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 4096):
            told += part
    os.close(terminal)
    assert process.wait() == 0, told.decode()
    # every drawing begins with an erased line
    drawings = re.split(r"(?:\x1b\[\d*A|\x1b\[2K|\r(?!\n))+", told.decode())
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawing) for drawing in drawings]
    return [[line.rstrip() for line in drawing.splitlines() if line.strip()] for drawing in plain if drawing.strip()]


@pytest.mark.parametrize(
    ("columns", "below"),
    [
        (120, None),
        (46 + len(NOTE), None),
        (45 + len(NOTE), NOTE),
        (80, NOTE),
        (65, "reward 0.50  accuracy 0.25  entropy 2.00  KL 0.001"),
        (48, "reward 0.50  accuracy 0.25  entropy 2.00"),
    ],
)
def test_on_a_terminal_the_note_stands_beside_the_bar_or_below(columns: int, below: str | None) -> None:
    """Neither the count nor the time is squeezed for it, no line is wrapped, and no number is cut in two."""
    drawings = on_terminal(
        "from cropi_tools.runtime import progress\n"
        "with progress('training', 400, 3) as shown:\n"
        f"    shown.advance(note={NOTE!r})\n",
        columns,
    )
    bar = "training " + "━" * 20 + "   4/400 -:--:--"
    assert drawings == [[f"{bar} {NOTE}"] if below is None else [bar, below]]


def test_messages_stand_above_the_bar() -> None:
    drawings = on_terminal(
        "from cropi_tools import runtime\n"
        "with runtime.progress('training', 4) as shown:\n"
        "    runtime.notify('step 0: accuracy [test] 0.250')\n"
        f"    shown.advance(note={NOTE!r})\n",
        120,
    )
    assert drawings[0][0] == "step 0: accuracy [test] 0.250"
    assert drawings[-1][-1].endswith(NOTE)


def test_data_on_stdout_passes_the_bar_by(tmp_path: Path) -> None:
    drawings = on_terminal(
        "import sys\n"
        "from cropi_tools import runtime\n"
        f"sys.stdout = open({str(tmp_path / 'data')!r}, 'w')\n"
        "with runtime.progress('training', 4) as shown:\n"
        "    print('{\"step\": 1}')\n",
        80,
    )
    assert (tmp_path / "data").read_text() == '{"step": 1}\n'
    assert not any("step" in line for drawing in drawings for line in drawing)


SLOW = """
from cropi_tools import runtime
clock = [0.0]
runtime.time.monotonic = lambda: clock[0]
with runtime.progress("training", 10) as shown:
    for _ in range(4):
        clock[0] += 40
        shown.advance(note="reward 0.50")
    clock[0] += 10
"""


def test_on_a_terminal_slow_steps_have_a_time_left_that_runs() -> None:
    """Forty seconds a step, and ten into the fifth of ten."""
    assert on_terminal(SLOW, 120)[-1] == ["training " + "━" * 8 + "╺" + "━" * 11 + "  4/10 0:03:50 reward 0.50"]


def test_a_terminal_that_cannot_draw_gets_lines() -> None:
    drawings = on_terminal(SLOW, 120, "dumb")
    assert drawings[-1][-1] == "training: 4/10, 0:04:00 left, reward 0.50"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The present time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_plain_lines_carry_count_time_and_note(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with runtime.progress("training", 100, 40) as shown:
        for _ in range(12):
            clock[0] += 6
            shown.advance(note=NOTE)
    assert lines(capsys) == [
        f"training: {done}/100, {left} left, {NOTE}"
        for done, left in ((42, "0:05:48"), (47, "0:05:18"), (52, "0:04:48"))
    ]


def test_an_evaluation_before_the_first_step_is_no_part_of_it(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with runtime.progress("training", 10) as shown:
        clock[0] += 3600
        shown.advance()
        clock[0] += 60
        shown.advance()
    assert lines(capsys) == ["training: 1/10", "training: 2/10, 0:08:00 left"]


def test_pauses_between_steps_hardly_count_for_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every fifth step an evaluation of five minutes follows, of which the time left says nothing; steps have become faster since the start."""
    with runtime.progress("training", 200) as shown:
        for step in range(100):
            clock[0] += 30 if step < 60 else 20
            shown.advance()
            if step % 5 == 4:
                clock[0] += 300
    assert lines(capsys)[-1] == "training: 100/200, 0:33:20 left"


def test_steps_that_come_in_batches_have_the_batch_s_time(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixteen rows are ready at once, every 32 seconds."""
    with runtime.progress("gradients", 1600) as shown:
        for _ in range(10):
            clock[0] += 32
            for _ in range(16):
                shown.advance()
    assert lines(capsys)[-1] == "gradients: 145/1600, 0:48:30 left"


def test_quiet_is_silent(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_quiet", True)
    with runtime.progress("training", 10) as shown:
        clock[0] += 60
        shown.advance(note=NOTE)
    assert lines(capsys) == []
    script = f"from cropi_tools import runtime\nruntime.set_quiet(True)\n{SLOW}"
    assert on_terminal(script, 120) == []
