"""Every seed's evaluations as plain values, with what had been spent by then: what other programs compute from."""

from __future__ import annotations

from typing import Any

from cropi_tools.report.costs import ALL_SECONDS, UNITS, cumulative
from cropi_tools.report.reading import Seed
from cropi_tools.report.structures import ArmFigures


def seed_points(arm: ArmFigures) -> dict[str, dict[str, Any]]:
    """By seed: `steps`, in order; `prompts` of every set, and `accuracy` on it at each step (0..1, null where it was not evaluated there);
    `seconds` of work, `all_seconds` (starting too) and `tokens`, each with the cost on `arrived` at a step and when the selection that begins
    there is paid for (`ready`), null where the files do not say.
    """
    found = {}
    for seed in arm.arm.seeds:
        steps = sorted({step for step, _ in seed.evaluations})
        accuracy: dict[str, list[float | None]] = {name: [] for name in sorted(seed.sets)}
        for name, values in accuracy.items():
            for step in steps:
                there = seed.evaluations.get((step, name))
                values.append(None if there is None else there.accuracy)
        costs = {unit: cumulative(arm.arm, seed, unit) for unit in (*UNITS, ALL_SECONDS)}
        found[seed.name] = {
            "finished": seed.finished,
            "steps": steps,
            "prompts": {name: _prompts(seed, name) for name in accuracy},
            "accuracy": accuracy,
            **{unit: _spent(cost, steps) for unit, cost in costs.items()},
        }
    return found


def _prompts(seed: Seed, name: str) -> int | None:
    """How many prompts a set has, where the evaluations say."""
    return next((found.prompts for (_, which), found in seed.evaluations.items() if which == name), None)


def _spent(cost: dict[int, tuple[float, float]] | None, steps: list[int]) -> dict[str, list[float]] | None:
    if cost is None or any(step not in cost for step in steps):
        return None
    return {name: [cost[step][side] for step in steps] for side, name in enumerate(("arrived", "ready"))}
