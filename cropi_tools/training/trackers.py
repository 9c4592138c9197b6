"""TensorBoard and Weights & Biases, where they are installed: the figures of the three logs go there too.

They are for looking at; the files are the record. So a tracker that fails on the way (a network, a disk) is left out with a warning, and
training continues.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.runtime.errors import CropiError, UsageError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
PROJECT = "cropi-tools"
RUN_ID = "run-id"  # in the folder of Weights & Biases


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
            if name != "step"
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            # a record of times has 0 for what another record of the same step tells
            and (kind != "timings" or value)
        }
        self._try(lambda: self._show(prefix, figures, record["step"]))

    def close(self, failed: bool = False) -> None:
        """Send what is left; failed: the run did not come to its end."""
        self._try(lambda: self._close(failed))

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # whatever a service or its library may raise
            self._failed = True
            runtime.warn(f"{self.name} failed ({_said(error)}); going on without it")

    @abstractmethod
    def _show(self, prefix: str, figures: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _close(self, failed: bool) -> None: ...


class _TensorBoard(Tracker):
    name = "tensorboard"

    def __init__(self, folder: Path, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what was shown after the last checkpoint is shown again by a resumed run; all of it, where another run was shown in this folder
        self._writer = SummaryWriter(str(folder), purge_step=0 if step is None else step + 1)

    def _show(self, prefix: str, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        # else a kill would take what no resumed run shows again
        self._writer.flush()

    def _close(self, failed: bool) -> None:
        self._writer.close()


class _WandB(Tracker):
    name = "wandb"

    def __init__(self, folder: Path, path: Path, options: Mapping[str, Any], step: int | None) -> None:
        import wandb

        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=str(path),
            id=_run_id(folder / RUN_ID, step is None),
            resume="allow",
            config=dict(options),
            dir=str(folder),
            settings=wandb.Settings(silent=runtime.is_quiet()),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # how far the service had been told when an earlier try ended: it takes nothing back, so what is made again is not sent again
        self._shown = dict(self._run.summary)

    def _show(self, prefix: str, figures: Mapping[str, float], step: int) -> None:
        if step > self._shown.get(f"{prefix}/step", -1):
            self._run.log({**figures, f"{prefix}/step": step, "step": step})

    def _close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(file: Path, new: bool) -> str:
    """The id that a resumed run goes on under. A run from the start has its own, whatever was under the same name before."""
    if new or not file.exists():
        file.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _said(error: Exception) -> str:
    from cropi_tools.policy.loading_errors import (
        first_line,  # not above: the command's beginning does without transformers
    )

    return f"{type(error).__name__}: {first_line(error)}"


def check_trackers(names: Sequence[str]) -> None:
    """UsageError: no such tracker. CropiError: its package is not installed. Nothing is imported."""
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"--track {name}: expected {' or '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise CropiError(f"--track {name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}")


def open_trackers(names: Sequence[str], path: Path, options: Mapping[str, Any], step: int | None) -> list[Tracker]:
    """The trackers of a run that writes `path`, each with a folder beside it such as PATH.tensorboard.

    step: the last one committed; None: the run starts again. CropiError: one cannot be opened.
    """
    found: list[Tracker] = []
    for name in dict.fromkeys(names):
        folder = path.with_name(path.name + f".{name}")
        try:
            opened = _TensorBoard(folder, step) if name == "tensorboard" else _WandB(folder, path, options, step)
        except Exception as error:
            raise CropiError(f"--track {name}: cannot be opened ({_said(error)})") from None
        found.append(opened)
    return found
