"""What an arm is charged: work on both sides, start and evaluating apart, and nothing its selection did not read."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import synthetic_run as synthetic

from cropi_tools.report.comparison import compare, unit_curve
from cropi_tools.report.costs import Cost
from cropi_tools.report.reading import read_run
from cropi_tools.report.structures import ArmFigures
from cropi_tools.report.tables import as_json, print_tables

START = 8.0  # seconds of each command


def told_apart(folder: Path) -> Path:
    """The run as the commands of today write it: of every ledger's seconds, 8 more are start."""
    for path in folder.rglob("*manifest.json"):
        manifest = json.loads(path.read_text())
        work = manifest["ledger"]["seconds"]
        manifest["ledger"] |= {"seconds": work + START, "seconds_start": START, "seconds_work": work}
        path.write_text(json.dumps(manifest))
    return folder


def arm_of(folder: Path, label: str) -> ArmFigures:
    return next(arm for arm in compare([read_run(folder)]).arms if arm.label == label)


def test_both_sides_are_work_and_start_is_apart(run_folder: Path) -> None:
    cropi = arm_of(told_apart(synthetic.write_run(run_folder)), "cropi")
    assert cropi.ledger.sampling == Cost(30, 9000, start=START)
    # two stores, scores, a store of stage 2 and two selections
    assert cropi.ledger.scoring == Cost(52 + 10 + 2, scored=12000, start=6 * START)
    # 40 steps of 3 s; the manifests' 75 s hold evaluations too
    assert cropi.ledger.training == Cost(120, 40000, 20000, start=2 * START)
    assert cropi.ledger.evaluation == 2 * 3 * 4
    assert cropi.ledger.total.seconds == 30 + 64 + 120
    assert cropi.ledger.total.start == 9 * START
    assert cropi.ledger.unsplit == 0
    curve = unit_curve(cropi, cropi.counted, ("gcd", "reverse"), "seconds")
    assert curve is not None
    assert [point.cost for point in curve] == [0, 83, 113, 143, 154, 184, 214]


def test_start_has_a_column_and_json_has_both(run_folder: Path) -> None:
    comparison = compare([read_run(told_apart(synthetic.write_run(run_folder)))])
    stream = io.StringIO()
    print_tables(comparison, stream)
    headings = next(line for line in stream.getvalue().splitlines() if line.startswith("arm ") and "pool" in line)
    assert headings.split()[:7] == ["arm", "pool", "selecting", "training", "evaluating", "total", "start"]
    assert "not recorded apart" not in stream.getvalue()
    cost = as_json(comparison)["arms"]["cropi"]["cost"]["mean_of_one_seed"]
    assert (cost["total"]["seconds"], cost["total"]["start"]) == (214, 72)
    assert (cost["scoring"]["start"], cost["unsplit"]) == (48, 0)


def test_points_tell_seconds_with_and_without_starting(run_folder: Path) -> None:
    points = as_json(compare([read_run(told_apart(synthetic.write_run(run_folder)))]))["arms"]["cropi"]["points"]["1"]
    assert points["seconds"]["ready"] == [83, 113, 154, 184, 214]
    # five commands and the training of the first stage have started before its first step, two and a training before that of the second
    started = [6, 6, 9, 9, 9]
    assert points["all_seconds"]["ready"] == [
        work + START * count for work, count in zip(points["seconds"]["ready"], started, strict=True)
    ]
    assert points["all_seconds"]["arrived"] == [0, 113 + 6 * START, 143 + 6 * START, 184 + 9 * START, 214 + 9 * START]


def test_ledgers_of_an_earlier_version_are_said(run_folder: Path) -> None:
    synthetic.write_run(run_folder)
    comparison = compare([read_run(run_folder)])
    stream = io.StringIO()
    print_tables(comparison, stream)
    assert "Start is not recorded apart in ledgers of an earlier version" in " ".join(stream.getvalue().split())
    figures = as_json(comparison)
    assert figures["arms"]["cropi"]["cost"]["by_seed"]["1"]["unsplit"] == 4 + 1 + 2 + 2
    assert any("not recorded apart" in text for text in figures["limits"])
    assert arm_of(run_folder, "cropi").ledger.total == Cost(244, 49000, 20000, 12000)


@pytest.mark.parametrize(
    ("rule", "sampling", "scoring"),
    [
        ("influence", 30.0 + 5.0, 52.0 + 2.0),
        ("shuffled", 30.0 + 5.0, 52.0 + 2.0),
        ("learnability", 30.0, 2.0),
        ("pass-rate", 30.0, 2.0),
        ("random", None, 2.0),
        ("full", None, 2.0),
    ],
)
def test_an_arm_is_charged_what_its_selection_reads(
    run_folder: Path, rule: str, sampling: float | None, scoring: float
) -> None:
    """All are handed the scores; pass rates are those of the pool's rollouts, and no rule but influence looks at gradients."""
    synthetic.write_run(run_folder, arms=["static"], seeds=["1"])
    synthetic.write_manifest(
        run_folder / "start/valid-target.rollouts.jsonl.manifest.json",
        "cropi-rollout",
        {"seconds": 5.0, "tokens_generated": 100},
    )
    for path in (run_folder / "static").rglob("selected.jsonl.manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["options"]["by"] = rule
        path.write_text(json.dumps(manifest))
    ledger = arm_of(told_apart(run_folder), "static").ledger
    assert (ledger.sampling.seconds, ledger.scoring.seconds) == (sampling, scoring)
    tokens = {"influence": 7000, "shuffled": 7000}.get(rule)
    assert ledger.scoring.scored == tokens


def test_an_arm_that_reads_rollouts_and_no_scores_is_charged_their_sampling(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["static"], seeds=["1"])
    for path in (run_folder / "static").rglob("selected.jsonl.manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["options"]["by"] = "hardest"
        manifest["inputs"]["rollouts"] = manifest["inputs"].pop("scores") | {
            "path": "../../../start/train.rollouts.jsonl"
        }
        path.write_text(json.dumps(manifest))
    ledger = arm_of(told_apart(run_folder), "static").ledger
    assert (ledger.sampling.seconds, ledger.scoring.seconds) == (30, 2)


def test_stages_that_probe_are_charged_what_they_measure_and_no_whole_pool(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["cropi", "static"], seeds=["1"])
    start = run_folder / "start"
    synthetic.write_manifest(start / "valid-t.rollouts.jsonl.manifest.json", "cropi-rollout", {"seconds": 5.0})
    synthetic.write_manifest(start / "valid-t.mean.safetensors.manifest.json", "cropi-grad", {"seconds": 3.0})
    synthetic.write_manifest(start / "features.safetensors.manifest.json", "cropi-embed", {"seconds": 4.0})
    for stage in ("1", "2"):
        cell = run_folder / "cropi" / "1" / stage
        shutil.rmtree(cell / "grads.zarr", ignore_errors=True)
        synthetic.write_manifest(cell / "probe.rollouts.jsonl.manifest.json", "cropi-rollout", {"seconds": 7.0})
        synthetic.write_manifest(cell / "probe.grads.zarr" / "manifest.json", "cropi-grad", {"seconds": 11.0})
        synthetic.write_manifest(
            cell / "scores.jsonl.manifest.json", "cropi-score", {"seconds": 0.5}, options={"predict": True}
        )
    probing = arm_of(run_folder, "cropi").ledger
    assert probing.sampling.seconds == 5.0 + 2 * 7.0
    assert probing.scoring.seconds == 3.0 + 4.0 + 2 * (11.0 + 0.5 + 1.0)
    # who scores the whole pool reads no features
    static = arm_of(run_folder, "static").ledger
    synthetic.write_manifest(start / "features.safetensors.manifest.json", "cropi-embed", {"seconds": 400.0})
    assert arm_of(run_folder, "static").ledger == static


def test_processes_that_train_together_are_devices_each(run_folder: Path) -> None:
    told_apart(synthetic.write_run(run_folder, arms=["random"], seeds=["1"]))
    for path in (run_folder / "random").rglob("policy/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "facts": {"processes": 4}}))
    random = arm_of(run_folder, "random")
    assert random.ledger.training == Cost(4 * 120, 40000, 20000, start=4 * 2 * START)
    assert random.ledger.evaluation == 4 * 24
    curve = unit_curve(random, random.counted, ("gcd", "reverse"), "seconds")
    assert curve is not None
    assert curve[-1].cost == 2 + 4 * 120
