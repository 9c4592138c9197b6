"""Curricula in a test's own folder: a CONFIG of a few prompts, `make` on it, and commands that only keep books.

The bookkeeping commands (bookkeeping_command.py) stand where cropi-rollout and the others are looked for. They
take milliseconds and keep the promises the rules lean on: up to date, refuse, resume, stop at a signal. So the
rules are tested without a policy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BOOKKEEPING = Path(__file__).with_name("bookkeeping_command.py")
COMMANDS = ("cropi-rollout", "cropi-grad", "cropi-score", "cropi-select", "cropi-train", "cropi-embed")
NOT_INHERITED = (
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "CUDA_VISIBLE_DEVICES",
    "CONFIG",
    "GPUS",
    "STAGES",
    "FORCE",
    "SUBMIT",
    "RUN",
)


def write_config(folder: Path, **values: object) -> Path:
    """A config.mk: the defaults of these tests, with `values` in their place."""
    settings: dict[str, object] = {
        "RUN": folder / "run",
        "MODEL": folder / "P0",
        "POOL": folder / "pool.jsonl",
        "VALID": "target",
        "VALID_FILE.target": folder / "valid.jsonl",
        "TEST": "target",
        "TEST_FILE.target": folder / "test.jsonl",
        "STAGES": 1,
        "STEPS": 2,
        "ARMS": "random cropi",
        "SEEDS": 1,
        "TRAIN_OPTIONS": "--betas 0.9,0.99",
        **values,
    }
    path = folder / "config.mk"
    path.write_text("".join(f"{name} ?= {value}\n" for name, value in settings.items()))
    return path


class Curriculum:
    """`make` for one CONFIG, with the commands in `environment`/bin."""

    def __init__(self, config: Path, environment: Path) -> None:
        self.config, self.environment, self.folder = config, environment, config.parent
        self.run = self.folder / "run"
        self.variables = {
            **{name: value for name, value in os.environ.items() if name not in NOT_INHERITED},
            "BOOKS": str(self.folder),
            "OMP_NUM_THREADS": "1",
        }

    def words(self, *arguments: object) -> list[str]:
        return ["make", "-C", str(ROOT), f"CONFIG={self.config}", f"VENV={self.environment}", *map(str, arguments)]

    def make(self, *arguments: object, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `make ARGUMENTS curriculum`; fails the test when the exit code is not `code`."""
        done = subprocess.run(
            self.words(*arguments, "curriculum"),
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == code, f"make {arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "warning: undefined variable" not in done.stderr
        return done

    def nothing_left(self, *arguments: object) -> bool:
        """What `make -q` answers."""
        asked = subprocess.run(self.words(*arguments, "-q", "curriculum"), env=self.variables, capture_output=True)
        return asked.returncode == 0

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        """`make curriculum` in the background, in a process group of its own; what it says goes to make.log."""
        with open(self.folder / "make.log", "wb") as log:
            return subprocess.Popen(
                self.words(*arguments, "curriculum"), env=self.variables, stdout=log, stderr=log, start_new_session=True
            )

    def said(self) -> str:
        return (self.folder / "make.log").read_text()


class BookkeptCurriculum(Curriculum):
    """A curriculum whose commands only keep books, and tell them."""

    def __init__(self, folder: Path, **values: object) -> None:
        (folder / "P0").mkdir()
        for name in ("P0/config.json", "pool.jsonl", "valid.jsonl", "test.jsonl"):
            (folder / name).write_text(f"{name}\n")
        super().__init__(write_config(folder, **values), install_bookkeeping(folder / "environment"))

    def asked(self) -> list[dict[str, Any]]:
        """What the commands were asked since the last call: words, CUDA_VISIBLE_DEVICES, and what came of it."""
        log = self.folder / "log.jsonl"
        found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    def worked(self) -> list[str]:
        """The outputs made since the last call, relative to the run."""
        return self.with_outcome("made")

    def with_outcome(self, outcome: str) -> list[str]:
        """The outputs of the commands that ended so since the last call, relative to the run."""
        return [
            str(Path(entry["output"]).relative_to(self.run)) for entry in self.asked() if entry["outcome"] == outcome
        ]

    def tell(self, order: str, pattern: str) -> None:
        """From now on commands whose words match `pattern` fail (order `fail`) or work until stopped (`hold`)."""
        (self.folder / order).write_text(pattern)

    def untell(self, order: str) -> None:
        (self.folder / order).unlink()


def install_bookkeeping(environment: Path) -> Path:
    """A folder that looks like a virtual environment with our commands."""
    (environment / "bin").mkdir(parents=True)
    for name in COMMANDS:
        program = environment / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{BOOKKEEPING}" {name} "$@"\n')
        program.chmod(0o755)
    return environment


def results(run: Path, names: Sequence[str] = ("*.jsonl", "*.safetensors", "*.npy", "content")) -> dict[str, bytes]:
    """The bytes of a run's results by path: everything but manifests and what measures time."""
    found = {}
    for pattern in names:
        for path in run.rglob(pattern):
            if path.name != "timings.jsonl" and ".part" not in str(path):
                found[str(path.relative_to(run))] = path.read_bytes()
    return found
