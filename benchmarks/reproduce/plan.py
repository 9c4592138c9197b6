"""Reads plan.toml: what is compared, fixed before the runs."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAN = Path(__file__).with_name("plan.toml")
RECORDS = ROOT / "docs" / "results" / "reproduce"


@dataclass(frozen=True)
class Bed:
    """A bed of plan.toml; see there."""

    name: str
    title: str
    config: str
    seeds: int
    policies: int
    targets: tuple[str, ...]
    untargeted: tuple[str, ...]
    threshold: float
    arms: tuple[str, ...]
    subject: str
    controls: tuple[str, ...]
    goals: dict[str, float]
    wrong_references: str = ""

    def shared_by(self, seed: int) -> int:
        """Which starting policy a seed has."""
        return (seed - 1) % self.policies


def read_plan() -> dict[str, Bed]:
    """The beds by name, in the order of the plan."""
    with open(PLAN, "rb") as stream:
        plan = tomllib.load(stream)
    return {
        name: Bed(name=name, **{key: tuple(value) if isinstance(value, list) else value for key, value in bed.items()})
        for name, bed in plan["beds"].items()
    }


def record_path(bed: str, seed: int) -> Path:
    return RECORDS / f"{bed}-{seed}.json"
