"""Stores of inner products by halves, made in code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gradient_stores import open_output

from cropi_tools.data.store import Store, StoreWriter


def halves_store(
    path: Path,
    scores: np.ndarray,
    norms: np.ndarray | None = None,
    *,
    missing: Sequence[int] = (),
    dead: int = 0,
    pass_rate: float = 0.5,
    mean: Any = None,
) -> Store:
    """A store of inner products by halves: scores [prompts, 2], norms of the halves alike or None.

    missing: prompts whose second half has no gradient; dead: prompts without any, added at the end.
    """
    facts: dict[str, Any] = {"policy": "P", "objective": {}, "tokenizer": "T", "layout": [], "device": "cpu"}
    mean = {"norm": 1.0, "sha256": "x", "halves": [1.0, 1.0]} if mean is None else mean
    output = open_output(path)
    writer = StoreWriter(output, len(scores) + dead, 0, {**facts, "projection": None, "against": {"t": mean}})
    for n, pair in enumerate(scores.tolist()):
        halves: list[Any] = [
            {"gradient_norm": None if norms is None else float(norms[n, half]), "inner": {"t": value}}
            for half, value in enumerate(pair)
        ]
        if n in missing:
            halves[1] = None
        entry = {"id": f"p{n}", "source": "s", "pass_rate": 0.5, "status": "ok"}
        writer.add_scalars({**entry, "inner": {"t": sum(pair) / 2}, "halves": halves})
    for n in range(dead):
        rate = pass_rate if n % 2 else 1 - pass_rate
        writer.add({"id": f"d{n}", "source": "s", "pass_rate": rate, "status": "zero-advantage"}, None)
    writer.finish({}, skipped={})
    return Store(path)
