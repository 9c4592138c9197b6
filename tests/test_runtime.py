"""The wish to stop: asked for once, insisted on the second time."""

from __future__ import annotations

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
