"""Influence scores (method.md section 3): the cosine, or the inner product, of each prompt's gradient with a validation set's mean gradient.

Exact: inner products taken while the gradient was in memory, divided by exact norms. By sketches: cosine of a row with the mean
sketch of the set, which is the mean of rows times their norms, never the mean of unit rows. Rows and index are streamed side by side, so
that memory does not grow with the pool. Scores against single validation prompts take their rows in place of the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cropi_tools.data.jsonl import Record
from cropi_tools.data.store import Store, same_kind
from cropi_tools.runtime.errors import InputError
from cropi_tools.scores.row_products import row_products

Similarity = Literal["cosine", "dot"]

ONE = 1.0 + 1e-3  # a cosine may pass 1 by the rounding of float16 rows, not by more
ROWS_AT_ONCE = 8192

Block = tuple[int, NDArray[np.float64]]  # first row, scores [n, sets]


def exact_scores(
    stores: Sequence[Store], similarity: Similarity = "cosine", norms: Mapping[str, float] | None = None
) -> Iterator[Record]:
    """Score records from the inner products in the stores.

    norms: gradient norms by prompt id from elsewhere (`read_norms`), instead of the stores' own; of another policy, they make no true
    cosine, and a score may then pass 1. InputError: the stores hold no inner products, or not against the same means, or no norms.
    """
    against = shared_means(stores)
    scale = np.array([1.0 if similarity == "dot" else mean["norm"] for mean in against.values()])
    for store in stores:
        if norms is not None:
            own = _norms_of(store, norms)
        elif similarity == "cosine" or store.has_vectors:
            own = store.column("gradient_norm").astype(np.float64)
        else:
            own = None
        columns = [store.column(f"inner/{name}") for name in against]

        def blocks(columns: Sequence[Any] = columns, own: Any = own) -> Iterator[Block]:
            for start in range(0, len(columns[0]), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                scores = np.stack([column[part] for column in columns], axis=1) / scale
                yield start, scores / own[part, None] if similarity == "cosine" else scores

        bounded = similarity == "cosine" and norms is None
        yield from _records(store, list(against), blocks(), own, bounded)


def shared_means(stores: Sequence[Store]) -> dict[str, dict[str, Any]]:
    """What the inner products of the stores are with, the same for all. InputError: nothing, or different means."""
    against: dict[str, dict[str, Any]] = stores[0].attributes["against"]
    if not against:
        raise InputError(
            f"{stores[0].path}: holds no inner products; make it with cropi-grad --against NAME=MEAN, or score by sketches with --valid"
        )
    for store in stores[1:]:
        if store.attributes["against"] != against:
            raise InputError(f"{store.path}: its inner products are against other means than those of {stores[0].path}")
    return against


def read_norms(stores: Sequence[Store], like: Store) -> dict[str, float]:
    """Gradient norms by prompt id. The policy may be another than that of `like`; other parameters, or no norms, are an InputError."""
    norms = {}
    for store in stores:
        if store.attributes["layout"] != like.attributes["layout"]:
            raise InputError(
                f"{store.path}: its gradients are over other parameters than those of {like.path}; their norms do not belong together"
            )
        column = store.column("gradient_norm")
        norms.update(
            {entry["id"]: float(column[entry["row"]]) for entry in store.entries() if entry["row"] is not None}
        )
    return norms


def _norms_of(store: Store, norms: Mapping[str, float]) -> NDArray[np.float64]:
    """The norms of a store's rows, float64 [rows]. InputError: a prompt has none."""
    found = np.empty(store.rows)
    for entry in store.entries():
        if entry["row"] is not None:
            if entry["id"] not in norms:
                raise InputError(
                    f"{store.path}: prompt '{entry['id']}' has no gradient norm in the stores of --norms; give all of their shards"
                )
            found[entry["row"]] = norms[entry["id"]]
    return found


def mean_sketch(stores: Sequence[Store]) -> NDArray[np.float64]:
    """Mean over ALL prompts of a set of their sketched gradients, float64 [dim]; prompts without a gradient count as zero."""
    total = np.zeros(stores[0].dim)
    for store in stores:
        norms = store.column("sketch_norm").astype(np.float64)
        for start, block in store.blocks():
            total += norms[start : start + len(block)] @ block.astype(np.float64)
    return total / max(sum(store.prompts for store in stores), 1)


def sketch_scores(
    train: Sequence[Store],
    valid: Mapping[str, Sequence[Store]],
    similarity: Similarity = "cosine",
    each: bool = False,
) -> Iterator[Record]:
    """Score records of the train rows against each validation set, or against each of its prompts as the set NAME/ID.

    Prompts of a validation set without a gradient count as zero in its mean, and are no sets of their own. Memory: float32 [V, dim]
    for V sets. InputError: stores of different projections, policies or objectives, or without rows, or a validation set whose
    gradients are all zero.
    """
    names: list[str] = []
    directions: list[NDArray[np.float32]] = []
    lengths: list[float] = []
    for name, stores in valid.items():
        for store in stores:
            same_kind(train[0], store)
        sets_before = len(names)
        for target, sketch in _prompt_sketches(name, stores) if each else [(name, mean_sketch(stores))]:
            length = float(np.linalg.norm(sketch))
            if length > 0.0:
                names.append(target)
                directions.append((sketch / length).astype(np.float32))
                lengths.append(length)
        if len(names) == sets_before:
            raise InputError(
                f"validation set '{name}': none of its prompts has a gradient, so there is no direction to follow"
            )
    vectors = np.stack(directions)
    for store in train:
        norms = store.column("gradient_norm")
        scale = store.column("sketch_norm").astype(np.float64)[:, None] if similarity == "dot" else None

        def blocks(store: Store = store, scale: Any = scale) -> Iterator[Block]:
            for start, products in row_products(store, vectors):
                scores = products.astype(np.float64)
                if scale is not None:
                    scores *= scale[start : start + len(scores)] * np.array(lengths)
                yield start, scores

        yield from _records(store, names, blocks(), norms, similarity == "cosine")


def _prompt_sketches(name: str, stores: Sequence[Store]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """The sketch of every prompt with a gradient, as the set NAME/ID."""
    for store in stores:
        norms = store.column("sketch_norm").astype(np.float64)
        ids = (entry["id"] for entry in store.entries() if entry["row"] is not None)
        for start, block in store.blocks():
            for row, norm in zip(block, norms[start:], strict=False):
                yield f"{name}/{next(ids)}", row * norm


def _records(
    store: Store, names: Sequence[str], blocks: Iterator[Block], norms: NDArray[Any] | None, bounded: bool
) -> Iterator[Record]:
    """One record a prompt, in the store's order; prompts without a gradient have no score (not zero: many live cosines are negative).

    blocks: scores of the rows in order. bounded: the scores are cosines, which are cut to [-1, 1]. InputError names a prompt whose
    cosine is beyond it.
    """
    stop = 0
    rows: Iterator[list[float]] = iter(())
    for entry in store.entries():
        row = entry["row"]
        scores = None
        if row is not None:
            if row >= stop:
                start, block = next(blocks)
                _check(store, names, start, block, ONE if bounded else np.inf)
                rows = iter((np.clip(block, -1.0, 1.0) if bounded else block).tolist())
                stop = start + len(block)
            scores = dict(zip(names, next(rows), strict=True))
        yield {
            "id": entry["id"],
            "source": entry["source"],
            "scores": scores,
            "pass_rate": entry["pass_rate"],
            "norm": None if row is None or norms is None else float(norms[row]),
            "status": entry["status"],
        }


def _check(store: Store, names: Sequence[str], start: int, block: NDArray[np.float64], limit: float) -> None:
    bad = np.flatnonzero(~((np.abs(block) <= limit) & np.isfinite(block)).all(axis=1))
    if len(bad):
        values = dict(zip(names, block[bad[0]].tolist(), strict=True))
        what = "scores" if limit == np.inf else "cosines"
        raise InputError(
            f"{store.path}: prompt '{store.prompt_of(start + int(bad[0]))}' has {what} {values}; the store is damaged, make it again"
        )
