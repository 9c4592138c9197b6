"""What all scores will take, from the first ones that are really made: `cropi-score --dry-run`."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record, dump_line
from cropi_tools.runtime.estimate import PROBE_SECONDS, Estimate


def estimate(records: Iterator[Record], prompts: int) -> Estimate:
    """Make scores for some seconds. What comes before the first one, the means of the validation sets, is counted once."""
    started = time.monotonic()
    count = size = 0
    first = seconds = 0.0
    with runtime.progress("a part of the work", prompts) as shown:
        for record in records:
            runtime.stop_if_requested()
            count += 1
            size += len(dump_line(record).encode()) + 1
            seconds = time.monotonic() - started
            first = first or seconds
            shown.advance()
            if seconds > PROBE_SECONDS:
                break
    return Estimate(
        f"{prompts} prompts",
        first + (seconds - first) * (prompts - 1) / (count - 1) if count > 1 else seconds,
        size * prompts / max(count, 1),
        f"{count} scores that were really made",
        seconds,
        facts={"prompts": prompts, "probe_prompts": count},
    )
