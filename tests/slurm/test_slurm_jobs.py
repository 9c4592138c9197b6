"""examples/slurm on a SLURM of one machine, with commands that only keep books."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from curriculum_runs import ROOT, BookkeptCurriculum, results
from local_slurm import Cluster

SLURM = ROOT / "examples" / "slurm"


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "queue")


def with_slurm(curriculum: BookkeptCurriculum, cluster: Cluster) -> dict[str, str]:
    """The environment of a shell with the bookkeeping commands and sbatch on its PATH."""
    places = [curriculum.environment / "bin", cluster.bin, curriculum.variables["PATH"]]
    return {**curriculum.variables, "PATH": os.pathsep.join(map(str, places))}


def submit(
    curriculum: BookkeptCurriculum, cluster: Cluster, *words: object, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SLURM / "submit.sh", curriculum.config, *map(str, words), f"VENV={curriculum.environment}"],
        env=with_slurm(curriculum, cluster),
        cwd=curriculum.folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def sbatch(curriculum: BookkeptCurriculum, cluster: Cluster, *words: object) -> None:
    """Submit step.sbatch with the bookkeeping commands on the PATH."""
    command = [cluster.bin / "sbatch", *map(str, words)]
    subprocess.run(command, env=with_slurm(curriculum, cluster), cwd=curriculum.folder, check=True, capture_output=True)


def two_runs(tmp_path: Path, **values: object) -> tuple[BookkeptCurriculum, BookkeptCurriculum]:
    (tmp_path / "make").mkdir()
    (tmp_path / "slurm").mkdir()
    return BookkeptCurriculum(tmp_path / "make", **values), BookkeptCurriculum(tmp_path / "slurm", **values)


@pytest.mark.parametrize("asked", ["", "--gpus=8"])
def test_training_may_ask_for_more_than_the_other_steps(asked: str, tmp_path: Path) -> None:
    curriculum, cluster = BookkeptCurriculum(tmp_path, ARMS="cropi"), Cluster(tmp_path / "queue")
    curriculum.variables |= {"GPU_JOB": "--gpus=1", **({"TRAIN_JOB": asked} if asked else {})}
    submit(curriculum, cluster, 1)
    jobs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("queue/*.job"))]
    by_command = {job["words"][1]: job["options"].get("gpus") for job in jobs}
    assert by_command["cropi-train"] == (asked.removeprefix("--gpus=") or "1")
    assert by_command["cropi-rollout"] == by_command["cropi-grad"] == "1"
    assert by_command["cropi-select"] is None


def test_the_scripts_are_sound_bash() -> None:
    for name in ("submit.sh", "submit-step.sh", "step.sbatch"):
        subprocess.run(["bash", "-n", SLURM / name], check=True)
        assert os.access(SLURM / name, os.X_OK)


def test_a_submitted_curriculum_ends_where_make_does(tmp_path: Path, cluster: Cluster) -> None:
    by_make, by_slurm = two_runs(tmp_path, STAGES=2, SEEDS="1 2")
    by_make.make("GPUS=2")
    shown = submit(by_slurm, cluster, 2)
    jobs = cluster.jobs()
    assert len(jobs) == 2 + 1 + 1 + 1 + 4 + 4 + 2 * 3 + 4 + 4
    assert f"submitted: {len(jobs)} jobs" in shown.stderr
    assert not any(name.endswith((".jsonl", "content")) for name in results(by_slurm.run))
    arrays = [job["words"][1] for job in jobs.values() if job["options"].get("array") == "1-2"]
    assert sorted(arrays) == ["cropi-grad"] * 3 + ["cropi-rollout"]
    for job in jobs.values():
        assert ("gpus" in job["options"]) == (job["words"][1] not in ("cropi-score", "cropi-select"))
    cluster.work()
    assert cluster.states() == {"COMPLETED"}
    assert results(by_slurm.run) == results(by_make.run)
    assert by_slurm.nothing_left("GPUS=2")
    # and a second submission finds nothing to submit
    assert "submitted: 0 jobs" in submit(by_slurm, cluster, 2).stderr
    assert len(cluster.jobs()) == len(jobs)


def test_a_job_waits_for_what_it_reads_and_for_nothing_else(tmp_path: Path, cluster: Cluster) -> None:
    curriculum = BookkeptCurriculum(tmp_path, STAGES=2)
    submit(curriculum, cluster, 2)
    output = {}
    for number, job in cluster.jobs().items():
        path = Path(job["words"][job["words"].index("-o") + 1])
        output[number] = str(path.relative_to(curriculum.run)).replace("%a-of-2.", "")
    waits = {
        output[number]: {output[int(name)] for name in job["options"].get("dependency", "").split(":")[1:]}
        for number, job in cluster.jobs().items()
    }
    assert waits["start/train.rollouts.jsonl"] == waits["start/valid-target.rollouts.jsonl"] == set()
    assert waits["start/valid-target.mean.safetensors"] == {"start/valid-target.rollouts.jsonl"}
    assert waits["start/grads.zarr"] == {"start/train.rollouts.jsonl", "start/valid-target.mean.safetensors"}
    assert waits["start/scores.jsonl"] == {"start/grads.zarr"}
    assert waits["random/1/1/selected.jsonl"] == set()
    assert waits["cropi/1/1/selected.jsonl"] == {"start/scores.jsonl"}
    assert waits["cropi/1/1/policy"] == {"cropi/1/1/selected.jsonl"}
    assert waits["cropi/1/2/valid-target.mean.safetensors"] == {"start/valid-target.rollouts.jsonl", "cropi/1/1/policy"}
    assert waits["cropi/1/2/grads.zarr"] == {
        "start/train.rollouts.jsonl", "cropi/1/2/valid-target.mean.safetensors", "cropi/1/1/policy",
    }  # fmt: skip
    assert waits["random/1/2/policy"] == {"random/1/2/selected.jsonl", "random/1/1/policy"}


def test_one_part_needs_no_array(tmp_path: Path, cluster: Cluster) -> None:
    by_make, by_slurm = two_runs(tmp_path)
    by_make.make()
    submit(by_slurm, cluster, 1)
    assert not any("array" in job["options"] for job in cluster.jobs().values())
    cluster.work()
    assert results(by_slurm.run) == results(by_make.run)
    assert by_slurm.nothing_left()


def test_looking_submits_nothing(tmp_path: Path, cluster: Cluster) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    shown = submit(curriculum, cluster, 2, "-n").stdout
    assert "cropi-train" in shown
    assert not cluster.jobs()
    assert not curriculum.run.exists()


def test_a_run_in_the_queue_is_not_submitted_twice(tmp_path: Path, cluster: Cluster) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    submit(curriculum, cluster, 2)
    refusal = submit(curriculum, cluster, 2, code=1)
    assert f"{len(cluster.jobs())} jobs of {curriculum.run} are in the queue" in refusal.stderr


def test_a_failed_job_cancels_what_waits_and_the_next_submission_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    by_make, by_slurm = two_runs(tmp_path, ARMS="cropi")
    by_make.make("GPUS=2")
    by_slurm.tell("fail", "cropi-grad .*--shard 2/2")
    submit(by_slurm, cluster, 2)
    first = len(cluster.jobs())
    cluster.work()
    assert cluster.states() == {"COMPLETED", "FAILED", "CANCELLED"}
    assert (by_slurm.run / "start/grads.1-of-2.zarr/manifest.json").exists()
    by_slurm.untell("fail")
    by_slurm.asked()
    submit(by_slurm, cluster, 2)
    # gradients, scores, selection, training; the rollouts and the mean are there
    assert len(cluster.jobs()) - first == 4
    cluster.work()
    assert [entry["outcome"] for entry in by_slurm.asked()].count("up to date") == 1
    assert results(by_slurm.run) == results(by_make.run)
    assert by_slurm.nothing_left("GPUS=2")


def test_steps_that_are_up_to_date_count_as_done(tmp_path: Path, cluster: Cluster) -> None:
    curriculum = BookkeptCurriculum(tmp_path, ARMS="cropi")
    curriculum.make("GPUS=2")
    curriculum.asked()
    (tmp_path / "pool.jsonl").touch()
    assert not curriculum.nothing_left("GPUS=2")
    submit(curriculum, cluster, 2)
    cluster.work()
    assert {entry["outcome"] for entry in curriculum.asked()} == {"up to date"}
    assert curriculum.nothing_left("GPUS=2")


def test_near_the_limit_a_task_stops_goes_back_and_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    curriculum.tell("hold", "--shard [13]/3")
    sbatch(
        curriculum, cluster, "--array=1-3", SLURM / "step.sbatch",
        "cropi-grad", tmp_path / "pool.jsonl", "--shard", "%a/3", "-o", tmp_path / "grads.%a-of-3.zarr",
    )  # fmt: skip
    signalled = set()

    def near_the_limit(name: str) -> bool:
        task = name.rpartition("_")[2]
        if name in signalled or not (tmp_path / f"grads.{task}-of-3.zarr.part").exists():
            return False
        time.sleep(0.1)
        signalled.add(name)
        if len(signalled) == 2:
            curriculum.untell("hold")
        return True

    cluster.work(near_the_limit)
    # the last task bears the number of the whole array: it alone goes back all the same
    assert cluster.codes == {"100_1": [143, 0], "100_2": [0], "100_3": [143, 0]}
    outcomes = [entry["outcome"] for entry in curriculum.asked()]
    assert outcomes.count("stopped by SIGUSR2") == outcomes.count("resumed") == 2
    assert outcomes.count("made") == 3
    # the log of the first try stays
    assert "goes back to the queue" in (tmp_path / "slurm-100.out").read_text()


def test_a_job_that_is_no_array_goes_on_too(tmp_path: Path, cluster: Cluster) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    curriculum.tell("hold", "cropi-train")
    sbatch(curriculum, cluster, SLURM / "step.sbatch", "cropi-train", tmp_path / "pool.jsonl", "-o", tmp_path / "P1")

    def near_the_limit(name: str) -> bool:
        if not ((tmp_path / "hold").exists() and (tmp_path / "P1.part").exists()):
            return False
        time.sleep(0.1)
        curriculum.untell("hold")
        return True

    cluster.work(near_the_limit)
    assert cluster.codes == {"100": [143, 0]}
    assert (tmp_path / "P1/manifest.json").exists()


def test_a_cancelled_job_stays_cancelled(tmp_path: Path, cluster: Cluster) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    curriculum.tell("hold", "cropi-train")
    environment = {**with_slurm(curriculum, cluster), "SLURM_JOB_ID": "7"}
    command = [SLURM / "step.sbatch", "cropi-train", tmp_path / "pool.jsonl", "-o", tmp_path / "P1"]
    process = subprocess.Popen(command, env=environment)
    while not (tmp_path / "P1.part").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == 143
    assert curriculum.asked()[-1]["outcome"] == "stopped by SIGTERM"
    assert not list(cluster.folder.glob("*.requeue"))


def test_forced_steps_and_all_that_is_made_of_them_are_submitted(tmp_path: Path, cluster: Cluster) -> None:
    by_make, by_slurm = two_runs(tmp_path, STAGES=2)
    for curriculum in (by_make, by_slurm):
        curriculum.make("GPUS=2")
    by_make.make("GPUS=2", "STEPS=3", "FORCE=--force")
    by_slurm.asked()
    submit(by_slurm, cluster, 2, "STEPS=3", "FORCE=--force")
    cluster.work()
    assert cluster.states() == {"COMPLETED"}
    made = by_slurm.worked()
    assert {"cropi/1/1/policy", "cropi/1/2/grads.2-of-2.zarr", "cropi/1/2/policy", "random/1/2/policy"} <= set(made)
    assert not [name for name in made if name.startswith("start/")]
    assert results(by_slurm.run) == results(by_make.run)
    assert by_slurm.nothing_left("GPUS=2", "STEPS=3")
