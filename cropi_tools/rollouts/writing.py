"""From groups of rollout records to a resumable file, with progress: accuracy so far, tokens a second, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.rollouts.grading import Row
from cropi_tools.rollouts.metrics import SAVED, Tallies, Tally
from cropi_tools.runtime.errors import InputError

FEW = 8  # responses; fewer say nothing about a verifier


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
    responses: int = 0,
) -> Written:
    """Append and commit group after group until `total` records are there.

    remembered: for a later try, beside the counts. responses: how many all records have, for the line of an interrupted command. Raises
    Interrupted, with everything finished on disk, when a signal asked to stop before the end; InputError when the groups end before it
    without one.
    """
    state = target.resumed(SAVED)
    tallies = Tallies(state.get("sources"))
    fresh = Tally(**state.get("sampled", {}))
    started, tokens_before = time.monotonic(), fresh.tokens

    def tell_kept() -> None:
        if target.lasting:
            runtime.keeps_of(tallies.total().samples, responses, "responses")

    tell_kept()
    with runtime.progress(label, total, target.lines) as shown:
        for rows in groups:
            records = [row.record for row in rows]
            tallies.add(records)
            _check_verifier(tallies.total())
            for row in rows:
                if row.sampled:
                    fresh.add(row.record)
            target.append(records)
            target.commit({"sources": tallies.saved(), "sampled": fresh.saved(), **(remembered or {})})
            tell_kept()
            sums = tallies.total()
            note = f"accuracy {sums.correct / sums.samples:.3f}"
            if fresh.tokens:
                note += f", {(fresh.tokens - tokens_before) / max(time.monotonic() - started, 1e-9):,.0f} tokens/s"
            shown.advance(len(rows), note)
    lost = tallies.total().lost
    if lost:
        runtime.warn(f"the verifier gave no answer on {lost} responses (it died, or took too long); their reward is 0")
    if target.lines < total:
        runtime.stop_if_requested()
        raise InputError(
            f"the input changed while it was read: {total - target.lines} records are missing; start again"
        )
    return Written(tallies, fresh)


def _check_verifier(sums: Tally) -> None:
    """InputError when no response at all could be verified: that is the verifier's doing, not the responses'."""
    if sums.lost == sums.samples >= FEW:
        raise InputError(
            f"the verifier gave no answer on any of the first {sums.samples} responses: it died ({sums.outcomes.get('error', 0)}) or took "
            f"longer than --verify-seconds ({sums.outcomes.get('timeout', 0)}); fix it"
        )
