"""What every running command shares: messages on stderr, progress, and the wish to stop.

Data goes to stdout, everything in this module to stderr. A progress bar is drawn on a terminal only; elsewhere a plain line is
printed now and then, so that a log file shows that the command is alive. Steps that take long count the tokens that are generated
in them (`count_tokens`). TERM and USR2 only set a flag: long loops ask `stop_if_requested()` between two commits, when everything
finished is on disk, and tell what that is (`keeps`), for the line that an interrupted command ends with.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cropi_tools.runtime.console import say
from cropi_tools.runtime.errors import printable
from cropi_tools.runtime.signals import (
    install_signal_handlers,
    keeps,
    keeps_of,
    stop_if_requested,
    stop_now,
    stop_requested,
)

__all__ = [
    "Progress",
    "count_tokens",
    "install_signal_handlers",
    "is_quiet",
    "keeps",
    "keeps_of",
    "notify",
    "only_this_progress",
    "progress",
    "set_quiet",
    "stop_if_requested",
    "stop_now",
    "stop_requested",
    "warn",
]

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table

SECONDS_BEFORE_FIRST_LINE = 10.0  # soon enough to see that it runs
SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 20
_STRETCHES = 20  # of time, that the time left follows from
_SHORTEST_STRETCH = 0.5  # seconds

_quiet = False
_hushed = False  # as in `only_this_progress`
_shown: list[Progress] = []  # those that are open, the innermost last


def set_quiet(quiet: bool) -> None:
    """Silence `notify` and progress; errors are still printed."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _quiet


def notify(message: str) -> None:
    """Print one line for the user on stderr, unless --quiet."""
    if not (_quiet or _hushed):
        say(message)


def warn(message: str) -> None:
    """Print one line that must not be missed, --quiet or not."""
    say(f"warning: {message}")


def _fitting(note: str, room: int) -> str:
    """The note without as many of its parts, which two spaces separate, as there is no room for: half a number would be a wrong one."""
    while len(note) > room:
        note = note.rpartition("  ")[0]
    return note


def _clock(seconds: float) -> str:
    """A time as hours:minutes:seconds."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


class _Pace:
    """The time of a step: the median over the last ones, so that a pause among them, for an evaluation or a checkpoint, hardly counts.

    Nothing is taken from before the first step has ended, because that time also holds what goes before it. Steps that come in quick
    succession, as those of a batch, count as one stretch of time.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_STRETCHES)
        self._since: float | None = None
        self._last = 0.0
        self._steps = 0

    def add(self, steps: int) -> None:
        """So many steps have ended now."""
        self._last = now = time.monotonic()
        if self._since is None:
            self._since = now
            return
        self._steps += steps
        if now - self._since >= _SHORTEST_STRETCH:
            self._seconds.append((now - self._since) / self._steps)
            self._since, self._steps = now, 0

    def left(self, steps: int) -> float | None:
        """The seconds that so many steps will take, less what the present one has had of its own; None: not known yet."""
        if not self._seconds:
            return None
        step = sorted(self._seconds)[(len(self._seconds) - 1) // 2]
        return max(steps * step - (time.monotonic() - self._last), (steps - 1) * step, 0.0)


class Progress:
    """How far a loop of `total` steps has come, and when it will end.

    `advance` may carry a note. On a terminal it stands beside the bar, or below it where there is no room for it beside, without the
    parts of it (two spaces apart) that are too much for a line of their own.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done = printable(label), total, done
        self._note, self._below = "", False
        self._tokens = 0  # generated since the last step ended
        self._pace = _Pace()
        self._silent = _quiet or _hushed
        self._next_line = time.monotonic() + SECONDS_BEFORE_FIRST_LINE
        self._live: Live | None = None
        if not self._silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            if console.is_interactive:
                # data on stdout is left alone unless it is on the same terminal, where a line must not end up in the bar
                self._live = Live(
                    get_renderable=lambda: self._drawn(console.width),
                    console=console,
                    transient=True,
                    redirect_stdout=sys.stdout.isatty(),
                )
                self._live.start()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more as done."""
        self._pace.add(steps)
        self.done += steps
        self._note, self._tokens = printable(note), 0
        self._print_line()

    def count_tokens(self, tokens: int) -> None:
        """So many more tokens were generated in the steps that are under way."""
        self._tokens += tokens
        self._print_line()

    def _print_line(self) -> None:
        """Where there is no bar, a line if it is time for one."""
        now = time.monotonic()
        if self._live is None and not self._silent and now >= self._next_line and self.done < self.total:
            self._next_line = now + SECONDS_BETWEEN_LINES
            left = self._time_left()
            parts = [f"{self.done}/{self.total}", f"{left} left" if left else "", self._note, self._in_hand()]
            say(f"{self.label}: {', '.join(part for part in parts if part)}")

    def _in_hand(self) -> str:
        return f"{self._tokens:,} tokens in hand" if self._tokens else ""

    def _time_left(self) -> str:
        seconds = self._pace.left(self.total - self.done)
        return "" if seconds is None else _clock(seconds)

    def _drawn(self, columns: int) -> Table | Group:
        """The bar and the note as the terminal, so wide, shows them."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        count = f"{self.done:{len(str(self.total))}}/{self.total}"
        left = self._time_left() or "-:--:--"
        bar = ProgressBar(self.total, self.done, width=_BAR_WIDTH)
        cells: list[Text | ProgressBar] = [
            Text(self.label),
            bar,
            Text(count, "progress.download"),
            Text(left, "progress.remaining"),
        ]
        beside = columns - len(self.label) - _BAR_WIDTH - len(count) - len(left) - len(cells)
        told = "  ".join(part for part in (self._note, self._in_hand()) if part)
        # once below it stays there: a note that is now a letter longer, now shorter, would jump
        self._below = self._below or len(told) > beside
        note = Text(_fitting(told, columns))
        line = Table.grid(padding=(0, 1))
        if self._below:
            line.add_row(*cells)
            return Group(line, note)
        line.add_row(*cells, note)
        return line

    def close(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            self._live.stop()


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A `Progress` that is closed whatever happens. Inside of it `count_tokens` counts for it."""
    shown = Progress(label, total, done)
    if not _hushed:
        _shown.append(shown)
    try:
        yield shown
    finally:
        if shown in _shown:
            _shown.remove(shown)
        shown.close()


@contextmanager
def only_this_progress() -> Iterator[None]:
    """Inside, neither messages nor further progress is shown: a probe's work would say of itself what is true of the whole alone."""
    global _hushed
    before, _hushed = _hushed, True
    try:
        yield
    finally:
        _hushed = before


def count_tokens(tokens: int) -> None:
    """Say that so many more tokens were generated: engines do, as they come, so that a step of many shows that it goes on."""
    if _shown and tokens:
        _shown[-1].count_tokens(tokens)
