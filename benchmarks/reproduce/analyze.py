"""From the records of `run.py` to the figures of plan.toml: docs/results/reproduce.json, tables and pictures.

    python benchmarks/reproduce/analyze.py                # print the tables, write the JSON and the pictures
    python benchmarks/reproduce/analyze.py --no-pictures

Every rule is plan.toml's. Arms are compared over the seeds that have a record, which holds all arms of the bed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from plan import RECORDS, ROOT, Bed, read_plan, record_path, rounded

from cropi_tools.intervals import wilson
from cropi_tools.report.speeds import LATE, Curves, Factor, Speed, factors, speed
from cropi_tools.report.statistics import CONFIDENCE, Interval, holm, mean, paired_interval

RESULT = ROOT / "docs" / "results" / "reproduce.json"
UNITS = {"steps": "steps", "tokens": "tokens", "work_seconds": "seconds", "all_seconds": "all_seconds"}
"""Our names of the units by those of the result. Records of beds (a) and (b) have no `all_seconds`."""
UNPLANNED = (
    ("cropi", "complete"),
    ("cropi", "static"),
    ("cropi", "families"),
    ("complete", "static"),
    ("complete", "shuffled"),
    ("complete", "learnability"),
)
"""Differences that the plan does not name: shown as such, with no correction."""

OF_GAIN = 0.8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One arm over the seeds of a bed: the accuracy on each set [seeds, points], and what was spent at each point."""

    name: str
    steps: tuple[int, ...]
    prompts: Mapping[str, int]
    accuracy: Mapping[str, Floats]
    spent: Mapping[str, tuple[Floats, Floats]]
    selected: tuple[Sequence[Mapping[str, int]], ...]

    def on(self, sets: Sequence[str]) -> Floats:
        """The mean accuracy over sets, [seeds, points]."""
        found: Floats = np.mean([self.accuracy[name] for name in sets], axis=0)
        return found

    def curves(self, sets: Sequence[str], unit: str) -> Curves:
        values = self.on(sets)
        if unit == "steps":
            at = np.broadcast_to(np.array(self.steps, dtype=np.float64), values.shape)
            return Curves(values, at, at)
        return Curves(values, *self.spent[unit])

    def questions(self, sets: Sequence[str]) -> int:
        """How many prompts the sets have together."""
        return sum(self.prompts[name] for name in sets)

    def final(self, sets: Sequence[str]) -> Floats:
        """By seed the mean of the last evaluations."""
        found: Floats = self.on(sets)[:, -LATE:].mean(1)
        return found


class Final(NamedTuple):
    """A mean over seeds with its 95 % interval of Student's t; where all seeds agree, as at 0, or there is one, Wilson's over the questions."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats, prompts: int) -> Final:
        center = float(values.mean())
        over_seeds = paired_interval(values.tolist())
        low, high = (over_seeds.low, over_seeds.high) if over_seeds else wilson(center, prompts)
        return cls(center, max(low, 0.0), min(high, 1.0))


class Contrast(NamedTuple):
    """An arm's final accuracy less another's: by seed and by starting policy, its t interval, that with Bonferroni's correction, Holm's p.
    The last two are None for what was not planned.
    """

    arm: str
    control: str
    by_seed: tuple[float, ...]
    by_policy: tuple[float, ...]
    interval: Interval | None
    corrected: Interval | None = None
    p: float | None = None


class Bench:
    """A bed with the records of its seeds."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.records = {
            seed: json.loads(record_path(bed.name, seed).read_text())
            for seed in range(1, bed.seeds + 1)
            if record_path(bed.name, seed).exists()
        }
        self.seeds = tuple(self.records)

    @cached_property
    def arms(self) -> dict[str, Measured]:
        return {name: self._measured(name) for name in self.bed.arms} if self.records else {}

    def _measured(self, name: str) -> Measured:
        each = [record["arms"][name] for record in self.records.values()]
        points = [one["points"] for one in each]
        (steps,) = {tuple(found["steps"]) for found in points}
        return Measured(
            name,
            steps,
            points[0]["prompts"],
            {
                sets: np.array([found["accuracy"][sets] for found in points], dtype=np.float64)
                for sets in points[0]["accuracy"]
            },
            {
                unit: (
                    np.array([found[unit]["arrived"] for found in points], dtype=np.float64),
                    np.array([found[unit]["ready"] for found in points], dtype=np.float64),
                )
                for unit in UNITS.values()
                if unit != "steps" and all(unit in found for found in points)
            },
            tuple(one["selected"] for one in each),
        )

    @cached_property
    def units(self) -> tuple[str, ...]:
        """Those of UNITS that all its records have."""
        return tuple(
            unit
            for unit, ours in UNITS.items()
            if ours == "steps" or all(ours in arm.spent for arm in self.arms.values())
        )

    @cached_property
    def finals(self) -> dict[str, Final]:
        return {
            name: Final.of(arm.final(self.bed.targets), arm.questions(self.bed.targets))
            for name, arm in self.arms.items()
        }

    @cached_property
    def untargeted(self) -> dict[str, Final]:
        return {
            name: Final.of(arm.final(self.bed.untargeted), arm.questions(self.bed.untargeted))
            for name, arm in self.arms.items()
        }

    @cached_property
    def threshold(self) -> float:
        """The bed's; where it has none, by the rule of the plan."""
        if self.bed.threshold:
            return self.bed.threshold
        start, end = self.start(self.bed.targets), self.finals["full"].mean
        return start + OF_GAIN * (end - start)

    def start(self, sets: Sequence[str]) -> float:
        """The starting policies' accuracy, over seeds."""
        return float(np.mean([arm.on(sets)[:, 0].mean() for arm in self.arms.values()]))

    def speed(self, name: str, unit: str) -> Speed:
        """How many times less of a unit an arm needs than full up to the bed's threshold."""
        ours, theirs = (self.arms[arm].curves(self.bed.targets, UNITS[unit]) for arm in (name, "full"))
        return speed(ours, theirs, [str(seed) for seed in self.seeds], "full", self.threshold, None)

    def at_least(self, name: str, unit: str) -> float | None:
        """Where full never gets to the threshold and the arm does: what full has spent at its end, divided by what the arm needed."""
        found = self.speed(name, unit)
        if found.reference_needed is not None or not found.needed:
            return None
        return float(self.arms["full"].curves(self.bed.targets, UNITS[unit]).ready[:, -1].mean()) / found.needed

    def null(self, unit: str) -> list[Factor]:
        """The same figure for each two seeds of full that have one starting policy, which differ by nothing but luck."""
        curves = self.arms["full"].curves(self.bed.targets, UNITS[unit])
        goal = np.array([self.threshold])
        pairs = [
            (one, other)
            for one, other in permutations(range(len(self.seeds)), 2)
            if self.bed.shared_by(self.seeds[one]) == self.bed.shared_by(self.seeds[other])
        ]
        single = [curves.of(np.eye(len(self.seeds))[[place]]) for place in range(len(self.seeds))]
        return [factors(single[one], single[other], goal)[0] for one, other in pairs]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """The subject against every control of the plan."""
        found = [self.contrast(self.bed.subject, name) for name in self.bed.controls]
        tested = [contrast for contrast in found if contrast.interval is not None]
        p_values = holm([contrast.interval.p for contrast in tested if contrast.interval is not None])
        adjusted = dict(zip([contrast.control for contrast in tested], p_values, strict=True))
        level = 1 - (1 - CONFIDENCE) / len(found)
        return [
            contrast._replace(p=adjusted.get(contrast.control), corrected=paired_interval(contrast.by_seed, level))
            for contrast in found
        ]

    @cached_property
    def unplanned(self) -> list[Contrast]:
        """What one asks on seeing the tables, for pairs whose arms the bed has."""
        return [self.contrast(*pair) for pair in UNPLANNED if set(pair) <= set(self.arms)]

    def contrast(self, arm: str, control: str) -> Contrast:
        """One arm's final accuracy less another's."""
        gap = self.arms[arm].final(self.bed.targets) - self.arms[control].final(self.bed.targets)
        policies = np.array([self.bed.shared_by(seed) for seed in self.seeds])
        by_policy = tuple(float(gap[policies == policy].mean()) for policy in sorted(set(policies.tolist())))
        return Contrast(arm, control, tuple(gap), by_policy, paired_interval(list(gap)))


def own_ratios(found: Speed) -> dict[str, float] | None:
    """The geometric mean of the seeds' own factors with its t interval; None unless every seed has one. Mean curves have another."""
    ratios = [factor.exact for factor in found.by_seed.values()]
    known = [math.log(ratio) for ratio in ratios if ratio]
    if len(known) < len(ratios):
        return None
    interval = paired_interval(known)
    if interval is None:
        return None
    return {"mean": math.exp(interval.mean), "low": math.exp(interval.low), "high": math.exp(interval.high)}


def as_json(benches: Sequence[Bench]) -> dict[str, Any]:
    """The result: null for what has no end or was not reached."""
    return {"beds": {bench.bed.name: bed_json(bench) for bench in benches}}


def bed_json(bench: Bench) -> dict[str, Any]:
    reached = {
        (name, unit): speed_json(bench, name, unit) for name in bench.arms if name != "full" for unit in bench.units
    }
    return {
        "seeds": len(bench.seeds),
        "threshold": bench.threshold,
        "dates": sorted({record["date"] for record in bench.records.values()}),
        "devices": sorted({record["device"] for record in bench.records.values()}),
        "start": bench.start(bench.bed.targets),
        "arms": {
            name: {
                "final": bench.finals[name]._asdict(),
                "untargeted": bench.untargeted[name]._asdict(),
                "curve": [
                    [step, float(value)]
                    for step, value in zip(arm.steps, arm.on(bench.bed.targets).mean(0), strict=True)
                ],
            }
            for name, arm in bench.arms.items()
        },
        "speedup": {name: {unit: reached[name, unit] for unit in bench.units} for name in bench.arms if name != "full"},
        "null": {unit: null_json(bench.null(unit)) for unit in bench.units},
        "differences": {contrast.control: contrast_json(contrast) for contrast in bench.contrasts},
        "not_planned": {f"{one.arm} less {one.control}": contrast_json(one) for one in bench.unplanned},
    }


def contrast_json(found: Contrast) -> dict[str, Any]:
    return {
        "mean": mean(found.by_seed),
        "low": found.interval and found.interval.low,
        "high": found.interval and found.interval.high,
        "corrected": found.corrected and [found.corrected.low, found.corrected.high],
        "p_holm": found.p,
        "by_policy": list(found.by_policy),
    }


def speed_json(bench: Bench, name: str, unit: str) -> dict[str, Any]:
    found = bench.speed(name, unit)
    low, high = found.interval or (0.0, math.inf)
    return {
        "mean": found.ratio,
        "at_least": bench.at_least(name, unit),
        "low": low or None,
        "high": None if math.isinf(high) else high,
        "reached": sum(factor.arm_reached for factor in found.by_seed.values()),
        "own_ratios": own_ratios(found),
    }


def null_json(found: Sequence[Factor]) -> dict[str, Any]:
    known = sorted(factor.exact for factor in found if factor.exact is not None)
    return {
        "pairs": len(found),
        "missed": len(found) - len(known),
        "low": min(known, default=None),
        "high": max(known, default=None),
    }


def main() -> None:
    from tables import fill_page, goals_of, main_table, tables

    parser = argparse.ArgumentParser(description="Figures, tables and pictures of the comparison.")
    parser.add_argument("--no-pictures", action="store_true", help="figures and tables alone")
    options = parser.parse_args()
    benches = [bench for bench in map(Bench, read_plan().values()) if bench.records]
    if not benches:
        raise SystemExit(f"analyze.py: no records in {RECORDS}; run.py makes them")
    whole = [bench for bench in benches if len(bench.seeds) == bench.bed.seeds]
    for bench in benches:
        if bench not in whole:
            print(f"{bench.bed.name}: not all seeds have a record, so no page shows it", file=sys.stderr)
    RESULT.write_text(json.dumps(rounded(as_json(benches), 4), indent=1) + "\n")
    found = {bench.bed.name: tables(bench) for bench in benches}
    shown = [bench for bench in whole if not bench.bed.aside]
    if shown:
        fill_page({**{bench.bed.name: found[bench.bed.name] for bench in whole}, "main": main_table(shown)})
    for bench in benches:
        print(f"\n{bench.bed.title}\n\n{found[bench.bed.name]}")
        for line in goals_of(bench):
            print(line)
    if not options.no_pictures:
        from pictures import draw_curves, draw_main

        for bench in shown:
            draw_curves(bench, RECORDS.with_name(f"reproduce-{bench.bed.name}.png"))
        if shown:
            draw_main(shown, RECORDS.with_name("reproduce.png"))


if __name__ == "__main__":
    main()
