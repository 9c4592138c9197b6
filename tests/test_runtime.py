"""The wish to stop: asked for once, insisted on the second time."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

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


@pytest.mark.parametrize(("columns", "last"), [(80, "accuracy 0.25"), (60, "reward 0.50"), (140, "5.1k tokens/s")])
def test_on_a_terminal_a_note_is_shown_as_far_as_it_fits(columns: int, last: str) -> None:
    """Neither the count nor the time is squeezed for it, and no number is cut in two."""
    script = (
        "from cropi_tools.runtime import progress\n"
        "with progress('training', 40, 3) as shown:\n"
        "    shown.advance(note='reward 0.50  accuracy 0.25  entropy 2.00  KL 0.001  5.1k tokens/s')\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.environ["COLUMNS"] = str(columns)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", script])
    told = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        told += part
    os.waitpid(child, 0)
    os.close(terminal)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if "4/40" in line]
    assert lines
    assert all(len(line) <= columns for line in lines)
    assert lines[-1].endswith(last)
