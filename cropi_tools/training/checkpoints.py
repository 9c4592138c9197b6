"""What a training run must keep to resume exactly: weights, optimizer, step, place in the stream of prompts, rollouts not yet used.

A checkpoint is a policy folder with `state/` inside, that of the last step only where the finished policy is to have it. It is
written under a temporary name and renamed, then the run's progress names it.
Weights and moments are whole in it, however many processes shared them, so that any number may resume from it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cropi_tools.data import fields
from cropi_tools.data.fields import check_fields
from cropi_tools.data.jsonl import Record, dump_line, read_jsonl
from cropi_tools.data.manifest import write_json
from cropi_tools.data.metadata import (
    AT_LEAST_ONE,
    COUNT,
    FLAG,
    NUMBER,
    WHOLE,
    Each,
    Listed,
    Maybe,
)
from cropi_tools.data.policies import OPTIMIZER_STATE
from cropi_tools.data.records import rollout_of
from cropi_tools.policy.adapters import save_adapters
from cropi_tools.policy.loading import Policy, save_policy
from cropi_tools.policy.precision import round_policy
from cropi_tools.policy.weights import alike, whole
from cropi_tools.runtime.errors import InputError

STATE = "state"
PENDING = "pending.jsonl"
PROGRESS = {
    **dict.fromkeys(("step?", "place?", "pending?"), COUNT),
    "evaluated?": WHOLE,
    "tokens_per_pass?": AT_LEAST_ONE,
    "promoted?": FLAG,
    "logs?": Each(COUNT),
    "counters?": Each(COUNT),
    "watch?": Maybe(
        {
            **dict.fromkeys(("first?", "last?"), Each(Listed(NUMBER))),
            **dict.fromkeys(("flat?", "before?", "live?"), COUNT),
        }
    ),
}
"""What a commit of cropi-train says."""


def checkpoint_folder(part: Path, step: int) -> Path:
    return part / f"checkpoint-{step:06d}"


def save_checkpoint(
    part: Path,
    step: int,
    policy: Policy,
    weights: Mapping[str, torch.Tensor] | None,
    moments: Mapping[str, torch.Tensor] | None,
    adapters: tuple[Any, Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write the checkpoint of `step` below `part` and return its folder; when that fails, nothing is left of it.

    weights: the state dict to save; None: the model's own. moments: of `optimizer_tensors`, or None. adapters: peft's settings
    and the adapters' tensors, where they are trained.
    """
    folder = checkpoint_folder(part, step)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_policy(policy, temporary, weights)
        if adapters is not None:
            settings, tensors = adapters
            save_adapters(tensors, settings, temporary)
        if moments is not None:
            (temporary / STATE).mkdir()
            save_file(dict(moments), temporary / OPTIMIZER_STATE)
            write_json(temporary / STATE / "state.json", {"step": step})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except BaseException:
        # a full disk needs its room back
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def resume_folder(part: Path, state: Mapping[str, Any]) -> Path | None:
    """Where the weights and the optimizer of the last committed step lie: its checkpoint, or the part itself once that was promoted.

    None when no step was committed. state: what the run's progress says.
    """
    if not state.get("step"):
        return None
    return part if state.get("promoted") else checkpoint_folder(part, state["step"])


def keep_newest(part: Path, count: int) -> None:
    """Remove all checkpoints but the newest `count`, and half-written ones."""
    found = sorted(part.glob("checkpoint-*"))
    whole = [folder for folder in found if folder.suffix != ".tmp"]
    for folder in found:
        if folder not in whole[max(len(whole) - count, 0) :]:
            shutil.rmtree(folder)


def optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """AdamW's moments and counts, whole, by the names of their parameters, such as `exp_avg/NAME`. Collective, as `checkpoint_weights`."""
    for name, parameter in policy.trained:
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", whole(value).contiguous()


def load_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the moments of a policy folder that cropi-train wrote. InputError: they are of other parameters, such as adapters."""
    path = folder / OPTIMIZER_STATE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; cropi-train writes it with the policy, unless --state drop is given"
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: does not open as safetensors ({error}); give --carry weights, or start again"
        ) from None
    names = {f"exp_avg/{name}" for name, _ in policy.trained}
    strange = next((name for name in tensors if name.startswith("exp_avg/") and name not in names), None)
    if strange is not None:
        raise InputError(
            f"{folder / OPTIMIZER_STATE}: holds {strange.partition('/')[2]}, which is not trained here; give --carry weights"
        )
    for name, parameter in policy.trained:
        if f"exp_avg/{name}" in tensors:
            _check_moments(path, name, tensors, parameter.shape)
            optimizer.state[parameter] = {
                "step": tensors[f"step/{name}"],
                "exp_avg": alike(tensors[f"exp_avg/{name}"], parameter),
                "exp_avg_sq": alike(tensors[f"exp_avg_sq/{name}"], parameter),
            }


def _check_moments(path: Path, name: str, tensors: Mapping[str, torch.Tensor], shape: torch.Size) -> None:
    """InputError unless the state of a parameter is AdamW's: a count and two moments of its shape."""
    for key, wanted in (("step", torch.Size()), ("exp_avg", shape), ("exp_avg_sq", shape)):
        found = tensors.get(f"{key}/{name}")
        if found is None or found.shape != wanted or not found.is_floating_point():
            raise InputError(
                f"{path}: {key}/{name} is missing or of another shape; give --carry weights, or start again"
            )


def write_pending(part: Path, pending: Mapping[int, Record]) -> None:
    """Keep the rollouts of a step that was stopped while it was sampled; the caller's commit says how many there are."""
    temporary = part / (PENDING + ".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        for place, record in sorted(pending.items()):
            stream.write(dump_line({"place": place, "rollout": record}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, part / PENDING)


def read_pending(part: Path, state: Mapping[str, Any]) -> dict[int, Record]:
    """The rollouts that a stopped run kept, by place; none unless the last commit says so. InputError: a line is no rollout."""
    if not state.get("pending"):
        return {}
    path, found = part / PENDING, {}
    for number, line in read_jsonl(path):
        where = f"{path}:{number}"
        check_fields(line, fields.PENDING, where)
        if not fields.PENDING.keys() <= line.keys():
            raise InputError(f"{where}: no 'place' and 'rollout'; --force starts the training again")
        found[line["place"]] = rollout_of(line["rollout"], where).record
    if len(found) != state["pending"]:
        raise InputError(
            f"{path}: holds {len(found)} rollouts, {state['pending']} were saved; remove {part} to start again"
        )
    return found


def drop_pending(part: Path) -> None:
    """Remove rollouts that were kept and have been used."""
    (part / PENDING).unlink(missing_ok=True)


def drop_states(part: Path) -> None:
    """Remove the optimizer's states of the checkpoints that a finished policy keeps: nobody resumes from them."""
    for folder in part.glob("checkpoint-*"):
        shutil.rmtree(folder / STATE, ignore_errors=True)


def promote(part: Path, folder: Path, dtype: str = "float32") -> None:
    """Make the files of the last checkpoint the policy itself, its weights in the number format `dtype`. As hard links, or copies where there
    are none: a kill leaves the checkpoint whole.
    """
    rounded = round_policy(folder, part, dtype) if dtype != "float32" else ()
    for path in sorted(folder.rglob("*")):
        target = part / path.relative_to(folder)
        if target in rounded:
            continue
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            _link(path, target)


def _link(path: Path, target: Path) -> None:
    """A hard link, or a copy where there are none."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV):
            raise
        shutil.copy2(path, target)
