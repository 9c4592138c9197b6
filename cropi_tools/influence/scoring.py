"""Influence scores (method.md section 3): the cosine of each prompt's gradient with a validation set's mean gradient.

Exact: inner products taken while the gradient was in memory, divided by exact norms. By sketches: cosine of a row with the mean
sketch of the set, which is the mean of rows times their norms, never the mean of unit rows. Stores are streamed in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cropi_tools.data.errors import InputError
from cropi_tools.data.jsonl import Record
from cropi_tools.data.store import Store, same_kind

ONE = 1.0 + 1e-3  # a cosine may pass 1 by the rounding of float16 rows, not by more


def exact_scores(stores: Sequence[Store]) -> Iterator[Record]:
    """Score records from the inner products in the stores. InputError: the stores hold none, or not against the same means."""
    against = stores[0].attributes["against"]
    if not against:
        raise InputError(
            f"{stores[0].path}: holds no inner products; make it with cropi-grad --against NAME=MEAN, or score by sketches with --valid"
        )
    for store in stores[1:]:
        if store.attributes["against"] != against:
            raise InputError(f"{store.path}: its inner products are against other means than those of {stores[0].path}")
    for store in stores:
        norms = store.column("gradient_norm").astype(np.float64)
        cosines = {name: store.column(f"inner/{name}") / (norms * mean["norm"]) for name, mean in against.items()}
        yield from _records(store, cosines)


def mean_sketch(stores: Sequence[Store]) -> np.ndarray:
    """Mean over ALL prompts of a set of their sketched gradients, float64 [dim]; prompts without a gradient count as zero."""
    total = np.zeros(stores[0].dim)
    for store in stores:
        norms = store.column("sketch_norm").astype(np.float64)
        for start, block in store.blocks():
            total += norms[start : start + len(block)] @ block.astype(np.float64)
    return total / sum(len(store.index) for store in stores)


def sketch_scores(train: Sequence[Store], valid: Mapping[str, Sequence[Store]]) -> Iterator[Record]:
    """Score records of the train rows against each validation set. InputError: stores of different projections, policies or objectives,
    or a validation set whose gradients are all zero.
    """
    directions = {}
    for name, stores in valid.items():
        for store in stores:
            same_kind(train[0], store)
        mean = mean_sketch(stores)
        norm = float(np.linalg.norm(mean))
        if norm == 0.0:
            raise InputError(
                f"validation set '{name}': none of its prompts has a gradient, so there is no direction to follow"
            )
        directions[name] = (mean / norm).astype(np.float32)
    for store in train:
        cosines = {name: np.empty(len(store.live), dtype=np.float64) for name in directions}
        for start, block in store.blocks():
            for name, direction in directions.items():
                cosines[name][start : start + len(block)] = block @ direction
        yield from _records(store, cosines)


def _records(store: Store, cosines: Mapping[str, np.ndarray]) -> Iterator[Record]:
    """One record a prompt, in the store's order; prompts without a gradient have no score (not zero: many live cosines are negative)."""
    norms = store.column("gradient_norm")
    for entry in store.index:
        row = entry["row"]
        record: Record = {"id": entry["id"], "source": entry["source"], "scores": None, "pass_rate": entry["pass_rate"]}
        if row is not None:
            values = {name: float(column[row]) for name, column in cosines.items()}
            if not all(abs(value) <= ONE for value in values.values()):
                raise InputError(
                    f"{store.path}: prompt '{entry['id']}' has cosines {values}; the store is damaged, make it again"
                )
            record["scores"] = {name: max(-1.0, min(1.0, value)) for name, value in values.items()}
        yield {**record, "norm": None if row is None else float(norms[row]), "status": entry["status"]}
