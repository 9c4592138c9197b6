"""Mean gradients on disk: safetensors, one float32 tensor a parameter, with what they belong to in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cropi_tools.data.errors import InputError

_KEY = "cropi"


def write_mean(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts (JSON values) to `path`."""
    save_file(tensors, path, metadata={_KEY: json.dumps(facts, sort_keys=True)})


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


def read_tensors(path: str | Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a mean, mapped from the file where the device is the CPU."""
    with safe_open(path, "pt", device=str(device)) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
