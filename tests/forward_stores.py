"""Small stores as forward mode writes them: inner products without gradients or norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradient_stores import LAYOUT, open_output

from cropi_tools.data.store import Store, StoreWriter


def forward_store(path: Path, count: int, stop_at: int | None = None) -> Store:
    """Prompt p{n} has the inner product n with the mean `t`, and p2 no gradient; stop_at: left unfinished after so many, committed."""
    facts: dict[str, Any] = {"policy": "P", "objective": {"weighting": "token"}, "tokenizer": "T", "device": "cpu"}
    facts.update(layout=LAYOUT.to_json(), projection=None, against={"t": {"norm": 1.0, "sha256": "x"}})
    output = open_output(path)
    writer = StoreWriter(output, count, 0, facts)
    for n in range(writer.records, count if stop_at is None else stop_at):
        entry: dict[str, Any] = {"id": f"p{n}", "source": "s", "pass_rate": 0.5, "status": "ok"}
        if n == 2:
            writer.add({**entry, "status": "zero-advantage"}, None)
        else:
            writer.add_scalars({**entry, "inner": {"t": float(n)}})
    if stop_at is None:
        writer.finish({}, skipped={})
        return Store(path)
    writer.commit({})
    writer._index.close()
    output._release_lock()
    raise Unfinished


class Unfinished(Exception):
    """The store was left as a kill would leave it."""
