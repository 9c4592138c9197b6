"""Reads plan.toml: what is compared, fixed before the runs."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    arms: tuple[str, ...]
    subject: str
    controls: tuple[str, ...]
    goals: dict[str, float]
    wrong_references: str = ""
    aside: bool = False
    clock: str = "wall"
    threshold: float = 0.0

    def shared_by(self, seed: int) -> int:
        """Which starting policy a seed has."""
        return (seed - 1) % self.policies


def read_plan() -> dict[str, Bed]:
    """The beds by name, in the order of the plan."""
    with open(PLAN, "rb") as stream:
        beds = tomllib.load(stream)["beds"]
    found = {}
    for name, own in beds.items():
        bed = {**beds[own.pop("like")], **own} if "like" in own else own
        found[name] = Bed(
            name=name, **{key: tuple(value) if isinstance(value, list) else value for key, value in bed.items()}
        )
    return found


def record_path(bed: str, seed: int) -> Path:
    return RECORDS / f"{bed}-{seed}.json"


def rounded(value: Any, digits: int) -> Any:
    """Numbers to so many digits, for files that are kept in the repository; null for what is no number."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value
