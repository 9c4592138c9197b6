"""A part of a long sweep, the same at every run, or all of it: `THOROUGH=1 make test-slow`."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def some(cases: Sequence[T], share: float, key: str) -> list[T]:
    """So large a share of the cases, rounded up, in their order; drawn by the key."""
    if os.environ.get("THOROUGH"):
        return list(cases)
    kept = sorted(random.Random(key).sample(range(len(cases)), -int(-share * len(cases) // 1)))
    return [cases[place] for place in kept]
