"""Verifiers: one that any policy satisfies about half of the time (an even number of lower-case letters), and some that go wrong."""

from __future__ import annotations

import math
import os
from typing import Any


def reward(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    return float(sum(character.islower() for character in solution_str) % 2 == 0)


def never(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    return 0.0


def dies(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    os._exit(3)


def not_a_number(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    return math.nan


def sometimes_dies(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    if len(solution_str) == 3:
        os._exit(3)
    return reward(data_source, solution_str, ground_truth, extra_info)


def wrong_for_p1(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    return math.nan if ground_truth == "1" else reward(data_source, solution_str, ground_truth, extra_info)


def varied(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """What a constant answer never satisfies: four different characters."""
    return float(len(set(solution_str)) >= 4)
