"""Mean gradients on disk: safetensors, one float32 tensor a parameter, with what they belong to in the header.

Made with --halves, it holds the mean over the first half of the prompts as well (that over the second follows from the two) and, to tell
how much the validation prompts at hand have to say, sketches of the sums over small groups of prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cropi_tools.data.errors import InputError

_KEY = "cropi"
_FIRST_HALF = "first-half/"  # before a parameter's name: its mean over the first half of the prompts
_GROUPS = "half-groups"  # the sketches of groups; no parameter has this name, since those of models have a dot


def write_mean(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    half: Mapping[str, torch.Tensor] | None = None,
    groups: torch.Tensor | None = None,
) -> None:
    """Write tensors by parameter and facts (JSON values) to `path`.

    half: the mean over the first half of the prompts. groups: sketches [groups, dim] of the sums over groups of prompts.
    """
    every = {**tensors, **{_FIRST_HALF + name: tensor for name, tensor in (half or {}).items()}}
    if groups is not None:
        every[_GROUPS] = groups
    save_file(every, path, metadata={_KEY: json.dumps(facts, sort_keys=True)})


def read_facts(path: str | Path) -> dict[str, Any]:
    """What a mean says of itself: policy, objective, prompts, norm."""
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: does not open as safetensors ({error})") from None
    if _KEY not in metadata:
        raise InputError(f"{path}: is not a mean gradient; make one with cropi-grad --mean")
    return json.loads(metadata[_KEY])


def read_tensors(path: str | Path, half: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a mean by parameter, mapped from the file: pages are read when touched and take no memory of the process.

    half: the mean over the first half of the prompts, empty where the file has none.
    """
    with safe_open(path, "pt") as opened:
        names = [
            name
            for name in opened.keys()  # noqa: SIM118 - not a dictionary
            if name.startswith(_FIRST_HALF) == half and name != _GROUPS
        ]
        return {name.removeprefix(_FIRST_HALF): opened.get_tensor(name) for name in names}


def read_groups(path: str | Path) -> torch.Tensor | None:
    """The sketches of groups of prompts, float32 [groups, dim]; None where the file has none."""
    with safe_open(path, "pt") as opened:
        return opened.get_tensor(_GROUPS) if _GROUPS in opened.keys() else None  # noqa: SIM118 - not a dictionary
