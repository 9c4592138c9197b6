"""The processes of one run: torchrun starts them, here they talk. A single process is the case without torch.distributed at all.

Small Python objects go through gloo on the CPU, whatever the tensors go through. All processes must come to each call here in the same
order. One that fails ends with its error and torchrun stops the others; one that waits for a process that has gone gets an error itself.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from cropi_tools.runtime.errors import CropiError, InputError, UsageError

T = TypeVar("T")
# of torch's messages, whose errors often have no class of their own
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/", "NCCL")
TIMEOUT = datetime.timedelta(minutes=60)  # one may sample long responses while the others have finished theirs


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Ranks:
    """A single process; `of_torchrun` gives one of several. To be used in a `with`, whose end parts with the others.

    rank, size: which one of how many. device: where this one computes, None for a single process, which chooses itself.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._failed: int | None = None

    @classmethod
    def of_torchrun(cls, device: str) -> Ranks:
        """Meet the others. device: `auto`, `cpu` or `cuda`. UsageError: a device that all would share."""
        import torch
        from torch import distributed

        if device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"--device {device}: with several processes it is cpu, cuda or auto, and each takes its own"
            )
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda and local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many"
            )
        where = f"cuda:{local}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(local)
        with lost_processes_told():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        ranks = cls(distributed.get_rank(), distributed.get_world_size(), where)
        # functions of atexit run last first: what others register from now on still runs, what torch registered does not
        atexit.register(ranks._end_at_once)
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        with lost_processes_told():
            distributed.all_gather_object(found, value)
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, the same on all."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def any(self, value: bool) -> bool:
        """Whether it is true on any process."""
        return any(self.gather(value))

    def share(self, values: Sequence[T]) -> Sequence[T]:
        """This process's part: every size-th."""
        return values[self.rank :: self.size]

    def first_does(self, work: Callable[[], T]) -> T:
        """The first process does the work; all get the result, or all raise its error, so that none waits for it."""
        if self.size == 1:
            return work()
        result: Any = None
        failure: CropiError | None = None
        if self.first:
            try:
                result = work()
            except CropiError as error:
                failure = error
        result, failed = self.gather((result, failure is not None))[0]
        if failure is not None:
            raise failure
        if failed:
            raise Followed
        return result

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Part with the others; after an error nobody is waited for, and one that came of a lost process says so."""
        if self.size == 1:
            return
        if error is None:
            self.close()
            return
        self._failed = _exit_code(error)
        if isinstance(error, RuntimeError):
            _tell_lost(error)

    def close(self) -> None:
        """Part with the others, which do so too: with NCCL each waits for all."""
        if self.size == 1:
            return
        from torch import distributed

        if distributed.is_initialized():  # the end of vLLM in this process is the end of all groups
            distributed.destroy_process_group()

    def _end_at_once(self) -> None:
        """At the end of a process that failed: leave without torch's own end, which may wait for others in the middle of a pass."""
        if self._failed is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._failed)


class Followed(CropiError):
    """The first process failed and has said why."""

    def __init__(self) -> None:
        super().__init__("the first process of this run failed; what it said stands above")


@contextlib.contextmanager
def lost_processes_told() -> Iterator[None]:
    """Around what waits for other processes: one that is gone is an error that says so."""
    try:
        yield
    except RuntimeError as error:
        _tell_lost(error)
        raise


def _tell_lost(error: RuntimeError) -> None:
    """CropiError where this error came of a process that has gone."""
    from torch import distributed

    found = next((word.rstrip("/") for word in _LOST if word in str(error)), None)
    if found is None and isinstance(error, distributed.DistError):
        found = type(error).__name__
    if found is not None:
        raise CropiError(f"another process of this run has ended ({found}); the same command resumes") from None


def _exit_code(error: BaseException) -> int:
    """What a process that ends with this error exits with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_code", 1)
