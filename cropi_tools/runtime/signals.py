"""Signals that ask a command to stop.

TERM and USR2 set a flag; loops ask for it where everything finished is on disk, and end with exit code 143. Where nothing is finished yet and
a call may block for ever (a pipe that nobody writes to), `at_once` ends the command in the middle of the call.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from cropi_tools.runtime.errors import Interrupted

PATIENCE_SECONDS = 2.0  # make and shells pass a signal on to a process that may have had it already

_stop_signal: int | None = None
_stop_asked = 0.0
_at_once = False
_kept: str | None = None  # what an interrupted command has on disk; None: nothing yet


def keeps(what: str | None) -> None:
    """Say what is on disk now, such as `256 of 800 responses`, for the line that an interrupted command ends with; None: nothing."""
    global _kept
    _kept = what


def keeps_of(done: int, total: int, what: str) -> None:
    """The same in numbers."""
    keeps(f"{done:,} of {total:,} {what}" if done else None)


def outcome() -> str:
    """What an interrupted command leaves, as the end of a sentence."""
    return "nothing finished yet" if _kept is None else f"kept {_kept}; the same command resumes"


def install_signal_handlers() -> None:
    """TERM and USR2 ask the command to stop after the chunk in hand (SLURM sends USR2 before its limit if told to); twice, at once."""
    signal.signal(signal.SIGTERM, _request_stop)
    signal.signal(signal.SIGUSR2, _request_stop)


def _request_stop(number: int, frame: FrameType | None) -> None:
    """The first signal asks; one that comes PATIENCE_SECONDS later ends the process at once, which costs the chunk in hand and nothing else."""
    global _stop_signal, _stop_asked
    now = time.monotonic()
    if _stop_signal is None:
        _stop_signal, _stop_asked = number, now
    elif now - _stop_asked > PATIENCE_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if _at_once:
        stop_now()


def stop_requested() -> bool:
    """Whether a signal has asked the command to stop."""
    return _stop_signal is not None


def stop_if_requested() -> None:
    """Raise Interrupted when a signal asked to stop; call it where everything finished is on disk."""
    if _stop_signal is not None:
        stop_now()


def stop_now() -> NoReturn:
    """Raise Interrupted: this process was asked to stop, or another one of the same run was."""
    name = "a signal" if _stop_signal is None else signal.Signals(_stop_signal).name
    raise Interrupted(f"stopped by {name}; {outcome()}")


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Around a call that may block for ever and has finished nothing: a signal raises Interrupted in the middle of it."""
    global _at_once
    before, _at_once = _at_once, True
    try:
        stop_if_requested()
        yield
    finally:
        _at_once = before


@contextlib.contextmanager
def ending_the_process(message: str) -> Iterator[None]:
    """Around a library's call whose threads nothing but the end of the process stops, and which resumes where it was: Ctrl-C, TERM and USR2
    end the process then and there, with a line on stderr. Elsewhere than in the main thread signals are left as they are.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{os.path.basename(sys.argv[0])}: {message}\n".encode())
        os._exit(130 if number == signal.SIGINT else Interrupted.exit_code)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop_if_requested()
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
