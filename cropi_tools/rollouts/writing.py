"""From groups of rollout records to a resumable file, with progress: accuracy so far, tokens a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.data.output import JsonLinesOutput
from cropi_tools.rollouts.tally import Tallies, Tally


class Written(NamedTuple):
    """What a whole output holds, earlier tries included. sampled: the records that were sampled for it, others were passed on."""

    tallies: Tallies
    sampled: Tally


def write(
    target: JsonLinesOutput,
    groups: Iterator[list[Record]],
    total: int,
    label: str,
    sampled: Callable[[Record], bool],
) -> Written:
    """Append and commit group after group until `total` records are there.

    sampled: whether a record was sampled now, so that its tokens are a cost. Raises Interrupted, with everything finished on disk, when a
    signal asked to stop before the end.
    """
    tallies = Tallies(target.state.get("sources"))
    fresh = Tally(**target.state.get("sampled", {}))
    started, tokens_before = time.monotonic(), fresh.tokens
    with runtime.progress(label, total, target.lines) as shown:
        for rows in groups:
            tallies.add(rows)
            for row in filter(sampled, rows):
                fresh.add(row)
            target.append(rows)
            target.commit({"sources": tallies.saved(), "sampled": fresh.saved()})
            sums = tallies.total()
            note = f"accuracy {sums.correct / sums.samples:.3f}"
            if fresh.tokens:
                note += f", {(fresh.tokens - tokens_before) / max(time.monotonic() - started, 1e-9):,.0f} tokens/s"
            shown.advance(len(rows), note)
    if target.lines < total:
        runtime.stop_if_requested()
    return Written(tallies, fresh)
