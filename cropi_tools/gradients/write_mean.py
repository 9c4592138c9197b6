"""The work of cropi-grad --mean: the mean gradient over all prompts, and with --halves what `half_sums.py` adds up beside it.

The running sum carries its own progress in its header, so that sum and count can never disagree; it is saved now and then, so rarely that
saving a large one does not take over.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import torch

from cropi_tools import runtime
from cropi_tools.data.means import check_tensors, content_hash, read_facts, read_groups, read_tensors, write_mean
from cropi_tools.data.metadata import COUNT, Listed, checked
from cropi_tools.data.output import Output
from cropi_tools.gradients.accumulator import squared_norm
from cropi_tools.gradients.batching import Batch, Work, batches
from cropi_tools.gradients.estimates import GradientPath
from cropi_tools.gradients.half_sums import DIM, GROUPS, HalfSums, Tensors
from cropi_tools.gradients.preconditioner import Preconditioner
from cropi_tools.gradients.prompt_objective import GradientSettings, PromptGradient
from cropi_tools.gradients.write_store import SECONDS_BETWEEN_COMMITS, without_any
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.spec import Layout

SHARE_OF_SAVING = 0.05  # of the time, at most


def collect_mean(
    path: GradientPath,
    settings: GradientSettings,
    work: Work,
    output: Output,
    layout: Layout,
    facts: Mapping[str, Any],
    halves: bool = False,
    scaling: Preconditioner | None = None,
) -> dict[str, int]:
    """The mean over all prompts of the gradient, in float32; a prompt without advantage counts with gradient zero.

    Returns counters as `collect_store`. InputError: no prompt has a gradient, or one is not finite.
    """
    if halves and work.prompts < 2:
        raise InputError("a mean in halves needs at least two prompts")
    device = path.parameters[0][1].device
    total = zeros(path)
    parts = HalfSums(total, layout) if halves else None
    done, counters = 0, {"tokens": 0}

    def finish() -> dict[str, int]:
        ledger = {"tokens_scored": counters["tokens"], "device": str(device)}
        described = {**facts, "live": counters.get("ok", 0)}
        output.finish(rows=work.prompts, skipped=without_any(counters), ledger=ledger, facts=described)
        return counters

    if output.part.exists():
        saved = _resumed(output, layout, halves)
        counters = saved["counters"]
        if "norm" in saved:  # it is the mean already, only its name is missing
            return finish()
        done = saved["done"]
        for name, tensor in read_tensors(output.part).items():
            total[name].copy_(tensor)
        if parts is not None:
            parts.restore(output.part, saved["halves"])

    runtime.keeps_of(done, work.prompts, "prompts")
    committed, saving = time.monotonic(), 0.0
    with runtime.progress("mean gradient", work.prompts, done) as shown:
        for batch in batches(work.rollouts(done), settings, path.room_for):
            found = add_batch(path, batch, total, parts, scaling)
            for status in (task if isinstance(task, str) else "ok" for _, task in batch.prompts):
                counters[status] = counters.get(status, 0) + 1
            counters["tokens"] += sum(gradient.tokens for gradient in found)
            done += len(batch.prompts)
            shown.advance(len(batch.prompts))
            wait = max(SECONDS_BETWEEN_COMMITS, saving / SHARE_OF_SAVING)
            if done < work.prompts and (time.monotonic() - committed > wait or runtime.stop_requested()):
                start = time.monotonic()
                saved = {"done": done, "counters": counters}
                if parts is None:
                    _save(output, total, saved)
                else:
                    _save(output, total, {**saved, "halves": parts.state()}, parts.first, parts.sketches)
                output.commit({"done": done})
                runtime.keeps_of(done, work.prompts, "prompts")
                committed = time.monotonic()
                saving = committed - start
                runtime.stop_if_requested()

    norm = _to_means(total, work.prompts)
    if not math.isfinite(norm):
        raise InputError(f"{output.path}: the mean gradient is not finite; try --dtype float32")
    if norm == 0.0:
        raise InputError(
            f"none of the {work.prompts} prompts gives a gradient (all their samples have equal rewards), so there is no direction to follow; "
            "take harder or easier validation prompts, or more samples"
        )
    described: dict[str, Any] = {
        **facts,
        "layout": layout.sha256,
        "parameters": layout.to_json(),
        "norm": norm,
        "prompts": work.prompts,
    }
    first, groups = {}, None
    if parts is not None:
        described["halves"], groups = parts.finish(total)
        first = parts.first
    described |= {"counters": counters, "content": content_hash(total, first)}
    _save(output, total, described, first, groups)
    return finish()


def zeros(path: GradientPath) -> Tensors:
    """Sums of nothing yet."""
    return {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in path.parameters}


def add_batch(
    path: GradientPath, batch: Batch, total: Tensors, parts: HalfSums | None, scaling: Preconditioner | None
) -> list[PromptGradient]:
    """Add a batch's gradients to the sums. InputError: one is not finite."""
    tasks = batch.tasks
    if parts is not None:
        parts.begin(len(tasks))

    def consume(name: str, gradients: torch.Tensor) -> None:
        rows = gradients.reshape(len(tasks), -1)
        if scaling is not None:
            rows = rows * scaling.scale(name)
        # one after another, in the order of the input
        for number, (task, row) in enumerate(zip(tasks, rows, strict=True)):
            # no dot product: in bfloat16 it is slow on a CPU
            wide = torch.promote_types(row.dtype, torch.float32)
            if not bool(torch.isfinite(torch.linalg.vector_norm(row, dtype=wide))):
                raise InputError(
                    f"prompt '{task.rollout.id}': its gradient is not finite; bound its weights with "
                    "--weight-clip, or try --dtype float32"
                )
            total[name].view(-1).add_(row)
            if parts is not None:
                parts.add(name, number, task.rollout.id, row)

    found = path.compute(tasks, consume) if tasks else []
    if parts is not None:
        parts.end([rollout.id for rollout, _ in batch.prompts], [task.rollout.id for task in tasks])
    return found


def _resumed(output: Output, layout: Layout, halves: bool) -> dict[str, Any]:
    """What unfinished work says of itself, its tensors checked to be those of the layout. InputError: it is damaged."""
    path, remedy = output.part, f"remove {output.part} and {output.part}.json to start again"
    parts = {"halves": {"counts": Listed(Listed(COUNT, GROUPS), 2), "live": Listed(COUNT, 2)}} if halves else {}
    saved: dict[str, Any] = read_facts(path)
    shape = {"counters": {"tokens": COUNT}, **({} if "norm" in saved else {"done": COUNT, **parts})}
    checked(saved, shape, f"{path}: its header is damaged", remedy)
    wanted = {name: (tuple(shape), torch.float32) for name, shape in layout.to_json()}
    for half in (False, True) if halves else (False,):
        check_tensors(path, read_tensors(path, half), wanted)
    sketches = read_groups(path) if halves and "norm" not in saved else None
    if parts and "norm" not in saved and (sketches is None or sketches.shape != (2, GROUPS, DIM)):
        raise InputError(f"{path}: its groups are not those that were saved; {remedy}")
    return saved


def _to_means(sums: Tensors, count: int) -> float:
    """Divide the sums in place; the norm of the result."""
    for tensor in sums.values():
        tensor /= count
    return math.sqrt(math.fsum(squared_norm(tensor) for tensor in sums.values()))


def _save(
    output: Output,
    total: Tensors,
    described: Mapping[str, Any],
    first: Tensors | None = None,
    groups: torch.Tensor | None = None,
) -> None:
    temporary = output.part.with_name(output.part.name + ".tmp")
    write_mean(temporary, total, described, first, groups)
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, output.part)
