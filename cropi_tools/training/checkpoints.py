"""What a training run must keep to go on exactly where it was: weights, optimizer, step; order and seeds follow from the step.

A checkpoint is a policy folder with `state/` inside; it is written under a temporary name and renamed, then the run's progress names it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cropi_tools.data.manifest import write_json
from cropi_tools.data.policies import OPTIMIZER_STATE
from cropi_tools.policy.loading import Policy, save_policy

STATE = "state"


def checkpoint_folder(part: Path, step: int) -> Path:
    return part / f"checkpoint-{step:06d}"


def save_checkpoint(part: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> Path:
    """Write the checkpoint of `step` below `part` and return its folder."""
    folder = checkpoint_folder(part, step)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_policy(policy, temporary)
    (temporary / STATE).mkdir()
    save_file(_optimizer_tensors(policy, optimizer), temporary / OPTIMIZER_STATE)
    write_json(temporary / STATE / "state.json", {"step": step})
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    return folder


def resume_folder(part: Path, state: Mapping[str, Any]) -> Path | None:
    """Where the weights and the optimizer of the last committed step lie: its checkpoint, or the part itself once that was promoted.

    None when no step was committed. state: what the run's progress says.
    """
    if not state.get("step"):
        return None
    return part if state.get("promoted") else checkpoint_folder(part, state["step"])


def keep_only(part: Path, folder: Path) -> None:
    """Remove checkpoints other than `folder`, half-written ones included."""
    for other in part.glob("checkpoint-*"):
        if other != folder:
            shutil.rmtree(other)


def load_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the moments of a checkpoint."""
    tensors = load_file(folder / OPTIMIZER_STATE, device=str(policy.device))
    for name, parameter in policy.model.named_parameters():
        if f"exp_avg/{name}" in tensors:
            optimizer.state[parameter] = {
                "step": tensors[f"step/{name}"].cpu(),
                "exp_avg": tensors[f"exp_avg/{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
            }


def promote(part: Path, folder: Path) -> None:
    """Make the files of the last checkpoint the policy itself. Hard links first: a kill leaves the checkpoint whole."""
    for path in sorted(folder.rglob("*")):
        target = part / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.unlink(missing_ok=True)
            os.link(path, target)


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in policy.model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = value.contiguous()
    return found
