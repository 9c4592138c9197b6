"""What all prompts will cost, from a few that are really sampled: `cropi-rollout --dry-run`."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import dump_line
from cropi_tools.rollouts.grading import Row

PROBE_RESPONSES = 256  # of prompts spread evenly over all: an engine's rate is that of full batches


class SamplingCost(NamedTuple):
    """Of the whole command: seconds, bytes on disk (uncompressed), tokens. memory: bytes this process has held at most (GPU's apart)."""

    prompts: int
    responses: int
    tokens: float
    seconds: float
    disk: float
    memory: int
    gpu_memory: int
    probe_prompts: int
    probe_seconds: float
    tokens_per_second: float

    def lines(self) -> list[str]:
        """For people."""
        gpu = f", {in_bytes(self.gpu_memory)} on the GPU" if self.gpu_memory else ""
        return [
            f"{self.prompts} prompts, {self.responses} responses, about {self.tokens:,.0f} tokens",
            f"time:   {in_seconds(self.seconds)} at {self.tokens_per_second:,.0f} tokens a second, loading apart",
            f"disk:   {in_bytes(self.disk)}, before compression",
            f"memory: {in_bytes(self.memory)}{gpu}; it does not grow with the prompts",
            f"from {self.probe_prompts} prompts that were really sampled, in {in_seconds(self.probe_seconds)}; nothing was written",
        ]


def probe_places(prompts: int, samples: int) -> range:
    """Which of the prompts are sampled: evenly spread, at most PROBE_RESPONSES responses (or one prompt's)."""
    return range(0, prompts, max(1, -(-prompts * samples // max(PROBE_RESPONSES, samples, 1))))


def estimate(
    prompts: int,
    responses: int,
    probe: Sequence[Any],
    run: Callable[[Sequence[Any]], Iterator[list[Row]]],
    measured: Callable[[list[Row]], None],
) -> SamplingCost:
    """Sample the probe's tasks by `run` once for warming up (the first alone) and once for measuring; `measured` is told of the latter."""
    for _ in run(probe[:1]):
        runtime.stop_if_requested()
    started = time.monotonic()
    found = [row for group in run(probe) for row in group]
    runtime.stop_if_requested()
    seconds = time.monotonic() - started
    measured(found)
    rows = [row.record for row in found]
    tokens = sum(len(sample["token_ids"]) for row in rows for sample in row["samples"])
    share = prompts / len(rows) if rows else 0.0
    return SamplingCost(
        prompts,
        responses,
        tokens * share,
        seconds * share,
        sum(len(dump_line(row).encode()) + 1 for row in rows) * share,
        *memory_used(),
        len(rows),
        seconds,
        tokens / max(seconds, 1e-9),
    )


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
