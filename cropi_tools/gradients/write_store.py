"""The work of cropi-grad that fills a store: figures and sketch of every prompt's gradient.

Resumable: rows and index entries are committed batch by batch, a chunk of rows at a time, and every minute. Batches follow from the prompts
alone (`work.py`), so where a command was interrupted leaves no trace in the result.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.output import Output
from cropi_tools.data.store import StoreWriter
from cropi_tools.gradients.batching import Batch, Work, batches
from cropi_tools.gradients.estimates import Figures, PromptFigures
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, without_gradient
from cropi_tools.runtime.errors import InputError

SECONDS_BETWEEN_COMMITS = 60.0


def collect_store(
    estimates: Figures, settings: GradientSettings, work: Work, output: Output, attributes: Mapping[str, Any]
) -> dict[str, int]:
    """Fill and finish a store. Returns counts by status and the tokens that went through the policy, and would have with a row a sample.

    attributes: of the store; its `projection` is null when no rows are kept (forward mode).
    """
    vectors = attributes["projection"] is not None
    writer = StoreWriter(output, work.live, attributes["projection"]["dim"] if vectors else 0, attributes)
    counters = {"tokens": 0, "tokens_as_rows": 0, **output.state.get("counters", {})}
    committed = time.monotonic()
    runtime.keeps_of(writer.records, work.prompts, "prompts")

    def room(tasks: list[GradientTask], task: GradientTask) -> bool:
        # a batch ends where a chunk of rows does, so that chunks are written whole
        whole = vectors and tasks and (writer.rows + len(tasks)) % writer.chunk_rows == 0
        return not whole and estimates.room_for(tasks, task)

    with runtime.progress("gradients", work.prompts, writer.records) as shown:
        for batch in batches(work.rollouts(done=writer.records), settings, room):  # type: ignore[arg-type]
            for estimate in _in_order(batch, estimates):
                entry = estimate.entry
                if entry["status"] == "ok" and not vectors:
                    writer.add_scalars(entry)
                else:
                    writer.add(entry, estimate.sketch)
                status = str(entry["status"])
                counters[status] = counters.get(status, 0) + 1
                counters["tokens"] += estimate.tokens
                counters["tokens_as_rows"] += estimate.tokens_as_rows
                shown.advance()
            if writer.chunk_full or time.monotonic() - committed > SECONDS_BETWEEN_COMMITS or runtime.stop_requested():
                writer.commit(counters)
                runtime.keeps_of(writer.records, work.prompts, "prompts")
                committed = time.monotonic()
                runtime.stop_if_requested()
    writer.finish(
        counters,
        skipped=without_any(counters),
        ledger={
            "tokens_scored": counters["tokens"],
            "tokens_as_rows": counters["tokens_as_rows"],
            "device": attributes["device"],
        },
    )
    return counters


def _in_order(batch: Batch, estimates: Figures) -> list[PromptFigures]:
    """The estimates of all prompts of a batch, those without a gradient included."""
    live = iter(estimates.of(batch.tasks))
    found = []
    for rollout, task in batch.prompts:
        if isinstance(task, GradientTask):
            found.append(next(live))
        else:
            found.append(PromptFigures(without_gradient(rollout, task).entry, None, 0, 0))
    return found


def without_any(counters: Mapping[str, int]) -> dict[str, int]:
    """From counters, how many prompts had no gradient, by status."""
    other = ("ok", "tokens", "tokens_as_rows")
    return {status: count for status, count in sorted(counters.items()) if status not in other}


def check_room(path: Path, rows: int, width: int) -> None:
    """InputError when the disk has less room than a raw store takes."""
    needed, free = rows * width * 4, shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise InputError(
            f"{path}: raw gradients need {needed / 1e9:.1f} GB for {rows} prompts of {width} parameters, the disk has {free / 1e9:.1f} left; "
            "use a sketch"
        )
