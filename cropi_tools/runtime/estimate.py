"""What a command will cost, told from a part of its work that is really done: `--dry-run`, in every command that can take minutes."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from cropi_tools import runtime
from cropi_tools.runtime.console import show, show_json

PROBE_SECONDS = 20.0  # of the probe, beside loading

T = TypeVar("T")
R = TypeVar("R")


class Estimate(NamedTuple):
    """Of the whole command, loading apart: seconds, tokens that are generated or go through the policy, bytes on disk.

    what: the work. probe: what was really done, in probe_seconds. rate, notes: more for people. facts: more for programs.
    """

    what: str
    seconds: float
    disk: float
    probe: str
    probe_seconds: float
    tokens: float = 0.0
    rate: str = ""
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = {}

    def lines(self) -> list[str]:
        """For people."""
        memory, gpu_memory = memory_used()
        gpu = f", {in_bytes(gpu_memory)} on the GPU" if gpu_memory else ""
        tokens = f", about {self.tokens:,.0f} tokens" if self.tokens else ""
        return [
            f"{self.what}{tokens}",
            f"time:   {in_seconds(self.seconds)}{self.rate}, loading apart",
            f"disk:   {in_bytes(self.disk)}",
            f"memory: {in_bytes(memory)}{gpu}",
            *self.notes,
            f"from {self.probe}, in {in_seconds(self.probe_seconds)}; nothing was written",
        ]

    def as_json(self) -> dict[str, Any]:
        """For programs. memory, gpu_memory: the most bytes that this process has held."""
        memory, gpu_memory = memory_used()
        figures = {"seconds": self.seconds, "tokens": self.tokens, "disk": self.disk, "memory": memory}
        return {**self.facts, **figures, "gpu_memory": gpu_memory, "probe_seconds": self.probe_seconds}

    def tell(self, as_json: bool) -> None:
        """On stdout."""
        if as_json:
            show_json(json.dumps(self.as_json(), allow_nan=False))
        else:
            show("\n".join(self.lines()))


class Measured(NamedTuple):
    """The last part that was done: how many items, in how many seconds, and what came of it."""

    items: int
    seconds: float
    result: Any

    def share(self, everything: float) -> float:
        """How many times as much `everything` is; 0 of nothing."""
        return everything / self.items if self.items else 0.0


def measured(items: Sequence[T], run: Callable[[Sequence[T]], R], fewest: int = 1, warming: bool = True) -> Measured:
    """Do parts of the work, spread evenly over `items`, and measure the last one.

    The first part, of `fewest`, warms up what is compiled or tried out when it is first used (warming: whether it does). The next one has all
    items if these will take no longer than what is left of PROBE_SECONDS, else twice as many as before, as long as that fits.

    Raises Interrupted when a signal asks to stop.
    """
    begun, size = time.monotonic(), min(fewest, len(items))
    warm = not warming
    with runtime.progress("a part of the work", len(items)) as shown, runtime.only_this_progress():
        while True:
            part = [items[number * len(items) // size] for number in range(size)]
            started = time.monotonic()
            result = run(part)
            runtime.stop_if_requested()
            seconds = time.monotonic() - started
            if size > shown.done:
                shown.advance(size - shown.done)
            found = Measured(size, seconds, result)
            if not warm:
                begun = time.monotonic()
            left = PROBE_SECONDS - (time.monotonic() - begun)
            if not items or (warm and size == len(items)):
                return found
            if seconds * len(items) / size <= left:
                size = len(items)
            elif 2 * seconds <= left:
                size = min(2 * size, len(items))
            elif warm:
                return found
            warm = True


def evenly(count: int, most: int) -> range:
    """At most `most` of the numbers below `count`, evenly spread."""
    return range(0, count, max(1, -(-count // max(most, 1))))


def memory_used() -> tuple[int, int]:
    """The most bytes that this process has held so far, and those of its GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    return host, torch.cuda.max_memory_reserved() if torch is not None and torch.cuda.is_available() else 0


def in_seconds(value: float) -> str:
    """A time for people."""
    if value < 10:
        return f"{value:.2g} s"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def in_bytes(value: float) -> str:
    """A size for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
