"""What all prompts will cost, and how the policy answers them, from a few that are really sampled: `cropi-rollout --dry-run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.jsonl import dump_line
from cropi_tools.rollouts.grading import Row
from cropi_tools.rollouts.metrics import Tallies
from cropi_tools.runtime.estimate import Estimate, evenly, measured

PROBE_RESPONSES = 256  # of prompts spread evenly over all: an engine's rate is that of full batches


def probe_places(prompts: int, samples: int) -> range:
    """Which of the prompts are sampled: evenly spread, at most PROBE_RESPONSES responses (or one prompt's)."""
    return evenly(prompts, max(1, PROBE_RESPONSES // max(samples, 1)))


def estimate(
    prompts: int, responses: int, probe: Sequence[Any], run: Callable[[Sequence[Any]], Iterator[list[Row]]]
) -> tuple[Estimate, Mapping[str, Any]]:
    """Sample the probe's tasks, or as many of them as there is time for, by `run`; with the summary of these."""

    def sample(tasks: Sequence[Any]) -> list[Any]:
        rows = []
        for group in run(tasks):
            rows += [row.record for row in group]
            runtime.stop_if_requested()
        return rows

    found = measured(probe, sample)
    rows = found.result
    tokens = sum(len(one["token_ids"]) for row in rows for one in row["samples"])
    share, rate = found.share(prompts), tokens / max(found.seconds, 1e-9)
    facts = {"prompts": prompts, "responses": responses, "probe_prompts": found.items, "tokens_per_second": rate}
    notes = []
    tallies = Tallies()
    tallies.add(rows)
    summary = tallies.summary()
    if rows:
        figures = {name: summary[name] for name in ("accuracy", "truncated_fraction", "equal_rewards_fraction")}
        facts |= figures
        accuracy, truncated, equal = figures.values()
        notes.append(
            f"these:  accuracy {accuracy:.3f}; {truncated:.0%} of the responses truncated; equal rewards, so no gradient, in {equal:.0%} of "
            "the prompts"
        )
    cost = Estimate(
        f"{prompts} prompts, {responses} responses",
        found.seconds * share,
        sum(len(dump_line(row).encode()) + 1 for row in rows) * share,
        f"{found.items} prompts that were really sampled",
        found.seconds,
        tokens * share,
        f" at {rate:,.0f} tokens a second",
        notes,
        facts,
    )
    return cost, summary
