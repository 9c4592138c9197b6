"""A pool of verifier processes that can be killed.

Verifiers hang (simplifying a power tower), die (a segmentation fault, `os._exit`) and hold the interpreter for minutes,
and neither threads nor signals stop them. So each runs in a process of its own, started when first needed, that is
killed and replaced when an answer takes too long. Processes are plain subprocesses that import neither torch nor the
caller's main module; nothing is forked, since the caller may hold threads of torch and zarr.

Work travels in small slices, because a round trip for each answer would cost more than most answers; replies come
answer by answer, so that a hang costs its own answer only and the rest of its slice is graded elsewhere. What can be
told in microseconds (exact matches, plain numbers) is graded in the calling process and starts no worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.records import ROLLOUT_FIELDS
from cropi_tools.rewards.grades import Grade, Record
from cropi_tools.rewards.verifiers import BUILT_IN, credited, grade_quickly, verifier_of
from cropi_tools.runtime.clock import starting
from cropi_tools.runtime.errors import InputError, Interrupted, UsageError

SLICE = 32
"""Most answers sent to a worker at once."""

MOST_WORKERS = 8
"""Most workers unless told: together they verify faster than any engine of one machine samples."""

ANSWERS_A_WORKER = 4
"""Fewest answers for which one more worker is started: to start costs as much as hundreds of answers."""

LOADING_SECONDS = 120.0
"""How long a worker may take to start and import its verifiers."""

ANSWER_SECONDS = 10.0
"""How long an answer may take, unless told."""

CANCEL_SECONDS = 0.5
"""How soon `cancel` is noticed."""

LONGEST_REPLY = 1 << 20
"""Bytes; a traceback at most."""

_COMPARED = ("id", "answer", "extra")
"""The keys of a record that built-in verifiers look at."""

_Item = tuple[int, str, dict[str, Any], str]
"""Index, verifier, record, response."""

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def default_workers() -> int:
    """One for each core that this process may use, at least 2 (one hangs, the other works) and at most MOST_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(MOST_WORKERS, cores))


class VerifierPool:
    """Grades batches of responses; use it as a context manager, from one thread at a time, which need not be the main one.

    `verifier` grades every record; None: each record's own does, else maths (`verifier_of`). `workers` is the most
    processes that run at once (unless told `default_workers()`); `seconds` the time an answer may take; with `stoppable`, grading and
    loading raise Interrupted soon after a signal has asked the command to stop; with `partial_credit`, partial scores of built-in verifiers
    are rewards (`credited`). Grades do not depend on the number of workers, nor on
    time, except for answers that really time out.
    """

    def __init__(
        self,
        verifier: str | None = None,
        *,
        workers: int | None = None,
        seconds: float = ANSWER_SECONDS,
        stoppable: bool = False,
        partial_credit: bool = False,
    ) -> None:
        workers = default_workers() if workers is None else workers
        if workers < 1 or seconds <= 0:
            raise UsageError(
                f"a verifier pool needs at least one worker and a positive time limit, not {workers} and {seconds}"
            )
        self.verifier, self.workers, self.seconds = verifier, workers, seconds
        self._live: list[_Worker] = []
        self._proven: set[str] = set()  # verifiers that have loaded in some worker of this pool
        self.stoppable = stoppable
        self.partial_credit = partial_credit
        self._cancelled = False

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def starts(self) -> bool:
        """Whether workers are wanted and none has loaded a verifier yet."""
        return bool(self._live) and not self._proven

    def close(self) -> None:
        """Kill the workers. The pool starts new ones if it is used again."""
        while self._live:
            self._live.pop().kill()

    def cancel(self) -> None:
        """From another thread: end `grade_many` within half a second, which then raises Interrupted; the pool grades no more."""
        self._cancelled = True

    def grade_many(self, items: Sequence[tuple[Record, str]]) -> list[Grade]:
        """The grades of (record, response) pairs, in order.

        An answer that takes longer than the limit gets (0, "timeout"); one whose worker dies twice, (0, "error"). What
        the user can fix (an unknown verifier, a record without an answer, an exception in the user's own function)
        raises InputError or UsageError naming the verifier and the prompt.
        """
        grades: list[Grade | None] = [grade_quickly(record, response, self.verifier) for record, response in items]
        pending = [index for index, grade in enumerate(grades) if grade is None]
        if pending:
            try:
                self._grade_in_workers(items, grades, pending)
            except BaseException:
                self.close()  # a worker may be in the middle of a slice whose replies nobody will read
                raise
        return [
            credited(grade, verifier_of(record, self.verifier), self.partial_credit)
            for grade, (record, _) in zip(grades, items, strict=True)
            if grade is not None
        ]

    def _end_if_told(self) -> None:
        if self._cancelled:
            raise Interrupted("verifying was cancelled")
        if self.stoppable:
            runtime.stop_if_requested()

    def load(self, verifier: str) -> None:
        """Import a verifier in a worker, to learn now whether that works: UsageError or InputError if it does not."""
        worker = self._idle_worker(set())
        worker.send([], [verifier])
        with selectors.DefaultSelector() as selector:
            selector.register(worker.replies, selectors.EVENT_READ)
            while not worker.ready:
                self._end_if_told()
                late = worker.remaining() <= 0
                if late or (
                    selector.select(min(CANCEL_SECONDS, worker.remaining())) and not worker.receive(self.seconds)
                ):
                    self._discard(worker)
                    raise worker.loading_error()

    def _grade_in_workers(
        self, items: Sequence[tuple[Record, str]], grades: list[Grade | None], pending: list[int]
    ) -> None:
        """Fill in the pending grades."""
        workers = min(self.workers, max(2, len(self._live), len(pending) // ANSWERS_A_WORKER))
        size = min(SLICE, max(1, len(pending) // (4 * workers)))
        todo = deque(pending[start : start + size] for start in range(0, len(pending), size))
        # Start all of them before the first is sent anything: a slice may have to wait until its worker reads.
        self._live += [_Worker(self.seconds) for _ in range(min(workers, len(todo)) - len(self._live))]
        died_once: set[int] = set()
        left = len(pending)
        with selectors.DefaultSelector() as selector:
            while left:
                self._end_if_told()
                busy = {key.data for key in selector.get_map().values()}
                while todo and len(busy) < workers:
                    worker = self._idle_worker(busy)
                    busy.add(worker)
                    selector.register(worker.replies, selectors.EVENT_READ, worker)
                    worker.send(self._slice(items, todo.popleft()))
                heard: dict[_Worker, bool] = {}  # the workers with news, and whether they live
                patience = min(CANCEL_SECONDS, *(worker.remaining() for worker in busy))
                # who waits in the main thread does nothing else until the first verifier has loaded, and that is no work
                with starting() if self.stoppable and self.starts else contextlib.nullcontext():
                    for key, _ in selector.select(max(0.0, patience)):
                        heard[key.data] = key.data.receive(self.seconds)
                for worker in busy:
                    for index, grade in worker.take_grades():
                        grades[index] = grade
                        left -= 1
                    late = worker not in heard and worker.remaining() <= 0
                    if worker.ready:
                        self._proven.update(worker.verifiers)
                    if heard.get(worker, True) and not late:
                        if worker.ready and not worker.indices:
                            selector.unregister(worker.replies)
                        continue
                    selector.unregister(worker.replies)
                    self._discard(worker)
                    if not worker.ready and (late or not self._proven.issuperset(worker.verifiers)):
                        raise worker.loading_error()
                    if not worker.indices:
                        continue
                    index, *rest = worker.indices
                    late = late or worker.process.returncode == -signal.SIGALRM  # its own timer, while we were stopped
                    if late or index in died_once:
                        grades[index] = Grade(0.0, "timeout" if late else "error")
                        left -= 1
                    else:  # perhaps it died of an earlier answer's doing: once more, alone
                        died_once.add(index)
                        todo.append([index])
                    if rest:
                        todo.append(rest)

    def _slice(self, items: Sequence[tuple[Record, str]], indices: list[int]) -> list[_Item]:
        """What a worker needs of the items: of a rollout's record not its other samples, of the prompt only what is looked at."""
        work = []
        for index in indices:
            record, response = items[index]
            name = verifier_of(record, self.verifier)
            if name in BUILT_IN:
                sent = {key: record[key] for key in _COMPARED if key in record}
            else:
                sent = {key: value for key, value in record.items() if key not in ROLLOUT_FIELDS}
            work.append((index, name, sent, response))
        return work

    def _idle_worker(self, busy: set[_Worker]) -> _Worker:
        """A living worker without work: one that waits, or a new one."""
        for worker in [worker for worker in self._live if worker not in busy]:
            if worker.process.poll() is None:
                return worker
            self._discard(worker)
        self._live.append(_Worker(self.seconds))
        return self._live[-1]

    def _discard(self, worker: _Worker) -> None:
        self._live.remove(worker)
        worker.kill()


class _Worker:
    """One process: what was sent to it and not yet answered, and when the next reply is due."""

    def __init__(self, seconds: float) -> None:
        self._word = secrets.token_hex(8)
        paths = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A fixed hash seed, since sympy's choices may follow the order of sets. `-P` keeps files that happen to lie in
        # the working directory from standing in for modules.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cropi_tools.rewards.worker", repr(seconds), self._word],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.replies = self.process.stdout
        self.indices: deque[int] = deque()
        self.verifiers: list[str] = []
        self.ready = False  # for the slice in hand
        self._grades: list[tuple[int, Grade]] = []
        self._due = 0.0
        self._unread = b""

    def send(self, work: list[_Item], load: Iterable[str] = ()) -> None:
        """Hand over a slice, and verifiers to load besides its own. A dead worker is noticed at the next `receive`."""
        self.indices, self.ready = deque(index for index, *_ in work), False
        self.verifiers = sorted({*load, *(name for _, name, *_ in work)})
        self._due = time.monotonic() + LOADING_SECONDS
        line = json.dumps({"load": self.verifiers, "items": work}, default=_plain).encode() + b"\n"
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            view = memoryview(line)
            while view:
                view = view[self.process.stdin.write(view) :]

    def receive(self, seconds: float) -> bool:
        """Read what has come; False if the worker is dead. Raises what the worker reports as the user's mistake."""
        chunk = os.read(self.replies.fileno(), 1 << 16)
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        if len(self._unread) > LONGEST_REPLY:
            self._unread = b""  # no reply, so a verifier's writing
        heard = False
        for line in lines:
            word, _, said = line.partition(b" ")
            if word.decode(errors="replace") != self._word:
                continue  # a verifier wrote to where replies go
            heard, message = True, json.loads(said)
            if isinstance(message, list):
                index, reward, outcome = message
                self.indices.popleft()
                self._grades.append((index, Grade(reward, outcome)))
            elif "mistake" in message:
                raise (UsageError if message["usage"] else InputError)(message["mistake"])
            elif "defect" in message:
                raise RuntimeError(f"a verifier process failed:\n{message['defect']}")
            self.ready = True
        if heard:
            self._due = time.monotonic() + seconds
        return bool(chunk)

    def take_grades(self) -> list[tuple[int, Grade]]:
        """The grades received since the last call."""
        taken, self._grades = self._grades, []
        return taken

    def remaining(self) -> float:
        """Seconds until the next reply is overdue."""
        return self._due - time.monotonic()

    def loading_error(self) -> InputError:
        """Why no verifier was ready, after the worker was killed."""
        code = self.process.returncode
        names = ", ".join(self.verifiers)
        if code == -signal.SIGKILL and self.remaining() <= 0:
            return InputError(
                f"verifier {names}: it did not load within {LOADING_SECONDS:.0f} seconds: see what it does on import"
            )
        return InputError(
            f"verifier {names}: its process ended (exit code {code}) while it loaded: see its messages above"
        )

    def kill(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def _plain(value: Any) -> Any:
    """Scalars and arrays of numpy or pyarrow, which records read from parquet may hold, as plain Python."""
    for method in ("tolist", "as_py"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"a record holds a {type(value).__name__}, which JSON cannot express")
