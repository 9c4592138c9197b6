"""What every running command shares: messages on stderr, progress, and the wish to stop.

Data goes to stdout, everything in this module to stderr. A progress bar is drawn on a terminal only; elsewhere a plain line is
printed every few seconds, so that a log file shows that the command is alive. TERM and USR2 only set a flag: long loops ask
`stop_if_requested()` between two commits, when everything finished is on disk.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from cropi_tools.data.errors import Interrupted

SECONDS_BETWEEN_LINES = 10.0
_BAR_WIDTH = 20
PATIENCE_SECONDS = 2.0  # make and shells pass a signal on to a process that may have had it already

_quiet = False
_stop_signal: int | None = None
_stop_asked = 0.0


def set_quiet(quiet: bool) -> None:
    """Silence `notify` and progress; errors are still printed."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _quiet


def notify(message: str) -> None:
    """Print one line for the user on stderr, unless --quiet."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one line that must not be missed, --quiet or not."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


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
    raise Interrupted(f"stopped by {name}; finished work is kept, the same command goes on from there")


def _fitting(note: str, room: int) -> str:
    """The note without as many of its parts, which two spaces separate, as there is no room for: half a number would be a wrong one."""
    while len(note) > room:
        note = note.rpartition("  ")[0]
    return note


class Progress:
    """How far a loop of `total` steps has come; `advance` may carry a note, of which as many parts (two spaces apart) are shown as fit."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done = label, total, done
        self._started = self._printed = time.monotonic()
        self._done_at_start = done
        self._bar = None
        if not _quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=_BAR_WIDTH),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            # what is left beside the label, the bar, the count and the time: a long note would be wrapped at the cost of these
            beside = len(label) + _BAR_WIDTH + len(f"{total}/{total}") + len("0:00:00") + 5
            self._room = max(self._bar.console.width - beside, 0)
            self._task = self._bar.add_task(label, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more as done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=_fitting(note, self._room))
            return
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self._printed = now
            rate = (self.done - self._done_at_start) / (now - self._started)
            left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 else ""
            notify(f"{self.label}: {self.done}/{self.total}{left}{', ' + note if note else ''}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A `Progress` that is closed whatever happens."""
    shown = Progress(label, total, done)
    try:
        yield shown
    finally:
        shown.close()
