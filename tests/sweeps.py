"""A part of a long sweep, the same at every run, or all of it: `THOROUGH=1 make test-slow`."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def some(cases: Iterable[T], share: float, key: str) -> list[T]:
    """So large a share of the cases, rounded up, in their order; drawn by the key."""
    whole = list(cases)
    if os.environ.get("THOROUGH"):
        return whole
    kept = random.Random(key).sample(range(len(whole)), math.ceil(share * len(whole)))
    return [whole[place] for place in sorted(kept)]
