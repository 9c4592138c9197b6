"""A SLURM of one machine: sbatch, squeue and scontrol that keep a queue in a folder, and `Cluster`, which works it
off.

As the real one does: sbatch copies the script, takes the environment and the working directory, reads the #SBATCH
lines; options on the command line come first. A job starts when those it depends on have ended with 0; one that
can no longer start is cancelled. The tasks of an array run at once. The signal before the limit goes to the script
alone (--signal=B:). An unknown option is an error.

Run as `local_slurm.py FOLDER sbatch|squeue|scontrol ARGUMENTS...`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESOURCES = ("gpus", "cpus-per-task", "mem", "time")
OPTIONS = (*RESOURCES, "job-name", "output", "array", "dependency", "kill-on-invalid-dep", "open-mode", "signal")
FLAGS = ("parsable", "requeue")
FIRST_JOB = 100


def options_of(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in (OPTIONS if value else FLAGS):
            sys.exit(f"sbatch: error: unrecognized option '{word}'")
        found[name] = value
    return found


def sbatch(folder: Path, words: list[str]) -> None:
    count = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    script = Path(words[count]).read_text()
    written = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    options = {**options_of(written), **options_of(words[:count])}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        number = FIRST_JOB + len(list(folder.glob("*.job")))
        spooled = folder / f"{number}.script"
        shutil.copy(words[count], spooled)
        spooled.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        job = {
            "state": "PENDING",
            "options": options,
            "words": [str(spooled), *words[count + 1 :]],
            "environment": environment,
            "folder": os.getcwd(),
        }
        (folder / f"{number}.job").write_text(json.dumps(job))
    print(f"{number};local" if "parsable" in options else f"Submitted batch job {number}")


def squeue(folder: Path, words: list[str]) -> None:
    assert words == ["--me", "--noheader", "--format=%j"], words
    for path in sorted(folder.glob("*.job")):
        job = json.loads(path.read_text())
        if job["state"] in ("PENDING", "RUNNING"):
            print(job["options"]["job-name"])


def scontrol(folder: Path, words: list[str]) -> None:
    assert words[0] == "requeue", words
    (folder / f"{words[1]}.requeue").touch()


def install(folder: Path) -> Path:
    """The folder of sbatch, squeue and scontrol, for the PATH."""
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "squeue", "scontrol"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "{folder}" {name} "$@"\n')
        program.chmod(0o755)
    return folder / "bin"


class Cluster:
    """The jobs of a queue folder, worked off one at a time in the order of submission."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = install(folder)
        self.codes: dict[str, list[int]] = {}

    def jobs(self) -> dict[int, dict[str, Any]]:
        found = {int(path.stem): json.loads(path.read_text()) for path in self.folder.glob("*.job")}
        return dict(sorted(found.items()))

    def work(self, near_the_limit: Callable[[str], bool] = lambda task: False) -> None:
        """Work off the queue. A task gets the signal before its limit as soon as `near_the_limit(its id)` says so."""
        while pending := {number: job for number, job in self.jobs().items() if job["state"] == "PENDING"}:
            number, job = next(iter(pending.items()))
            kind, _, needed = job["options"].get("dependency", "").partition(":")
            assert kind in ("", "afterok")
            states = [self.jobs()[int(name)]["state"] for name in needed.split(":") if name]
            if all(state == "COMPLETED" for state in states):
                self._set(number, "RUNNING")
                self._set(number, "COMPLETED" if self._run(number, job, near_the_limit) else "FAILED")
            else:
                # jobs stand in the order of submission, so what this one waits for has ended otherwise
                assert job["options"]["kill-on-invalid-dep"] == "yes"
                self._set(number, "CANCELLED")

    def states(self) -> set[str]:
        return {job["state"] for job in self.jobs().values()}

    def _set(self, number: int, state: str) -> None:
        path = self.folder / f"{number}.job"
        path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))

    def _run(self, number: int, job: dict[str, Any], near_the_limit: Callable[[str], bool]) -> bool:
        """All tasks of one job, those that go back to the queue until they have ended."""
        array = job["options"].get("array")
        first, last = map(int, array.split("-")) if array else (0, 0)
        todo = list(range(first, last + 1))
        good = True
        while todo:
            started = {task: self._start(number, task if array else None, job) for task in todo}
            todo = []
            for task, process in started.items():
                name = f"{number}_{task}" if array else f"{number}"
                self._wait(process, name, job, near_the_limit)
                self.codes.setdefault(name, []).append(process.returncode)
                requeue = self.folder / f"{name}.requeue"
                if requeue.exists():
                    requeue.unlink()
                    assert "requeue" in job["options"]
                    todo.append(task)
                else:
                    good = good and process.returncode == 0
        return good

    def _start(self, number: int, task: int | None, job: dict[str, Any]) -> subprocess.Popen[bytes]:
        variables = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NAME": job["options"].get("job-name", "step")}
        output = job["options"].get("output", "slurm-%j.out").replace("%j", str(number)).replace("%A", str(number))
        if task is not None:
            last = job["options"]["array"].partition("-")[2]
            # the last task bears the array's own number, the others numbers of their own
            own = number if str(task) == last else 10000 * number + task
            variables |= {
                "SLURM_JOB_ID": str(own),
                "SLURM_ARRAY_JOB_ID": str(number),
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_COUNT": last,
            }
            output = output.replace("%a", str(task))
        mode = {"append": "ab"}.get(job["options"].get("open-mode", ""), "wb")
        with open(Path(job["folder"]) / output, mode) as log:
            return subprocess.Popen(
                job["words"],
                cwd=job["folder"],
                env={**job["environment"], **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait(
        self, process: subprocess.Popen[bytes], name: str, job: dict[str, Any], near_the_limit: Callable[[str], bool]
    ) -> None:
        warned = False
        deadline = time.monotonic() + 200
        while process.poll() is None:
            assert time.monotonic() < deadline, f"job {name} does not end"
            if not warned and near_the_limit(name):
                assert job["options"]["signal"].startswith("B:USR2@")
                process.send_signal(signal.SIGUSR2)
                warned = True
            time.sleep(0.02)


if __name__ == "__main__":
    {"sbatch": sbatch, "squeue": squeue, "scontrol": scontrol}[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:])
