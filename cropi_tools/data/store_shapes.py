"""What the metadata of a gradient store must hold, checked as it is read, so that readers can rely on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi_tools.data import fields
from cropi_tools.data.fields import check_fields
from cropi_tools.data.jsonl import Record, read_jsonl
from cropi_tools.data.metadata import (
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    OBJECT,
    PARAMETERS,
    TEXT,
    WHOLE,
    Each,
    Listed,
    Maybe,
    fault,
)
from cropi_tools.runtime.errors import InputError

REMEDY = "the store is damaged, make it again"

ATTRIBUTES = {
    "schema?": COUNT,
    "policy?": TEXT,
    "objective?": OBJECT,
    "layout": PARAMETERS,
    "projection": Maybe(
        {
            "method": TEXT,
            "dim": COUNT,
            "seed": WHOLE,
            "layout": TEXT,
            "keep?": NUMBER,
            "segment?": COUNT,
            "hash_dim?": COUNT,
            "nonzeros?": COUNT,
            "version?": COUNT,
        }
    ),
    "against": Each(
        {"norm": NOT_NEGATIVE, "sha256": TEXT, "halves?": Listed(NOT_NEGATIVE, 2), "groups?": Listed(COUNT, 2)}
    ),
}

_LIVE = {
    "gradient_norm": Maybe(NUMBER),
    "sketch_norm?": Maybe(NUMBER),
    "inner": Each(NUMBER),
    "halves?": Maybe(
        Listed(Maybe({"gradient_norm": Maybe(NUMBER), "inner": Each(NUMBER), "groups?": Each(Listed(NUMBER))}), 2)
    ),
}


def numbered_entries(index: Path) -> Iterator[Record]:
    """The entries of a store's index, their rows checked to be numbered in order. InputError names the line of one that is damaged."""
    rows = 0
    for line, entry in read_jsonl(index):
        check_fields(entry, fields.STORE, f"{index}:{line}")
        for name in ("id", "source", "status", "pass_rate", "row"):
            if name not in entry:
                raise InputError(f"{index}:{line}: no field '{name}'; expected the index of a gradient store")
        row = entry["row"]
        if row is not None and row != rows:
            raise InputError(f"{index}:{line}: has row {row}, expected {rows} or null; {REMEDY}")
        rows += row is not None
        yield entry


def check_live(entry: Record, store: Path, means: Iterable[str]) -> None:
    """InputError unless the entry of a prompt with a gradient has its figures: norms, an inner product with each mean, in halves too."""
    wrong = fault(entry, _LIVE)
    products: list[Mapping[str, Any]] = [] if wrong else [entry, *filter(None, entry.get("halves") or ())]
    missing = next((name for found in products for name in means if name not in found["inner"]), None)
    if wrong or missing is not None:
        said = wrong or f"it has no inner product with {missing}"
        raise InputError(f"{store}: the entry of prompt '{entry['id']}': {said}; {REMEDY}")
