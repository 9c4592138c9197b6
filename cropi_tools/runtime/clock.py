"""Where a command's seconds go: into starting (imports, loading, compiling, trying out) or into work.

A start costs the same however much there is to do, and a short run is mostly start, so costs can be compared only when the two
are counted apart. Start is the time from the creation of the process to the first unit of work, and whatever lazy compiling and
trying out runs later, inside `starting()`.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


def _now() -> float:
    return time.monotonic()


_IMPORTED = _now()
LONGEST_LAUNCH = (
    60.0  # seconds from the creation of a process to this import; an older process was a shell that became this one
)

_origin: float | None = None  # of the process, until its first output takes it
_lock = Lock()
_open, _since, _spent = 0, 0.0, 0.0  # of `starting`


def process_age() -> float | None:
    """Seconds since the system created this process, from /proc; None where that cannot be told."""
    try:
        with open("/proc/self/stat", "rb") as stream:
            # field 22 of proc_pid_stat(5), in ticks since boot; the name in field 2 may hold spaces
            ticks = int(stream.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return age if age >= 0 else None


def use_processor_time() -> None:
    """Count seconds of this process's processor time, all threads together, from now on.

    For measuring on a machine that others use too: what they take from it stretches no command. A process of one thread that waits for nothing
    takes as much as by the wall on a machine of its own. What other processes compute for it (graders in their sandbox) is left out.
    """
    global _now, _IMPORTED, process_age
    _now = process_age = time.process_time  # it counts from the creation of the process
    _IMPORTED = time.process_time()


def command_begins() -> None:
    """Let the first output of this process count from the creation of the process, not from its own. A command calls this once."""
    global _origin
    now, age = _now(), process_age()
    _origin = _IMPORTED if age is None or now - age < _IMPORTED - LONGEST_LAUNCH else now - age


def _enter() -> None:
    global _open, _since
    with _lock:
        if not _open:
            _since = _now()
        _open += 1


def _leave() -> None:
    global _open, _spent
    with _lock:
        _open -= 1
        if not _open:
            _spent += _now() - _since


@contextmanager
def starting() -> Iterator[None]:
    """Count the time inside as start: for what compiles or is tried out when it is first needed. May be nested."""
    _enter()
    try:
        yield
    finally:
        _leave()


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries: it is start, and Python's search for garbage rests meanwhile.

    Modules are a million objects that all stay. To look through them again and again takes a third of the time of importing torch and
    transformers, and once more whenever the search comes to the oldest objects; so they are put where it does not look.
    """
    with starting():
        searching, known = gc.isenabled(), len(sys.modules)
        gc.disable()
        try:
            yield
        finally:
            if len(sys.modules) > known:
                gc.freeze()
            if searching:
                gc.enable()


def _started_for() -> float:
    """Seconds inside `starting` so far, in this process."""
    with _lock:
        return _spent + (_now() - _since if _open else 0.0)


def work_time() -> float:
    """A clock that stands still inside `starting`: the difference of two readings is the seconds of work between them."""
    with _lock:
        now = _now()
        return (_since if _open else now) - _spent


class Clock:
    """The seconds of one output: all of them, and those of starting. `whole` and `start` are those of earlier tries."""

    def __init__(self) -> None:
        global _origin
        self._origin, _origin = _now() if _origin is None else _origin, None
        self.whole = self.start = 0.0
        self.begin_work()

    def begin_work(self) -> None:
        """Everything of this try up to now was start."""
        self._begun, self._late = _now(), _started_for()

    def seconds(self) -> tuple[float, float]:
        """(all seconds, those of starting), earlier tries included."""
        begun = self._begun - self._origin + _started_for() - self._late
        return self.whole + _now() - self._origin, self.start + begun
