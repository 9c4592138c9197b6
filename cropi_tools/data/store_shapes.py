"""What the metadata of a gradient store must hold, checked as it is read, so that readers can rely on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi_tools.data.errors import InputError
from cropi_tools.data.jsonl import Record, read_jsonl
from cropi_tools.data.means import PARAMETERS
from cropi_tools.data.metadata import (
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    OBJECT,
    TEXT,
    WHOLE,
    Each,
    Listed,
    Maybe,
    checked,
    fault,
    is_number,
)

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
        identity, row, rate = entry.get("id"), entry.get("row", -1), entry.get("pass_rate", -1)
        if not isinstance(identity, str) or not (row is None or (type(row) is int and row == rows)):
            raise InputError(
                f"{index}:{line}: prompt '{_short(identity)}' has row {_short(row)}, expected {rows} or null; {REMEDY}"
            )
        # by hand: an index may have millions of lines
        known = isinstance(entry.get("source"), str) and isinstance(entry.get("status"), str) and "pass_rate" in entry
        if not known or not (rate is None or is_number(rate)):
            checked(entry, {"source": TEXT, "status": TEXT, "pass_rate": Maybe(NUMBER)}, f"{index}:{line}", REMEDY)
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


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
