"""From groups of rollout records to a resumable file, with progress: accuracy so far, tokens a second, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.errors import InputError
from cropi_tools.data.output import JsonLinesOutput
from cropi_tools.rollouts.grading import Row
from cropi_tools.rollouts.tally import Tallies, Tally


class Written(NamedTuple):
    """What a whole output holds, earlier tries included. sampled: the records that were sampled for it, others were passed on."""

    tallies: Tallies
    sampled: Tally


def write(
    target: JsonLinesOutput,
    groups: Iterator[list[Row]],
    total: int,
    label: str,
    remembered: Mapping[str, Any] | None = None,
) -> Written:
    """Append and commit group after group until `total` records are there.

    remembered: for a later try, beside the counts. Raises Interrupted, with everything finished on disk, when a signal asked to stop before
    the end; InputError when the groups end before it without one.
    """
    tallies = Tallies(target.state.get("sources"))
    fresh = Tally(**target.state.get("sampled", {}))
    started, tokens_before = time.monotonic(), fresh.tokens
    with runtime.progress(label, total, target.lines) as shown:
        for rows in groups:
            records = [row.record for row in rows]
            tallies.add(records)
            for row in rows:
                if row.sampled:
                    fresh.add(row.record)
            target.append(records)
            target.commit({"sources": tallies.saved(), "sampled": fresh.saved(), **(remembered or {})})
            sums = tallies.total()
            note = f"accuracy {sums.correct / sums.samples:.3f}"
            if fresh.tokens:
                note += f", {(fresh.tokens - tokens_before) / max(time.monotonic() - started, 1e-9):,.0f} tokens/s"
            shown.advance(len(rows), note)
    if target.lines < total:
        runtime.stop_if_requested()
        raise InputError(
            f"the input changed while it was read: {total - target.lines} records are missing; start again"
        )
    return Written(tallies, fresh)
