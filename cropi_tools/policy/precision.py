"""Whether a policy's weights, as they are stored or as they are loaded, can hold what training changed in them.

A step of 1e-6 is below half the distance to the next bfloat16 number for most weights, so a policy that is rounded to 16 bits after a stage of
training is mostly the one before it: what is scored, sampled or trained on from there has lost the stage. cropi-train itself keeps
float32 throughout; its --save-dtype, verl, a conversion by hand and --dtype do not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cropi_tools import runtime
from cropi_tools.data.manifest import read_manifest, write_json
from cropi_tools.data.policies import WEIGHTS_INDEX, weight_files
from cropi_tools.policy.checkpoint import Stored, stored_tensors
from cropi_tools.runtime.errors import CropiError

LIMIT = 0.25  # of the weights
TENSORS, VALUES = 64, 4096  # how many are looked at, and how much of each
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_looked_at: set[str] = set()


class Lost(NamedTuple):
    """share: of the weights that training moved, those whose change rounding to `format` takes back. stored: whether the files are rounded."""

    share: float
    format: str
    stored: bool
    parent: str


def warn_of_lost_updates(folder: str, loaded: torch.dtype) -> None:
    """Say in a line when a policy that cropi-train made is mostly its parent again; a folder is looked at when it is first loaded."""
    place = str(Path(folder).resolve())
    if place in _looked_at or os.environ.get("RANK", "0") != "0":
        return
    _looked_at.add(place)
    manifest = read_manifest(folder) or {}
    parent = manifest.get("inputs", {}).get("policy", {}).get("path")
    if manifest.get("command") != "cropi-train" or parent is None:
        return
    options = manifest.get("options", {})
    lost = lost_updates(folder, parent, loaded, options.get("learning_rate", 0.0) * options.get("steps", 0))
    if lost is not None and lost.share > LIMIT:
        runtime.warn(warning(folder, lost))


def loss_in_saving(name: str, folder: str | Path, parent: str, dtype: str) -> str | None:
    """The line that says so when the policy in `folder`, the finished one's weights as they were trained, is mostly `parent` again in `dtype`.

    name: of the finished policy. None: enough of the updates is kept.
    """
    lost = lost_updates(folder, parent, _FORMATS[dtype])
    return warning(name, lost, "leave --save-dtype out") if lost is not None and lost.share > LIMIT else None


def round_policy(folder: Path, target: Path, dtype: str) -> set[Path]:
    """Write the weights of the policy in `folder` into the folder `target` in another number format, with a config.json and an index that say
    so; returns the files that were written. A kill leaves none of them in part.
    """
    written, size = set(), 0
    for path in weight_files(folder):
        tensors = {name: _rounded(value, _FORMATS[dtype]) for name, value in load_file(path).items()}
        size += sum(value.nbytes for value in tensors.values())
        temporary = target / (path.name + ".tmp")
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, target / path.name)
        written.add(target / path.name)
    for name, changes in (("config.json", {}), (WEIGHTS_INDEX, {"metadata": {"total_size": size}})):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            (target / name).unlink(missing_ok=True)
            write_json(target / name, {**_renamed(found, dtype), **changes})
            written.add(target / name)
    return written


def _rounded(value: torch.Tensor, number_format: torch.dtype) -> torch.Tensor:
    return value.to(number_format) if value.dtype == torch.float32 else value


def _renamed(configuration: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration, and those within it, with this number format where it says float32."""
    return {
        key: _renamed(value, dtype)
        if isinstance(value, dict)
        else dtype
        if key in ("dtype", "torch_dtype") and value == "float32"
        else value
        for key, value in configuration.items()
    }


def warning(folder: str, lost: Lost, remedy: str = "") -> str:
    """The line that says it, with the remedy."""
    remedy = remedy or ("keep it in float32 between stages" if lost.stored else "give --dtype float32")
    return (
        f"{folder}: {lost.share:.0%} of the weights that training moved are again those of {lost.parent}, since {lost.format} cannot hold "
        f"such small updates; {remedy}"
    )


def lost_updates(folder: str | Path, parent: str | Path, loaded: torch.dtype, reach: float = 0.0) -> Lost | None:
    """What rounding took back of the way from `parent` to the policy in `folder`, from a sample of the weights of its layers.

    loaded: the format in which it is used. reach: the learning rate times the steps, which is about as far as AdamW moves a weight; where the
    parent is not there to compare with, weights for which that is below half the distance to the next number count as lost.
    None: nothing is rounded, or nothing is known.
    """
    mine = stored_tensors(folder)
    formats = {_STORED[found.dtype] for found in mine.values() if found.dtype in _STORED}
    stored = next((one for one in (torch.bfloat16, torch.float16) if one in formats), torch.float32)
    rounded = stored if stored != torch.float32 else loaded
    if rounded not in (torch.bfloat16, torch.float16):
        return None
    try:
        before = stored_tensors(parent)
    except (CropiError, OSError):
        if not reach:
            return None
        own = torch.cat([now.flatten().abs() for now, _ in _samples(mine, mine)])
        half = torch.exp2(torch.log2(own).floor()) * torch.finfo(rounded).eps / 2
        return Lost(float((half > reach).float().mean()), _name(rounded), stored != torch.float32, str(parent))
    moved = kept = 0
    for now, was in _samples(mine, before):
        same = now.to(rounded) == was.to(rounded)
        if stored != torch.float32:
            # what moved before it was rounded is not known: in a tensor that is trained, everything
            moved += 0 if same.all() else same.numel()
            kept += 0 if same.all() else int((~same).sum())
        else:
            moved += int((now != was).sum())
            kept += int((~same).sum())
    share = 1 - kept / moved if moved else (1.0 if stored != torch.float32 else math.nan)
    return None if math.isnan(share) else Lost(share, _name(rounded), stored != torch.float32, str(parent))


def _name(number_format: torch.dtype) -> str:
    return str(number_format).removeprefix("torch.")


def _samples(mine: dict[str, Stored], before: dict[str, Stored]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The beginnings of matrices that both have, in the layers alone: of an embedding only the rows of tokens that occur are trained."""
    names = [
        name
        for name, found in sorted(mine.items())
        if any(part.isdigit() for part in name.split("."))
        and len(found.shape) > 1
        and name in before
        and before[name].shape == found.shape
        and {found.dtype, before[name].dtype} <= _STORED.keys()
    ]
    for name in names[:: -(-len(names) // TENSORS)] if names else []:
        rows = max(1, VALUES // math.prod(mine[name].shape[1:]))
        pair = []
        for found in (mine[name], before[name]):
            with safe_open(found.file, framework="pt") as tensors:
                pair.append(tensors.get_slice(name)[:rows].float())
        yield pair[0], pair[1]
