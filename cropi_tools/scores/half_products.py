"""Inner products by halves, as cropi-grad --halves has put them into stores."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cropi_tools.data.jsonl import Record
from cropi_tools.data.store import Store
from cropi_tools.data.store_shapes import REMEDY, check_live
from cropi_tools.runtime.errors import InputError

Scores = NDArray[np.float64]


class HalfProducts(NamedTuple):
    """Of the prompts with a gradient, in their order: norms [prompts, 2] (NaN if unknown), inner products [prompts, 2, sets], and for each
    set what each group of validation prompts adds to them, [prompts, groups] in either half; None where that was not measured. All of a half
    without a gradient is NaN.
    """

    norms: Scores
    inner: Scores
    groups: list[list[Scores]] | None

    def of_both(self) -> HalfProducts:
        """Those of the prompts that have a gradient in both halves."""
        both = ~np.isnan(self.inner).any(axis=(1, 2))
        groups = self.groups and [[part[both] for part in parts] for parts in self.groups]
        return HalfProducts(self.norms[both], self.inner[both], groups)


def read_halves(stores: Sequence[Store], against: Mapping[str, Mapping[str, Any]]) -> HalfProducts:
    """The halves in stores whose products are with the means `against`. InputError: the stores hold no halves, or damaged ones."""
    if not all("halves" in mean for mean in against.values()):
        raise InputError(
            f"{stores[0].path}: holds no halves to compare; cropi-grad --halves makes them, of the means of --against and then of the store"
        )
    with_groups = all("groups" in mean for mean in against.values())
    counts: list[list[int]] = [mean["groups"] for mean in against.values()] if with_groups else []
    sets = len(against)
    widths = [1 + sets + sum(count[half] for count in counts) for half in (0, 1)]
    # of each prompt: of each half its norm, for each set its inner product, and the groups' parts
    numbers = array("d")
    for store in stores:
        for entry in store.entries():
            if entry["row"] is None:
                continue
            for place, half in enumerate(_halves_of(entry, store, against)):
                if half is None:
                    numbers.extend([math.nan] * widths[place])
                else:
                    numbers.extend(_figures(half, place, against, counts, f"{store.path}: prompt '{entry['id']}'"))
    table = np.array(numbers, np.float64).reshape(-1, sum(widths))
    sides: list[Scores] = [table[:, : widths[0]], table[:, widths[0] :]]
    norms = np.stack([side[:, 0] for side in sides], 1)
    inner = np.stack([side[:, 1 : 1 + sets] for side in sides], 1)
    if not with_groups:
        return HalfProducts(norms, inner, None)
    bounds = [np.cumsum([1 + sets, *(count[half] for count in counts)]) for half in (0, 1)]
    groups = [[side[:, at[s] : at[s + 1]] for side, at in zip(sides, bounds, strict=True)] for s in range(sets)]
    return HalfProducts(norms, inner, groups)


def _halves_of(entry: Record, store: Store, against: Mapping[str, Any]) -> Sequence[Record | None]:
    halves = entry.get("halves")
    if not isinstance(halves, list) or len(halves) != 2:
        raise InputError(f"{store.path}: prompt '{entry['id']}' has no halves; {REMEDY}")
    check_live(entry, store.path, against)
    return halves


def _figures(
    half: Record, place: int, against: Mapping[str, Any], counts: Sequence[Sequence[int]], where: str
) -> list[float]:
    """Norm, products and groups' parts of one half."""
    norm = half.get("gradient_norm")
    found = [math.nan if norm is None else norm, *(half["inner"][name] for name in against)]
    for name, count in zip(against, counts, strict=False):  # none without groups
        parts = half.get("groups", {}).get(name, ())
        if len(parts) != count[place]:
            raise InputError(
                f"{where} has {len(parts)} groups of {name} in half {place + 1}, the mean {count[place]}; {REMEDY}"
            )
        found.extend(parts)
    return found
