"""What a comparison of arms consists of; `comparison.py` fills it in, the other modules show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cropi_tools.report.costs import Ledger
from cropi_tools.report.reading import Arm, Run, Seed
from cropi_tools.report.speeds import Speed
from cropi_tools.report.statistics import Interval, mean

SUBJECT = "cropi"


@dataclass(frozen=True)
class SetFigure:
    """Accuracy (0..1) at one step: mean and spread over seeds, and the least evaluation noise of that mean.

    interval: with one seed, the 95 % interval that the prompts of its evaluations allow; None with several, or where the numbers
    of prompts are not known.
    """

    mean: float
    spread: float | None
    error: float | None
    seeds: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Difference:
    """An arm minus its baseline in mean target accuracy, paired by seed, at one step. alone: counted seeds of either arm that the
    other has not, which are left out.
    """

    baseline: str
    step: int
    by_seed: Mapping[str, float]
    interval: Interval | None
    adjusted_p: float | None = None
    alone: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return mean(list(self.by_seed.values()))


class CurvePoint(NamedTuple):
    """A point of a mean curve: the step, what was spent up to here, and the mean target accuracy."""

    step: int
    cost: float
    value: float


@dataclass(frozen=True)
class ArmFigures:
    """All figures of one arm. `curve` is (step, mean target accuracy) over the counted seeds; `seed_curves` those of
    every seed.
    """

    label: str
    kind: str
    run: Run
    arm: Arm
    counted: tuple[Seed, ...]
    step: int | None
    sets: Mapping[str, SetFigure]
    target: SetFigure | None
    curve: tuple[tuple[int, float], ...]
    seed_curves: Mapping[str, tuple[tuple[int, float], ...]]
    ledgers: Mapping[str, Ledger]
    ledger: Ledger
    charged: bool
    difference: Difference | None = None
    speed: Mapping[str, Speed] | None = None

    @property
    def unfinished(self) -> tuple[Seed, ...]:
        return tuple(seed for seed in self.arm.seeds if not seed.finished)


@dataclass(frozen=True)
class Comparison:
    """What a report shows. `targets` are the sets in the mean; `start` the figures at step 0; `notes` what a reader
    must know.
    """

    runs: tuple[Run, ...]
    sets: tuple[str, ...]
    targets: tuple[str, ...]
    start: Mapping[str, SetFigure]
    start_target: SetFigure | None
    arms: tuple[ArmFigures, ...]
    baseline: str
    reference: str
    threshold: float | None
    notes: tuple[str, ...]

    @property
    def subject(self) -> ArmFigures | None:
        """The arm the summary is about: cropi, else the last that is neither baseline nor reference."""
        others = [arm for arm in self.arms if arm.kind not in (self.baseline, self.reference)]
        return next((arm for arm in others if arm.kind == SUBJECT), others[-1] if others else None)
