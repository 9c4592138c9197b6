"""What a seed of an arm took: sampling the pool once, scoring it at every stage, and training.

An arm is charged what its selection read. Of the shared first stage that is everything for influence (static and shuffled too),
the rollouts of validation and the pool's features for stages that probe, since they sample and score a part of the pool themselves,
the rollouts of the pool for learnability, hardest and pass-rate, which read no more than pass rates, and nothing for random and full. It is
charged in full to every seed, since a run of that seed alone would pay all of it.

Seconds are device seconds: shards and processes add up. They are of work on both sides; starting (imports, loading, compiling,
trying out) is counted apart. For training, work is sampling and updates; evaluating, which every arm pays for being measured, is apart
too. Ledgers of earlier versions do not tell start and work apart: all their seconds are work, evaluations included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cropi_tools.data.fields import AMOUNT
from cropi_tools.report.pool import SUSPECTS
from cropi_tools.report.reading import SELECTION_MANIFEST, Arm, Manifest, Seed, Stage

UNITS = ("seconds", "tokens")
ALL_SECONDS = "all_seconds"  # of work and of starting
_SCORELESS = ("random", "full")
_BY_PASS_RATE = ("learnability", "hardest", "pass-rate")
_EMBED = "cropi-embed"
_VALIDATION = "valid-"  # how the names of validation rollouts begin


@dataclass(frozen=True)
class Cost:
    """Device seconds of work, tokens, and device seconds of starting; None where no manifest or log said."""

    seconds: float | None = None
    generated: float | None = None
    trained: float | None = None
    scored: float | None = None
    start: float | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            _sum([self.seconds, other.seconds]),
            _sum([self.generated, other.generated]),
            _sum([self.trained, other.trained]),
            _sum([self.scored, other.scored]),
            _sum([self.start, other.start]),
        )

    def scaled(self, factor: float) -> Cost:
        def times(value: float | None) -> float | None:
            return None if value is None else value * factor

        return Cost(
            times(self.seconds), times(self.generated), times(self.trained), times(self.scored), times(self.start)
        )

    @property
    def tokens(self) -> float | None:
        """Tokens that went through the model: generated, trained on and scored."""
        return _sum([self.generated, self.trained, self.scored])

    def of(self, unit: str) -> float | None:
        if unit == ALL_SECONDS:
            return _sum([self.seconds, self.start])
        return self.seconds if unit == "seconds" else self.tokens


@dataclass(frozen=True)
class Ledger:
    """The cost of one seed (or the mean over seeds). `evaluation`: seconds of evaluating, part of no sum. `unsplit`: ledgers whose seconds
    are not told apart into start and work.
    """

    sampling: Cost = Cost()
    scoring: Cost = Cost()
    training: Cost = Cost()
    evaluation: float | None = None
    unsplit: int = 0

    @property
    def total(self) -> Cost:
        return self.sampling + self.scoring + self.training


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _amount(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return value if AMOUNT.holds(value) else None


def manifest_cost(manifest: Manifest) -> Cost:
    """The ledger of one manifest; all its seconds where it does not tell start and work apart."""
    seconds = "seconds_work" if is_split(manifest) else "seconds"
    keys = (seconds, "tokens_generated", "tokens_trained", "tokens_scored", "seconds_start")
    return Cost(*(_amount(manifest.ledger, key) for key in keys))


def is_split(manifest: Manifest) -> bool:
    """Whether the ledger tells start and work apart."""
    return None not in (_amount(manifest.ledger, "seconds_start"), _amount(manifest.ledger, "seconds_work"))


def looks_at_pool(arm: Arm) -> bool:
    """Whether some stage of the arm was selected from scores or rollouts of the pool (what is handed to `random` or `full` is not looked at)."""
    return any(
        any(kind in name or kind in path.rsplit("/", 1)[-1] for kind in ("scores", "rollouts"))
        and manifest.options.get("by") not in _SCORELESS
        for seed in arm.seeds
        for stage in seed.stages
        for manifest in stage.manifests
        if manifest.path.endswith(SELECTION_MANIFEST)
        for name, path in manifest.inputs.items()
    )


def read_of_start(arm: Arm, seed: Seed) -> list[Manifest]:
    """The manifests of the shared first stage that the arm's selections read for a seed, directly or through what was made of them."""
    if not looks_at_pool(arm):
        return []
    rules = {rule for seed in arm.seeds for stage in seed.stages for rule in _rules(stage)}
    found = _read(seed.start, rules - set(_SCORELESS))
    if all(_probes(stage) for seed in arm.seeds for stage in seed.stages):
        # all that it reads of the pool it sampled and scored itself
        return [item for item in found if _is_of_validation(item) or item.command == _EMBED]
    return [item for item in found if item.command != _EMBED]


def _probes(stage: Stage) -> bool:
    """Whether a stage measured a part of the pool and predicted the rest."""
    return any(item.command == "cropi-score" and bool(item.options.get("predict")) for item in stage.manifests)


def read_of_stages(seed: Seed) -> list[list[Manifest]]:
    """Of each stage the manifests of its own, but the policy's, that it reads. What serves several is the first one's that reads it."""
    counted: set[str] = set()
    found = []
    for stage in seed.stages:
        own = [item for item in _read(stage.manifests, _rules(stage)) if item.path not in counted]
        counted.update(item.path for item in own)
        found.append(own)
    return found


def _rules(stage: Stage) -> set[str | None]:
    """What the stage was selected by, whatever its selection is called; None where that is not told."""
    found = {
        item.options.get("by")
        for item in stage.manifests
        if item.path.endswith(SELECTION_MANIFEST) or item.command == "cropi-select"
    }
    return {None if rule is None else str(rule) for rule in found} or {None}


def _read(manifests: Iterable[Manifest], rules: set[str | None]) -> list[Manifest]:
    """Those that any of the rules reads; for a rule that is not told, all. What another command than ours made counts as read;
    the list of suspects is for people."""
    found = [item for item in manifests if not _name(item).startswith(SUSPECTS)]
    if rules <= {*_SCORELESS, *_BY_PASS_RATE}:
        found = [item for item in found if item.command not in ("cropi-grad", "cropi-project", "cropi-score")]
        found = [item for item in found if not (_is_rollout(item) and _is_of_validation(item))]
    if rules <= set(_SCORELESS):
        found = [item for item in found if not _is_rollout(item)]
    return found


def _is_rollout(manifest: Manifest) -> bool:
    return manifest.command == "cropi-rollout"


def _is_of_validation(manifest: Manifest) -> bool:
    return manifest.of_validation or _name(manifest).startswith(_VALIDATION)


def _name(manifest: Manifest) -> str:
    return manifest.path.rsplit("/", 1)[-1]


def _selecting(manifests: Iterable[Manifest]) -> tuple[Cost, Cost]:
    """(sampling, scoring): rollouts apart from gradients, means, sketches, scores and the selection itself."""
    sampling, scoring = Cost(), Cost()
    for manifest in manifests:
        if _is_rollout(manifest):
            sampling += manifest_cost(manifest)
        else:
            scoring += manifest_cost(manifest)
    return sampling, scoring


def _training(stage: Stage) -> Cost:
    """Sampling and updates by the logs of the steps; tokens by the policy's ledger, of an unfinished stage by the logs."""
    said = manifest_cost(stage.policy) if stage.policy else Cost()
    timed = _timed(stage, "seconds_sampling", "seconds_update")
    if timed is None or (stage.policy and not is_split(stage.policy)):
        timed = said.seconds
    generated = _sum(_amount(record, "tokens_generated") for record in stage.metrics)
    trained = _sum(_amount(record, "tokens_trained") for record in stage.metrics)

    def first(value: float | None, otherwise: float | None) -> float | None:
        return otherwise if value is None else value

    def devices(seconds: float | None) -> float | None:
        return None if seconds is None else seconds * processes(stage)

    return Cost(
        devices(timed),
        first(said.generated, generated),
        first(said.trained, trained),
        said.scored,
        devices(said.start),
    )


def processes(stage: Stage) -> int:
    """How many trained together; of an unfinished stage it is not known, and 1."""
    return stage.policy.processes if stage.policy else 1


def _timed(stage: Stage, *keys: str) -> float | None:
    return _sum(_amount(record, key) for record in stage.timings for key in keys)


def seed_ledger(arm: Arm, seed: Seed) -> Ledger:
    """Everything one seed took, all its stages, with what it read of the shared first stage."""
    read = read_of_start(arm, seed)
    sampling, scoring = _selecting(read)
    training = Cost()
    evaluations: list[float | None] = []
    for stage, own in zip(seed.stages, read_of_stages(seed), strict=True):
        stage_sampling, stage_scoring = _selecting(own)
        sampling, scoring, training = sampling + stage_sampling, scoring + stage_scoring, training + _training(stage)
        evaluation = _timed(stage, "seconds_evaluation")
        evaluations.append(None if evaluation is None else evaluation * processes(stage))
        read += [*own, *([stage.policy] if stage.policy else [])]
    unsplit = sum(_amount(item.ledger, "seconds") is not None and not is_split(item) for item in read)
    return Ledger(sampling, scoring, training, _sum(evaluations), unsplit)


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
        max(ledger.unsplit for ledger in ledgers),
    )


def cumulative(arm: Arm, seed: Seed, unit: str) -> dict[int, tuple[float, float]] | None:
    """Cost up to each global step, in device seconds or in tokens; None where the files do not say.

    Each step has two costs: on arriving there, and when the next stage can begin, if one begins there: its selection is made, and for
    ALL_SECONDS training has started. Otherwise seconds are those of work. Evaluation, which every arm pays for being measured, is left out.
    """
    spent = sum((manifest_cost(item) for item in read_of_start(arm, seed)), Cost()).of(unit) or 0.0
    timed = unit != "tokens"
    keys = ("seconds_sampling", "seconds_update") if timed else ("tokens_generated", "tokens_trained")
    at = {0: (0.0, spent)}
    for stage, own in zip(seed.stages, read_of_stages(seed), strict=True):
        arrived = at[stage.offset][0]
        spent += sum((manifest_cost(item) for item in own), Cost()).of(unit) or 0.0
        if unit == ALL_SECONDS:
            spent += _training(stage).start or 0.0
        at[stage.offset] = (arrived, spent)
        records = stage.timings if timed else stage.metrics
        steps: dict[int, float] = {}
        for record in records:  # an evaluation is timed in a record of its own, under the same step
            here = int(record["step"])
            amount = sum(_amount(record, key) or 0.0 for key in keys)
            steps[here] = steps.get(here, 0.0) + amount * (processes(stage) if timed else 1)
        for step in range(1, stage.steps + 1):
            if step not in steps:
                return None
            spent += steps[step]
            at[stage.offset + step] = (spent, spent)
    return at
