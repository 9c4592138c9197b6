"""Reads a run folder: `NAME/start/` (shared first-stage files) and `NAME/ARM/SEED/K/` (stage K of an arm and a seed).

Steps are made global here: step s of stage K is s plus the steps of the stages before. Unfinished work
(`policy.part/`, a stage without a policy) is read as far as it goes and marked unfinished; a torn last line of a file
being written is passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools.data import fields
from cropi_tools.data.jsonl import Record, decoded, read_jsonl
from cropi_tools.data.manifest import FOLDER_MANIFEST, file_digest
from cropi_tools.report.pool import Pool, Selection, read_pool, selection_of
from cropi_tools.report.records import checked, records
from cropi_tools.runtime.errors import InputError

START = "start"
SELECTION_MANIFEST = "selected.jsonl.manifest.json"


@dataclass(frozen=True)
class Manifest:
    """One manifest of the run. `path` is relative to the run folder; missing fields are empty."""

    path: str
    command: str
    argv: tuple[str, ...]
    options: Mapping[str, Any]
    inputs: Mapping[str, str]  # name -> path
    input_digests: Mapping[str, str]  # name -> sha256
    digests: tuple[str, ...]  # sha256 of the outputs
    ledger: Mapping[str, Any]
    versions: Mapping[str, str]
    processes: int  # that made it together, each on its own device
    of_validation: bool = False  # whether it is known to be of validation prompts, not of the pool


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (0..1) on one set at one global step, over `prompts` x `samples` responses."""

    step: int
    set: str
    accuracy: float
    prompts: int | None
    samples: int | None
    interval: tuple[float, float] | None = None  # 95 %, over its prompts


@dataclass(frozen=True)
class Stage:
    """Stage `number` (from 1). Metrics and timings keep their local steps; `offset` is the global step before the
    first.
    """

    number: int
    offset: int
    steps: int
    finished: bool
    metrics: tuple[Record, ...]
    timings: tuple[Record, ...]
    selection: Selection | None
    manifests: tuple[Manifest, ...]  # of selecting: every manifest of the stage but the policy's
    policy: Manifest | None

    @property
    def end(self) -> int:
        return self.offset + self.steps


@dataclass(frozen=True)
class Seed:
    """One seed of an arm: its stages in order, its evaluations by (global step, set), and the manifests of the first stage it shares."""

    name: str
    stages: tuple[Stage, ...]
    evaluations: Mapping[tuple[int, str], Evaluation]
    start: tuple[Manifest, ...] = ()

    @property
    def finished(self) -> bool:
        return all(stage.finished for stage in self.stages)

    @property
    def sets(self) -> frozenset[str]:
        return frozenset(name for _, name in self.evaluations)


@dataclass(frozen=True)
class Arm:
    """One way of choosing prompts, over its seeds."""

    name: str
    seeds: tuple[Seed, ...]


@dataclass(frozen=True)
class Run:
    """A run folder: the manifests of the shared first stage, the arms, and the pool, where it was scored."""

    name: str
    folder: Path
    start: tuple[Manifest, ...]
    arms: tuple[Arm, ...]
    pool: Pool | None = None

    @property
    def pool_files(self) -> dict[str, str]:
        """SHA-256 of the prompts files that the run selects from, by path as the command was given it."""
        found = (
            manifest
            for arm in self.arms
            for seed in arm.seeds
            for stage in seed.stages
            for manifest in stage.manifests
            if manifest.path.endswith(SELECTION_MANIFEST)
        )
        first = next(found, None)
        if first is None:
            return {}
        return {path: first.input_digests[name] for name, path in first.inputs.items() if name.startswith("prompts")}


def read_run(folder: Path) -> Run:
    """Read a run. InputError: no such folder, no arm in it, a stage missing, or a broken file (named with its line)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; give a run folder (it holds ARM/SEED/STAGE), or policies of cropi-train"
        )
    arms = []
    known: dict[str, Selection] = {}
    pool = read_pool(folder / START)
    rates = pool.rates if pool else {}
    start = tuple(_manifests(folder / START, folder))
    for arm in _folders(folder):
        if arm.name == START:
            continue
        seeds = [
            replace(_read_seed(seed, folder, known, rates), start=start)
            for seed in _folders(arm)
            if _stage_folders(seed)
        ]
        if seeds:
            arms.append(Arm(arm.name, tuple(seeds)))
    if not arms:
        raise InputError(f"{folder}: no arm in it; expected ARM/SEED/1 with a training stage, such as cropi/1/1")
    name = folder.name or folder.resolve().name
    return Run(name, folder, start, tuple(arms), pool)


def joined(runs: Sequence[Run]) -> Run:
    """The runs as one: arms of one name are one arm, and its seeds are named RUN/SEED, each with the first stage of its own run.

    What the pools hold is left out, since each run may have one of its own.
    """
    arms: dict[str, list[Seed]] = {}
    for run in runs:
        for arm in run.arms:
            seeds = arms.setdefault(arm.name, [])
            seeds += [replace(seed, name=f"{run.name}/{seed.name}") for seed in arm.seeds]
    folder = Path(os.path.commonpath([run.folder.absolute() for run in runs]))
    start = tuple(replace(made, path=f"{run.name}/{made.path}") for run in runs for made in run.start)
    return Run(folder.name, folder, start, tuple(Arm(name, tuple(seeds)) for name, seeds in arms.items()))


class Place(NamedTuple):
    """Where a stage is to be found. policy: the folder of the finished one; while it is trained its `.part` lies beside it. selecting: the
    manifests of what its prompts were selected from.
    """

    policy: Path
    selection: Selection | None
    selecting: Sequence[Manifest]

    @property
    def training(self) -> Path:
        """The folder with the logs."""
        return self.policy if self.policy.is_dir() else self.policy.with_name(self.policy.name + ".part")


def _read_seed(folder: Path, root: Path, known: dict[str, Selection], rates: Mapping[str, Any]) -> Seed:
    places = []
    for number, stage_folder in enumerate(_stage_folders(folder), 1):
        if int(stage_folder.name) != number:
            raise InputError(
                f"{folder}: stage {number} is missing before stage {stage_folder.name}; put its folder back"
            )
        selecting = [item for item in _manifests(stage_folder, root) if not _below_policy(item, stage_folder, root)]
        selection = _selection(stage_folder / "selected.jsonl", known, rates)
        places.append(Place(stage_folder / "policy", selection, selecting))
    return read_stages(folder.name, places, root)


def read_stages(name: str, places: Iterable[Place], root: Path) -> Seed:
    """Stages that follow each other as one seed of this name. root: what the paths of manifests are relative to."""
    stages: list[Stage] = []
    evaluations: dict[tuple[int, str], Evaluation] = {}
    for number, place in enumerate(places, 1):
        offset = stages[-1].end if stages else 0
        training = place.training
        finished = (place.policy / FOLDER_MANIFEST).exists()
        metrics = tuple(records(training / "metrics.jsonl", finished, fields.STEP, ("step",)))
        needed = ("set", "step", "accuracy")
        found = [
            _evaluation(record, offset)
            for record in records(training / "evaluations.jsonl", finished, fields.EVALUATION, needed)
        ]
        for evaluation in found:
            # At a stage's step 0 the weights are those the stage before ended with: the earlier measurement stands.
            if evaluation.step > offset or (evaluation.step, evaluation.set) not in evaluations:
                evaluations[evaluation.step, evaluation.set] = evaluation
        last = max([record["step"] for record in metrics] + [item.step - offset for item in found], default=0)
        stages.append(
            Stage(
                number=number,
                offset=offset,
                steps=last,
                finished=finished,
                metrics=metrics,
                timings=tuple(records(training / "timings.jsonl", finished, fields.STEP, ("step",))),
                selection=place.selection,
                manifests=tuple(place.selecting),
                policy=manifest_of(place.policy / FOLDER_MANIFEST, root) if finished else None,
            )
        )
    return Seed(name, tuple(stages), evaluations)


def _natural(path: Path) -> tuple[int, int, str]:
    """Sort key: numbers as numbers, before words."""
    return (0, int(path.name), "") if path.name.isdecimal() else (1, 0, path.name)


def _folders(folder: Path) -> list[Path]:
    return sorted((item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")), key=_natural)


def _stage_folders(folder: Path) -> list[Path]:
    return [item for item in _folders(folder) if item.name.isdecimal() and item.name != "0"]


def _evaluation(record: Record, offset: int) -> Evaluation:
    limits = record.get("accuracy_interval")
    interval = None if limits is None else (float(limits[0]), float(limits[1]))
    step, counts = record["step"] + offset, (record.get("prompts"), record.get("samples"))
    return Evaluation(step, record["set"], record["accuracy"], *counts, interval)


def _selection(path: Path, known: dict[str, Selection], pool: Mapping[str, Any]) -> Selection | None:
    """Equal files (the full pool, in every stage and seed) are read once: `known` holds them by hash. `pool`: pass rates of the
    run's first scores by id, for arms that selected without scores.
    """
    if not path.exists():
        return None
    digest = file_digest(path)
    if digest in known:
        return known[digest]
    known[digest] = selection_of(checked(path, read_jsonl(path), fields.SELECTED), pool)
    return known[digest]


def _manifests(folder: Path, root: Path) -> Iterator[Manifest]:
    """Every manifest below the folder, but those of unfinished or replaced outputs."""
    for path in sorted(folder.rglob("*" + FOLDER_MANIFEST)):
        inside = path.relative_to(folder)
        named = path.name == FOLDER_MANIFEST or path.name.endswith("." + FOLDER_MANIFEST)
        if named and not any(part.endswith((".part", ".old")) for part in inside.parts):
            yield manifest_of(path, root)


def _below_policy(manifest: Manifest, stage: Path, root: Path) -> bool:
    return (root / manifest.path).relative_to(stage).parts[0] == "policy"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def manifest_of(path: Path, root: Path) -> Manifest:
    """A manifest by the path of its file. InputError: it is damaged. root: what its path is given relative to."""
    try:
        content = decoded(path.read_bytes().decode())
    except ValueError:
        raise InputError(f"{path}: broken manifest; remove it if you trust the data beside it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: broken manifest (not a JSON object); remove it if you trust the data beside it")
    read = _mapping(content.get("inputs"))
    inputs, digests = (
        {name: str(_mapping(item).get(key) or "") for name, item in read.items()} for key in ("path", "sha256")
    )
    outputs = _mapping(content.get("outputs")).values()
    argv = content.get("argv")
    processes = _mapping(content.get("facts")).get("processes")
    return Manifest(
        path=Path(os.path.relpath(path, root)).as_posix(),
        command=str(content.get("command", "")),
        argv=tuple(str(word) for word in argv) if isinstance(argv, list) else (),
        options=_mapping(content.get("options")),
        inputs=inputs,
        input_digests=digests,
        digests=tuple(str(item["sha256"]) for item in outputs if isinstance(item, dict) and item.get("sha256")),
        ledger=_mapping(content.get("ledger")),
        versions={name: str(value) for name, value in _mapping(content.get("versions")).items()},
        processes=processes if isinstance(processes, int) and processes > 0 else 1,
    )
