"""What a seed of an arm took: sampling the pool once, scoring it at every stage, and training.

The shared first stage is charged in full to every seed of an arm that selected by scores, since a run of that seed
alone would pay all of it; arms that look at no score pay nothing for it. Shards add up: seconds are device seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cropi_tools.report.reading import Arm, Manifest, Run, Seed, Stage

UNITS = ("seconds", "tokens")
_SCORELESS = ("random", "full")


@dataclass(frozen=True)
class Cost:
    """Device seconds and tokens; None where no manifest or log said."""

    seconds: float | None = None
    generated: float | None = None
    trained: float | None = None
    scored: float | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            _sum([self.seconds, other.seconds]),
            _sum([self.generated, other.generated]),
            _sum([self.trained, other.trained]),
            _sum([self.scored, other.scored]),
        )

    def scaled(self, factor: float) -> Cost:
        def times(value: float | None) -> float | None:
            return None if value is None else value * factor

        return Cost(times(self.seconds), times(self.generated), times(self.trained), times(self.scored))

    @property
    def tokens(self) -> float | None:
        """Tokens that went through the model: generated, trained on and scored."""
        return _sum([self.generated, self.trained, self.scored])

    def of(self, unit: str) -> float | None:
        return self.seconds if unit == "seconds" else self.tokens


@dataclass(frozen=True)
class Ledger:
    """The cost of one seed (or the mean over seeds). `evaluation` is the part of training spent on evaluating, in
    seconds.
    """

    sampling: Cost = Cost()
    scoring: Cost = Cost()
    training: Cost = Cost()
    evaluation: float | None = None

    @property
    def total(self) -> Cost:
        return self.sampling + self.scoring + self.training


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _amount(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def manifest_cost(manifest: Manifest) -> Cost:
    """The ledger of one manifest."""
    keys = ("seconds", "tokens_generated", "tokens_trained", "tokens_scored")
    return Cost(*(_amount(manifest.ledger, key) for key in keys))


def uses_scores(arm: Arm) -> bool:
    """Whether some stage of the arm was selected from a scores file (one handed to `random` or `full` is not looked
    at).
    """
    return any(
        ("scores" in name or "scores" in path.rsplit("/", 1)[-1]) and manifest.options.get("by") not in _SCORELESS
        for seed in arm.seeds
        for stage in seed.stages
        for manifest in stage.manifests
        if manifest.path.endswith("selected.jsonl.manifest.json")
        for name, path in manifest.inputs.items()
    )


def _selecting(manifests: Iterable[Manifest]) -> tuple[Cost, Cost]:
    """(sampling, scoring): rollouts apart from gradients, means, sketches, scores and the selection itself."""
    sampling, scoring = Cost(), Cost()
    for manifest in manifests:
        if manifest.command == "cropi-rollout":
            sampling += manifest_cost(manifest)
        else:
            scoring += manifest_cost(manifest)
    return sampling, scoring


def _training(stage: Stage) -> Cost:
    """The policy's ledger; what it does not say (or an unfinished stage) is added up from the logs of the steps."""
    said = manifest_cost(stage.policy) if stage.policy else Cost()
    timed = _sum(
        _amount(record, key)
        for record in stage.timings
        for key in ("seconds_sampling", "seconds_update", "seconds_evaluation")
    )
    generated = _sum(_amount(record, "tokens_generated") for record in stage.metrics)
    trained = _sum(_amount(record, "tokens_trained") for record in stage.metrics)

    def first(value: float | None, otherwise: float | None) -> float | None:
        return otherwise if value is None else value

    return Cost(first(said.seconds, timed), first(said.generated, generated), first(said.trained, trained), said.scored)


def seed_ledger(run: Run, arm: Arm, seed: Seed) -> Ledger:
    """Everything one seed took, all its stages, with the shared first stage where the arm uses scores."""
    sampling, scoring = _selecting(run.start) if uses_scores(arm) else (Cost(), Cost())
    training = Cost()
    for stage in seed.stages:
        stage_sampling, stage_scoring = _selecting(stage.manifests)
        sampling, scoring, training = sampling + stage_sampling, scoring + stage_scoring, training + _training(stage)
    evaluation = _sum(_amount(record, "seconds_evaluation") for stage in seed.stages for record in stage.timings)
    return Ledger(sampling, scoring, training, evaluation)


def mean_ledger(ledgers: list[Ledger]) -> Ledger:
    """The cost of one seed, on average."""

    def mean(costs: list[Cost]) -> Cost:
        return sum(costs, Cost()).scaled(1 / len(costs))

    evaluation = _sum(ledger.evaluation for ledger in ledgers)
    return Ledger(
        mean([ledger.sampling for ledger in ledgers]),
        mean([ledger.scoring for ledger in ledgers]),
        mean([ledger.training for ledger in ledgers]),
        None if evaluation is None else evaluation / len(ledgers),
    )


def cumulative(run: Run, arm: Arm, seed: Seed, unit: str) -> dict[int, tuple[float, float]] | None:
    """Cost up to each global step, in device seconds or in tokens; None where the files do not say.

    Each step has two costs: on arriving there, and when the selection for the next stage is made, if a stage begins
    there. Seconds are those of sampling and updates: evaluation, which every arm pays for being measured, and loading
    the model are left out.
    """
    spent = sum((manifest_cost(item) for item in run.start), Cost()).of(unit) or 0.0 if uses_scores(arm) else 0.0
    keys = ("seconds_sampling", "seconds_update") if unit == "seconds" else ("tokens_generated", "tokens_trained")
    at = {0: (0.0, spent)}
    for stage in seed.stages:
        arrived = at[stage.offset][0]
        spent += sum((manifest_cost(item) for item in stage.manifests), Cost()).of(unit) or 0.0
        at[stage.offset] = (arrived, spent)
        records = stage.timings if unit == "seconds" else stage.metrics
        steps: dict[int, float] = {}
        for record in records:  # an evaluation is timed in a record of its own, under the same step
            here = int(record["step"])
            steps[here] = steps.get(here, 0.0) + sum(_amount(record, key) or 0.0 for key in keys)
        for step in range(1, stage.steps + 1):
            if step not in steps:
                return None
            spent += steps[step]
            at[stage.offset + step] = (spent, spent)
    return at
