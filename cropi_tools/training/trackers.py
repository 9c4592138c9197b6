"""TensorBoard and Weights & Biases, where they are installed: the figures of metrics.jsonl and evaluations.jsonl go there too.

They are for looking at; the files are the record. So a tracker that fails on the way (a network, a disk) is left out with a warning, and
training goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.errors import CropiError, UsageError
from cropi_tools.data.jsonl import Record

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
PROJECT = "cropi-tools"


class Tracker(ABC):
    """Shows a run's figures somewhere."""

    name: str
    _failed = False

    def write(self, kind: str, record: Record) -> None:
        """Show a record of metrics, evaluations or timings, at its `step`."""
        prefix = f"{kind}/{record['set']}" if "set" in record else kind
        figures = {
            f"{prefix}/{name}": float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._try(lambda: self._show(figures, record["step"]))

    def close(self) -> None:
        """Send what is left."""
        self._try(self._close)

    def _try(self, work: Any) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # whatever a service or its library may raise
            self._failed = True
            runtime.warn(f"{self.name} failed ({type(error).__name__}: {error}); going on without it")

    @abstractmethod
    def _show(self, figures: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class _TensorBoard(Tracker):
    name = "tensorboard"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what was shown after the last checkpoint is shown again by a resumed run
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def _show(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def _close(self) -> None:
        self._writer.close()


class _WandB(Tracker):
    name = "wandb"

    def __init__(self, folder: Path, path: Path, options: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=str(path),
            # the same output is the same run, so that a resume goes on in it
            id=hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest(),
            resume="allow",
            config=dict(options),
            dir=str(folder),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _show(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def _close(self) -> None:
        self._run.finish()


def check_trackers(names: Sequence[str]) -> None:
    """UsageError: no such tracker. CropiError: its package is not installed. Nothing is imported."""
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"--track {name}: expected {' or '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise CropiError(f"--track {name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}")


def open_trackers(names: Sequence[str], path: Path, options: Mapping[str, Any], step: int) -> list[Tracker]:
    """The trackers of a run that writes `path`, each with a folder beside it such as PATH.tensorboard; step: the last one committed.

    CropiError: one cannot be opened.
    """
    found: list[Tracker] = []
    for name in names:
        folder = path.with_name(path.name + f".{name}")
        try:
            found.append(_TensorBoard(folder, step) if name == "tensorboard" else _WandB(folder, path, options))
        except Exception as error:
            raise CropiError(f"--track {name}: cannot be opened ({type(error).__name__}: {error})") from None
    return found
