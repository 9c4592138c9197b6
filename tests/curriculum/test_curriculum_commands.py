"""The curriculum with the real commands: weights pass on, breaks leave no trace, shards change nothing but rounding."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from curriculum_runs import BookkeptCurriculum, Curriculum
from real_curriculum import manifest, policy_bytes, real_curriculum, scores

from cropi_tools.report.run import compare_runs

Grown = tuple[Curriculum, dict[str, int]]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path) -> Grown:
    """One stage, then a second; and the times of the first stage's files before the second was asked for."""
    curriculum = real_curriculum(tmp_path_factory.mktemp("grown"), policy_folder)
    curriculum.make()
    assert curriculum.nothing_left()
    before = {str(path): path.stat().st_mtime_ns for path in curriculum.run.rglob("*") if path.is_file()}
    assert not curriculum.nothing_left("STAGES=2")
    curriculum.make("STAGES=2")
    return curriculum, before


def test_a_second_stage_leaves_the_first_as_it_was(grown: Grown) -> None:
    curriculum, before = grown
    assert {path: Path(path).stat().st_mtime_ns for path in before} == before
    assert curriculum.nothing_left("STAGES=2")
    made = {str(path.parent.relative_to(curriculum.run)) for path in curriculum.run.rglob("policy")}
    assert made == {"cropi/1/1", "cropi/1/2"}


def test_weights_pass_from_stage_to_stage(grown: Grown, policy_folder: Path) -> None:
    from cropi_tools.data.policies import policy_input

    run = grown[0].run
    start, first, second = (
        policy_input(folder).sha256 for folder in (policy_folder, run / "cropi/1/1/policy", run / "cropi/1/2/policy")
    )
    assert len({start, first, second}) == 3
    used = {
        "start/train.rollouts.jsonl": start,
        "start/grads.zarr": start,
        "cropi/1/1/policy": start,
        "cropi/1/2/valid-target.mean.safetensors": first,
        "cropi/1/2/grads.zarr": first,
        "cropi/1/2/policy": first,
    }
    for output, policy in used.items():
        assert manifest(run / output)["inputs"]["policy"]["sha256"] == policy, output


def test_no_stage_keeps_an_optimizer_state_that_nothing_reads(grown: Grown) -> None:
    """Nor does one that is looked at again miss it; the stages are a chain that can be reported on by itself."""
    run = grown[0].run
    assert not list(run.rglob("state"))
    assert {manifest(path)["options"]["state"] for path in run.rglob("policy")} == {"drop"}
    (arm,) = compare_runs([run / "cropi/1/2/policy", run / "cropi/1/1/policy"]).arms
    assert [stage.steps for stage in arm.arm.seeds[0].stages] == [2, 2]


def test_a_stage_trains_on_the_best_by_its_own_scores(grown: Grown) -> None:
    run = grown[0].run
    for cell, scored in (("cropi/1/1", "start"), ("cropi/1/2", "cropi/1/2")):
        found = scores(run / scored / "scores.jsonl")
        known = {identity: score for identity, score in found.items() if score is not None}
        selected = [json.loads(line)["id"] for line in (run / cell / "selected.jsonl").read_text().splitlines()]
        assert len(selected) == 6
        assert set(selected) == set(sorted(known, key=known.__getitem__, reverse=True)[:6])
        made = manifest(run / cell / "selected.jsonl")["outputs"]["selected.jsonl"]["sha256"]
        assert manifest(run / cell / "policy")["inputs"]["prompts"]["sha256"] == made


def test_a_changed_value_is_refused_with_what_differs(grown: Grown) -> None:
    curriculum, _ = grown
    weights = policy_bytes(curriculum.run)
    refusal = curriculum.make("STAGES=2", "STEPS=3", code=2)
    assert "steps 2, now 3" in refusal.stderr
    assert "--force" in refusal.stderr
    assert policy_bytes(curriculum.run) == weights
    # and the value it was made with is still accepted
    curriculum.make("STAGES=2")
    assert curriculum.nothing_left("STAGES=2")
    assert policy_bytes(curriculum.run) == weights


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_force_replaces_what_a_changed_value_touches(tmp_path: Path, policy_folder: Path) -> None:
    curriculum = real_curriculum(tmp_path, policy_folder)
    curriculum.make()
    rollouts = manifest(curriculum.run / "start/train.rollouts.jsonl")["finished"]
    curriculum.make("STEPS=3", "FORCE=--force")
    assert manifest(curriculum.run / "cropi/1/1/policy")["options"]["steps"] == 3
    assert manifest(curriculum.run / "start/train.rollouts.jsonl")["finished"] == rollouts
    assert curriculum.nothing_left("STEPS=3")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_in_the_middle_leave_no_trace(tmp_path: Path, policy_folder: Path, grown: Grown) -> None:
    curriculum = real_curriculum(tmp_path, policy_folder, STAGES=2)
    kills = 0
    # a kill as soon as each kind of step is under way, the trainer after its first checkpoint
    for begun in (
        "start/train.rollouts.jsonl.part",
        "start/grads.zarr.part",
        "cropi/1/1/policy.part/checkpoint-000001",
        "cropi/1/2/grads.zarr.part",
        "cropi/1/2/policy.part/checkpoint-000001",
    ):
        process = curriculum.start()
        while process.poll() is None and not (curriculum.run / begun).exists():
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    curriculum.make()
    assert curriculum.nothing_left()
    assert policy_bytes(curriculum.run) == policy_bytes(grown[0].run)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dozen_interrupts_leave_no_trace(tmp_path: Path, policy_folder: Path, grown: Grown) -> None:
    """Ctrl-C and TERM go to make and its commands alike, at any moment: also between a manifest and the end of its recipe."""
    curriculum = real_curriculum(tmp_path, policy_folder, STAGES=2)
    draw = random.Random(1)
    interrupted = 0
    for _ in range(12):
        process = curriculum.start()
        try:
            process.wait(draw.uniform(0.1, 6.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, draw.choice([signal.SIGINT, signal.SIGTERM]))
            process.wait(60)
            interrupted += 1
        assert "was not written by this command" not in curriculum.said()
    assert interrupted >= 4
    curriculum.make()
    assert curriculum.nothing_left()
    assert policy_bytes(curriculum.run) == policy_bytes(grown[0].run)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for cell in ("cropi/1/1", "cropi/1/2"):
            path = f"{cell}/policy/{name}"
            assert (curriculum.run / path).read_bytes() == (grown[0].run / path).read_bytes()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_an_interrupt_after_a_manifest_keeps_it(tmp_path: Path, stop: signal.Signals) -> None:
    """make deletes the target of a recipe that an interrupt cut short, unless it is told not to."""
    curriculum = BookkeptCurriculum(tmp_path)
    for target in (
        "start/valid-target.rollouts.jsonl",
        "start/scores.jsonl",
        "cropi/1/1/selected.jsonl",
        "cropi/1/1/policy",
    ):
        output = curriculum.run / target
        made = (
            output / "manifest.json" if target.endswith("policy") else output.with_name(output.name + ".manifest.json")
        )
        # a `touch` that never ends stands where the recipe's last line calls it
        touch = curriculum.environment / "bin" / "touch"
        touch.write_text(f'#!/bin/sh\nif [ "$1" = "{made}" ]; then exec sleep 60; fi\nexec /usr/bin/touch "$@"\n')
        touch.chmod(0o755)
        process = curriculum.start()
        deadline = time.monotonic() + 60
        while not made.exists():
            assert time.monotonic() < deadline, curriculum.said()
            time.sleep(0.01)
        time.sleep(0.3)
        os.killpg(process.pid, stop)
        process.wait(30)
        touch.unlink()
        assert made.exists(), target
    curriculum.make()
    assert curriculum.nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_arms_by_pass_rate_need_rollouts_alone(tmp_path: Path, policy_folder: Path) -> None:
    curriculum = real_curriculum(tmp_path, policy_folder, ARMS="random hardest", VALID="", GPUS=2)
    curriculum.make()
    assert curriculum.nothing_left()
    start = curriculum.run / "start"
    assert sorted({path.name.split(".")[0] for path in start.iterdir()}) == ["train"]
    rates = {
        record["id"]: sum(sample["reward"] >= 1 for sample in record["samples"]) / len(record["samples"])
        for path in start.glob("train.rollouts.*-of-2.jsonl")
        for record in map(json.loads, path.read_text().splitlines())
    }
    chosen = (curriculum.run / "hardest/1/1/selected.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["pass_rate"] for line in chosen) == sorted(rates.values())[: len(chosen)]
    random_arm, hardest = compare_runs([curriculum.run]).arms
    assert random_arm.ledger.sampling.generated is None
    assert hardest.ledger.sampling.generated
    assert not hardest.ledger.scoring.scored
    command = [Path(sys.executable).with_name("cropi-report"), curriculum.run, "-o", tmp_path / "page.html", "--quiet"]
    page = subprocess.run(command, capture_output=True, text=True)
    assert page.returncode == 0, page.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_shards_score_as_one(tmp_path: Path, policy_folder: Path, grown: Grown) -> None:
    curriculum = real_curriculum(tmp_path, policy_folder, GPUS=2)
    curriculum.make()
    assert curriculum.nothing_left()
    start, whole = curriculum.run / "start", grown[0].run / "start"
    rows = [path.read_text().splitlines() for path in sorted(start.glob("train.rollouts.*-of-2.jsonl"))]
    assert list(map(len, rows)) == [12, 12]
    together, alone = scores(start / "scores.jsonl"), scores(whole / "scores.jsonl")
    assert together.keys() == alone.keys()
    for identity, score in alone.items():
        assert together[identity] == (None if score is None else pytest.approx(score, abs=1e-5))
    assert any(score is not None for score in alone.values())
