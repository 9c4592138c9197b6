"""examples/slurm with the real commands: a submitted curriculum, once stopped near a limit, ends where make does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from curriculum_runs import ROOT
from local_slurm import Cluster
from real_curriculum import policy_bytes, real_curriculum, scores


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_submitted_curriculum_ends_where_make_does(tmp_path: Path, policy_folder: Path) -> None:
    folders = [tmp_path / "make", tmp_path / "slurm"]
    for folder in folders:
        folder.mkdir()
    by_make, by_slurm = (real_curriculum(folder, policy_folder, STAGES=2, STEPS=3) for folder in folders)
    by_make.make("GPUS=2")
    cluster = Cluster(tmp_path / "queue")
    subprocess.run(
        [ROOT / "examples" / "slurm" / "submit.sh", by_slurm.config, "2", f"VENV={by_slurm.environment}"],
        env={**by_slurm.variables, "PATH": f"{cluster.bin}{os.pathsep}{by_slurm.variables['PATH']}"},
        check=True,
        capture_output=True,
    )
    trainers = [str(number) for number, job in cluster.jobs().items() if job["words"][1] == "cropi-train"]
    begun = by_slurm.run / "cropi/1/2/policy.part/checkpoint-000001"
    signalled: list[str] = []

    def near_the_limit(name: str) -> bool:
        """The second trainer, once, after its first checkpoint."""
        if name == trainers[-1] and not signalled and begun.exists():
            signalled.append(name)
            return True
        return False

    cluster.work(near_the_limit)
    logs = "".join(path.read_text() for path in (by_slurm.run / "slurm").glob("*.out"))
    assert cluster.states() == {"COMPLETED"}, logs
    assert cluster.codes[trainers[-1]] == [143, 0]
    assert by_slurm.nothing_left("GPUS=2")
    assert policy_bytes(by_slurm.run) == policy_bytes(by_make.run)
    for cell in ("start", "cropi/1/2"):
        assert scores(by_slurm.run / cell / "scores.jsonl") == scores(by_make.run / cell / "scores.jsonl")
    names = [{str(path.relative_to(run)) for path in run.rglob("*.jsonl")} for run in (by_make.run, by_slurm.run)]
    assert names[0] == names[1]
