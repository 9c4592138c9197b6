"""Accuracy on sets of prompts while training; the same sample seeds at every step, so that differences are the policy's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.engines.protocol import Engine
from cropi_tools.policy.tokens import Tokens
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rollouts.metrics import Tallies, Tally
from cropi_tools.rollouts.sampling import SamplingTask, chunks, sample_groups
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.options import TrainOptions


def evaluate(
    engine: Engine,
    tokens: Tokens,
    pool: VerifierPool,
    sets: Mapping[str, Sequence[Record]],
    options: TrainOptions,
    ranks: Ranks,
) -> dict[str, Tally] | None:
    """Counts for each set, over all processes, which share its prompts; None when a signal asked to stop before the end."""
    found = {}
    for name, records in sets.items():
        tasks = [
            SamplingTask(record, (options.seed, "evaluation", name, record["id"]), options.eval_samples)
            for record in ranks.share(records)
        ]
        groups = chunks(tasks, options.eval_samples)
        sampled = sample_groups(engine, tokens, pool, groups, options.evaluation_sampling)
        own = tally(row.record for rows in sampled for row in rows)
        if ranks.any(runtime.stop_requested()):
            return None
        found[name] = of_all_processes(own, ranks)
    return found


def tally(rollouts: Iterable[Record]) -> Tally:
    """Counts over rollouts, whatever their sources."""
    tallies = Tallies()
    tallies.add(rollouts)
    return tallies.total()


def of_all_processes(own: Tally, ranks: Ranks) -> Tally:
    """The counts of all processes together."""
    whole = Tally()
    for saved in ranks.gather(own.saved()):
        whole.merge(Tally(**saved))
    return whole
