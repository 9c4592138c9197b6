"""The work of cropi-grad: every prompt's gradient into a store, or all of them into their mean.

Resumable: rows and index entries are committed in chunks, a mean's running sum every minute. Each prompt is computed alone, so where
a command was interrupted leaves no trace in the result.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cropi_tools import runtime
from cropi_tools.data.errors import InputError
from cropi_tools.data.means import read_facts, read_tensors, write_mean
from cropi_tools.data.output import Output
from cropi_tools.data.records import Rollout, read_rollouts, shard_range
from cropi_tools.data.store import StoreWriter
from cropi_tools.influence.gradients import GradientComputer, Products, squared_norm
from cropi_tools.influence.projection import Layout, ProjectionSpec, Sketcher
from cropi_tools.objective import group_advantages

SECONDS_BETWEEN_COMMITS = 60.0


class Work(NamedTuple):
    """What there is to do: the prompts [start, stop) of the rollouts files, and how many of them have an advantage."""

    paths: Sequence[str]
    vocabulary: int
    start: int
    stop: int
    live: int

    def rollouts(self, done: int = 0) -> Iterator[Rollout]:
        """The prompts of this shard in file order, without the first `done`."""
        return islice(read_rollouts(self.paths, self.vocabulary), self.start + done, self.stop)

    @property
    def prompts(self) -> int:
        return self.stop - self.start


def survey(paths: Sequence[str], vocabulary: int, shard: tuple[int, int] = (1, 1), limit: int | None = None) -> Work:
    """Read and check all rollouts once, before any model work: a bad line at the end of a long job's input is found at once.

    shard: (i, n), 1-based; limit: use the first prompts only, before they are divided into shards.
    """
    advantage = [group_advantages(rollout.rewards) is not None for rollout in read_rollouts(paths, vocabulary)][:limit]
    start, stop = shard_range(len(advantage), *shard)
    return Work(paths, vocabulary, start, stop, sum(advantage[start:stop]))


class Against:
    """Mean gradients to take exact inner products with, checked to belong to the same parameters and policy."""

    def __init__(
        self, files: Mapping[str, str], layout: Layout, policy: str, objective: Mapping[str, Any], device: torch.device
    ) -> None:
        self.attributes: dict[str, dict[str, Any]] = {}
        tensors = {}
        for name, path in files.items():
            facts = read_facts(path)
            check_mean(path, facts, layout, policy, objective)
            self.attributes[name] = {"norm": facts["norm"], "sha256": facts["content"]}
            tensors[name] = read_tensors(path, device)
        self._products = Products(tensors, layout, device)

    def measure(self, gradients: Mapping[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
        """A gradient's squared norm, and its inner product with each mean."""
        return self._products.measure(gradients)


def check_mean(path: str, facts: Mapping[str, Any], layout: Layout, policy: str, objective: Mapping[str, Any]) -> None:
    """InputError when a mean gradient cannot be compared with gradients of this policy and objective."""
    if facts["layout"] != layout.sha256:
        raise InputError(f"{path}: is a mean over other parameters than this policy's; make it with the same --model")
    if facts["policy"] != policy:
        raise InputError(f"{path}: is a mean gradient of another policy; make it with the same --model")
    if facts["objective"] != objective:
        raise InputError(f"{path}: is a mean of another objective ({facts['objective']}, now {dict(objective)})")


def collect_store(
    computer: GradientComputer,
    work: Work,
    output: Output,
    spec: ProjectionSpec,
    layout: Layout,
    against: Against,
    attributes: Mapping[str, Any],
) -> dict[str, int]:
    """Fill and finish a store. Returns counts by status and the tokens that went through the policy."""
    writer = StoreWriter(output, work.live, spec.dim, {**attributes, "against": against.attributes})
    counters = {"tokens": 0, **output.state.get("counters", {})}
    sketcher = Sketcher(spec, layout)
    committed = time.monotonic()
    with runtime.progress("gradients", work.prompts, writer.records) as shown:
        for rollout in work.rollouts(done=writer.records):
            found = computer.compute(rollout)
            entry, row = dict(found.entry), None
            if found.status == "ok":
                sketcher.begin()
                gradient = dict(computer.gradients())
                square, inner = against.measure(gradient)
                for name, tensor in gradient.items():
                    sketcher.add(name, tensor)
                row = _finite(sketcher, rollout.id)
                if not math.isfinite(square) or not all(map(math.isfinite, inner.values())):
                    raise InputError(f"prompt '{rollout.id}': its gradient is not finite; try --dtype float32")
                if square == 0.0:
                    entry, row = {**entry, "status": "zero-gradient"}, None
                else:
                    entry.update(gradient_norm=math.sqrt(square), inner=inner)
            status = str(entry["status"])
            counters[status] = counters.get(status, 0) + 1
            counters["tokens"] += found.tokens
            writer.add(entry, row)
            shown.advance()
            if writer.chunk_full or time.monotonic() - committed > SECONDS_BETWEEN_COMMITS or runtime.stop_requested():
                writer.commit(counters)
                committed = time.monotonic()
                runtime.stop_if_requested()
    computer.clear()
    writer.finish(
        counters,
        skipped=without_gradient(counters),
        ledger={"tokens_scored": counters["tokens"], "device": attributes["device"]},
    )
    return counters


def without_gradient(counters: Mapping[str, int]) -> dict[str, int]:
    """From counters, how many prompts had no gradient, by status."""
    return {status: count for status, count in sorted(counters.items()) if status not in ("ok", "tokens")}


def _finite(sketcher: Sketcher, identity: str) -> Any:
    try:
        return sketcher.finish()
    except InputError as error:
        raise InputError(f"prompt '{identity}': {error}") from None


def collect_mean(
    computer: GradientComputer, work: Work, output: Output, layout: Layout, facts: Mapping[str, Any]
) -> dict[str, int]:
    """The mean over all prompts of the gradient, in float32; a prompt without advantage counts with gradient zero.

    Returns counters as `collect_store`.
    """
    total = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in computer.parameters}
    done, counters = 0, {"tokens": 0}

    def finish() -> dict[str, int]:
        skipped = without_gradient(counters)
        ledger = {"tokens_scored": counters["tokens"], "device": str(computer.parameters[0][1].device)}
        output.finish(rows=work.prompts, skipped=skipped, ledger=ledger, facts={**facts, "live": counters.get("ok", 0)})
        return counters

    if output.part.exists():
        # the part names its own progress in its header, so sum and count can never disagree
        saved = read_facts(output.part)
        counters = saved["counters"]
        if "norm" in saved:  # it is the mean already, only its name is missing
            return finish()
        done = saved["done"]
        for name, tensor in read_tensors(output.part).items():
            total[name].copy_(tensor)

    def save(described: dict[str, Any]) -> None:
        temporary = output.part.with_name(output.part.name + ".tmp")
        write_mean(temporary, {name: tensor.contiguous() for name, tensor in total.items()}, described)
        os.replace(temporary, output.part)

    committed = time.monotonic()
    with runtime.progress("mean gradient", work.prompts, done) as shown:
        for rollout in work.rollouts(done):
            found = computer.compute(rollout)
            if found.status == "ok":
                for name, gradient in computer.gradients():
                    total[name] += gradient
            counters[found.status] = counters.get(found.status, 0) + 1
            counters["tokens"] += found.tokens
            done += 1
            shown.advance()
            if done < work.prompts and (
                time.monotonic() - committed > SECONDS_BETWEEN_COMMITS or runtime.stop_requested()
            ):
                save({"done": done, "counters": counters})
                output.commit({"done": done})
                committed = time.monotonic()
                runtime.stop_if_requested()
    computer.clear()
    for tensor in total.values():
        tensor /= work.prompts
    square = math.fsum(squared_norm(tensor) for tensor in total.values())
    if not math.isfinite(square):
        raise InputError(f"{output.path}: the mean gradient is not finite; try --dtype float32")
    if square == 0.0:
        raise InputError(
            f"none of the {work.prompts} prompts gives a gradient (all their samples have equal rewards), so there is no direction to follow; "
            "take harder or easier validation prompts, or more samples"
        )
    described = {
        **facts,
        "layout": layout.sha256,
        "parameters": layout.to_json(),
        "norm": math.sqrt(square),
        "prompts": work.prompts,
    }
    save({**described, "counters": counters, "content": _content(total)})
    return finish()


def _content(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of the mean itself, kept by the stores that used it."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fits(path: Path, rows: int, width: int, limit: int) -> None:
    """InputError when a raw store would take more than `limit` bytes."""
    needed = rows * width * 4
    if needed > limit:
        raise InputError(
            f"{path}: raw gradients need {needed / 1e9:.1f} GB for {rows} prompts of {width} parameters, --max-store allows {limit / 1e9:.1f}; "
            "use a sketch, or raise --max-store"
        )
