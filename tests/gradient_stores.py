"""Small stores of given rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cropi_tools.data.manifest import FOLDER_MANIFEST, Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.data.records import STORE_INDEX
from cropi_tools.data.store import Store, StoreWriter
from cropi_tools.data.store_chunks import CHECKSUMS
from cropi_tools.sketches.spec import Layout, ProjectionSpec

LAYOUT = Layout((("first.weight", (40, 12)), ("second.weight", (7, 33)), ("bias", (5,))))


def unseal(path: Path) -> Store:
    """Make a store into one from before there were checksums, in which only what is there twice tells of damage."""
    (path / CHECKSUMS).unlink(missing_ok=True)
    manifest = json.loads((path / FOLDER_MANIFEST).read_text())
    manifest["outputs"] = {STORE_INDEX: manifest["outputs"][STORE_INDEX]}
    (path / FOLDER_MANIFEST).write_text(json.dumps(manifest))
    return Store(path)


def open_output(path: Path, folder: bool = True) -> Output:
    output = Output(path, Fingerprint("a test", {}, {}), {}, folder=folder)
    assert output.open()
    return output


def spec(method: str = "countsketch", dim: int = 64, seed: int = 0) -> ProjectionSpec:
    return ProjectionSpec.create(
        method, LAYOUT, None if method == "none" else dim, seed, 0.5 if method == "sparse-jl" else None
    )


def make_store(
    path: Path,
    rows: Sequence[np.ndarray | None],
    projection: ProjectionSpec,
    *,
    prefix: str = "p",
    inner: Sequence[Mapping[str, float]] | None = None,
    against: Mapping[str, Any] | None = None,
    norms: Sequence[float] | None = None,
    **attributes: Any,
) -> Store:
    """A store whose rows are the given vectors; None stands for a prompt without advantage."""
    facts = {
        "policy": "P",
        "objective": {"weighting": "token"},
        "tokenizer": "T",
        "layout": LAYOUT.to_json(),
        **attributes,
    }
    facts = {**facts, "projection": projection.to_json(), "device": "cpu", "against": dict(against or {})}
    output = open_output(path)
    writer = StoreWriter(output, len(rows), projection.dim, facts)
    for place, row in enumerate(rows):
        entry: dict[str, Any] = {
            "id": f"{prefix}{place}",
            "source": "s",
            "pass_rate": 0.5,
            "status": "zero-advantage" if row is None else "ok",
        }
        if row is not None:
            entry["gradient_norm"] = norms[place] if norms else float(np.linalg.norm(row))
            entry["inner"] = dict(inner[place]) if inner else {}
        writer.add(entry, row)
        if writer.chunk_full:
            writer.commit({})
    writer.finish({}, skipped={})
    return Store(path)


def matrix(store: Store) -> np.ndarray:
    """The stored rows, scaled back: float64 [rows, dim]."""
    unit = np.concatenate([block for _, block in store.blocks()]).astype(np.float64)
    return unit * store.column("sketch_norm").astype(np.float64)[:, None]
