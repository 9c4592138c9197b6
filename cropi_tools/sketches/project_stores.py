"""The work of cropi-project: a store of raw gradients into any sketch, a countsketch into a smaller one, a mean into a store of one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from cropi_tools import runtime
from cropi_tools.data.means import check_whole, read_finished, read_tensors
from cropi_tools.data.output import Output
from cropi_tools.data.records import STORE_INDEX
from cropi_tools.data.store import Store, StoreWriter
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.runtime.estimate import Estimate, Measured, measured
from cropi_tools.sketches.projection import fold, project_rows, sketch_vector
from cropi_tools.sketches.spec import Layout, ProjectionSpec

PROBE_ROWS = 256


def projection_of(store: Store) -> ProjectionSpec:
    """What a store's rows are sketches by. InputError: it has no rows, being made by forward mode."""
    if not store.has_vectors:
        raise InputError(
            f"{store.path}: holds inner products alone (forward mode), no gradients to project; make it without --method jvp"
        )
    return ProjectionSpec.from_json(store.attributes["projection"])


def plan(store: Store, method: str, dim: int, seed: int, keep: float | None) -> ProjectionSpec:
    """The spec of the sketch to make from a store. UsageError when it cannot be made from what the store holds."""
    before = projection_of(store)
    if before.method == "none":
        return ProjectionSpec.create(method, Layout.from_json(store.attributes["layout"]), dim, seed, keep)
    if before.method != "countsketch" or method != "countsketch":
        raise UsageError(
            f"{store.path}: its rows are {before.method} of dimension {before.dim}; only raw gradients (cropi-grad --sketch none) can be "
            "projected again, and only a countsketch folded"
        )
    if seed not in (0, before.seed):
        raise UsageError(f"{store.path}: was sketched with seed {before.seed}, which a fold keeps; leave --seed out")
    if before.segment is not None and dim < before.segment:
        runtime.warn(
            f"folding below {before.segment} dimensions: where few channels dominate a gradient, inner products lose more than usual"
        )
    return before.folded(dim)


def project_store(store: Store, spec: ProjectionSpec, output: Output) -> None:
    """Write the sketch of every row of `store`; index, norms and inner products go along."""
    writer = StoreWriter(output, store.rows, spec.dim, {**store.attributes, "projection": spec.to_json()})
    sketched = _sketcher(store, spec)
    norms = store.column("sketch_norm")
    rows = _rows(store)
    runtime.keeps_of(writer.records, store.prompts, "prompts")
    with runtime.progress("sketches", store.prompts, writer.records) as shown:
        for place, entry in enumerate(store.entries()):
            unit = next(rows) if entry["row"] is not None else None
            if place < writer.records:
                continue
            row = None
            if unit is not None:
                row = sketched(unit * norms[entry["row"]])
            writer.add({**entry, "sketch_norm": None}, row)
            shown.advance()
            if writer.chunk_full or runtime.stop_requested():
                writer.commit({})
                runtime.keeps_of(writer.records, store.prompts, "prompts")
                runtime.stop_if_requested()
    writer.finish({}, skipped=store.manifest["skipped"], ledger={"device": "cpu"})


def estimate(store: Store, spec: ProjectionSpec) -> Estimate:
    """What the sketch of a store will take, from some of its rows."""
    sketched = _sketcher(store, spec)
    found = measured(
        range(min(store.rows, PROBE_ROWS)), lambda part: [sketched(row) for row in islice(_rows(store), len(part))]
    )
    return _estimate(found, store.rows, spec, (store.path / STORE_INDEX).stat().st_size)


def estimate_mean(path: str, spec: ProjectionSpec) -> Estimate:
    """The same of a mean gradient."""
    layout = Layout.from_json(read_finished(path)["parameters"])
    return _estimate(measured([path], lambda _: sketch_vector(spec, layout, read_tensors(path))), 1, spec, 0)


def _estimate(found: Measured, rows: int, spec: ProjectionSpec, index: int) -> Estimate:
    return Estimate(
        f"{rows} rows of {spec.dim} dimensions",
        found.seconds * found.share(rows),
        rows * 2 * spec.dim + index,
        f"{found.items} rows that were really sketched",
        found.seconds,
        facts={"rows": rows, "probe_rows": found.items},
    )


def _sketcher(store: Store, spec: ProjectionSpec) -> Callable[[Any], Any]:
    """What makes the sketch of a row of the store."""
    layout = Layout.from_json(store.attributes["layout"])
    if store.attributes["projection"]["method"] != "none":
        return lambda row: fold(row, spec.dim)
    return lambda row: project_rows(spec, layout, row[None])[0]


def project_mean(path: str, spec: ProjectionSpec, output: Output) -> None:
    """Write a mean gradient as a store of one row, its id the file's name."""
    facts = read_finished(path, "policy", "tokenizer", "objective")
    check_whole(path, facts)
    layout = Layout.from_json(facts["parameters"])
    row = sketch_vector(spec, layout, read_tensors(path))
    attributes = {key: facts[key] for key in ("policy", "tokenizer", "objective")}
    writer = StoreWriter(
        output,
        1,
        spec.dim,
        {**attributes, "projection": spec.to_json(), "layout": facts["parameters"], "device": "cpu", "against": {}},
    )
    entry = {
        "id": path,
        "source": "mean",
        "status": "ok",
        "pass_rate": None,
        "gradient_norm": facts["norm"],
        "inner": {},
    }
    if not writer.records:  # else it was committed before a kill
        writer.add(entry, row)
    writer.finish({}, ledger={"device": "cpu"})


def mean_spec(path: str, method: str, dim: int, seed: int, keep: float | None) -> ProjectionSpec:
    """The spec of a sketch of a mean gradient."""
    facts: Mapping[str, Any] = read_finished(path)
    return ProjectionSpec.create(method, Layout.from_json(facts["parameters"]), dim, seed, keep)


def _rows(store: Store) -> Any:
    for _, block in store.blocks():
        yield from np.asarray(block)
