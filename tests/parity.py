"""A verifier that any policy satisfies about half of the time: an even number of lower-case letters."""

from __future__ import annotations

from typing import Any


def reward(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    return float(sum(character.islower() for character in solution_str) % 2 == 0)
