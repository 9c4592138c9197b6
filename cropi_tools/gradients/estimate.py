"""What all gradients will cost, from those of a few prompts that are really computed: `cropi-grad --dry-run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cropi_tools.data.jsonl import dump_line
from cropi_tools.data.records import Rollout
from cropi_tools.gradients.batching import Batch, Room, batches
from cropi_tools.gradients.half_sums import DIM, GROUPS, HalfSums
from cropi_tools.gradients.options import GradOptions
from cropi_tools.gradients.prompt_objective import GradientTask, prepare
from cropi_tools.gradients.run import Job, figures_of, path_of, prepared
from cropi_tools.gradients.write_mean import add_batch, zeros
from cropi_tools.runtime.estimate import Estimate, evenly, measured

PROBE_PROMPTS = 64  # with a gradient; those without cost nothing
ENTRY_BYTES = 200  # of the index, for a prompt without a gradient

Computed = tuple[int, int]  # tokens that went through the policy, bytes of the index


def estimate(options: GradOptions, facts: Mapping[str, Any]) -> Estimate:
    """Compute the gradients of some prompts, spread evenly over those of this shard that have one. facts: as of `run`."""
    job = prepared(options, facts, lambda: None)
    work = job.work
    compute, room = _mean(options, job) if options.mean else _figures(options, job)

    def run(rollouts: Sequence[Rollout]) -> Computed:
        found = [compute(batch) for batch in batches(iter(rollouts), job.settings, room)]
        return sum(tokens for tokens, _ in found), sum(size for _, size in found)

    found = measured(_probe(job), run)
    tokens, index = found.result
    share = found.share(work.live)
    return Estimate(
        f"{work.live} of {work.prompts} prompts have a gradient",
        found.seconds * share,
        _fixed_bytes(options, job) + index * share,
        f"{found.items} gradients that were really computed",
        found.seconds,
        tokens * share,
        f" at {tokens / max(found.seconds, 1e-9):,.0f} tokens a second",
        facts={"prompts": work.prompts, "live": work.live, "probe_prompts": found.items},
    )


def _probe(job: Job) -> list[Rollout]:
    places, live, found = set(evenly(job.work.live, PROBE_PROMPTS)), 0, []
    for rollout in job.work.rollouts():
        if isinstance(prepare(rollout, job.settings), GradientTask):
            if live in places:
                found.append(rollout)
            live += 1
    return found


def _mean(options: GradOptions, job: Job) -> tuple[Callable[[Batch], Computed], Room]:
    path = path_of(options, job)
    total = zeros(path)
    parts = HalfSums(total, job.layout) if options.halves else None

    def compute(batch: Batch) -> Computed:
        return sum(gradient.tokens for gradient in add_batch(path, batch, total, parts, job.scaling)), 0

    return compute, path.room_for


def _figures(options: GradOptions, job: Job) -> tuple[Callable[[Batch], Computed], Room]:
    figures, _ = figures_of(options, job)

    def compute(batch: Batch) -> Computed:
        found = figures.of(batch.tasks)
        return sum(one.tokens for one in found), sum(len(dump_line(one.entry)) for one in found)

    return compute, figures.room_for


def _fixed_bytes(options: GradOptions, job: Job) -> float:
    """Bytes of the output beside the index entries of prompts with a gradient."""
    work, size = job.work, job.layout.size
    if options.mean:
        return 4 * (2 * size + 2 * GROUPS * DIM if options.halves else size)
    columns = 4 * (2 + len(options.against))
    rows = 0 if options.method == "jvp" else 4 * size if options.sketch == "none" else 2 * options.dim
    return work.live * (rows + columns) + (work.prompts - work.live) * ENTRY_BYTES
