"""Mean gradients on disk: safetensors, one float32 tensor a parameter, with what they belong to in the header.

Made with --halves, it holds the mean over the first half of the prompts as well (that over the second follows from the two) and, to tell
how much the validation prompts at hand have to say, sketches of the sums over small groups of prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cropi_tools.data.metadata import (
    ANYTHING,
    AT_LEAST_ONE,
    COUNT,
    NOT_NEGATIVE,
    OBJECT,
    PARAMETERS,
    TEXT,
    Each,
    Listed,
    Shape,
    checked,
    is_number,
    parse_json,
)
from cropi_tools.runtime.errors import InputError

_KEY = "cropi"
_FIRST_HALF = "first-half/"  # before a parameter's name: its mean over the first half of the prompts
_GROUPS = "half-groups"  # the sketches of groups; no parameter has this name, since those of models have a dot

_REMEDY = "make the mean again"
_FACTS: dict[str, Shape] = {
    "policy?": TEXT,
    "tokenizer?": TEXT,
    "objective?": OBJECT,
    "parameters?": PARAMETERS,
    "layout?": TEXT,
    "norm?": ANYTHING,  # looked at where the tensors are, with a message of its own
    "prompts?": COUNT,
    "counters?": Each(COUNT),
    "content?": TEXT,
    "done?": COUNT,
    "halves?": {
        "prompts?": Listed(AT_LEAST_ONE, 2),
        "norms?": Listed(NOT_NEGATIVE, 2),
        "groups?": Listed(COUNT, 2),
        "projection?": OBJECT,
        "counts?": Listed(Listed(COUNT), 2),
        "live?": Listed(COUNT, 2),
    },
}


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
    """What a mean says of itself: policy, objective, prompts, norm; of an unfinished one, how far it is. InputError: it is none, or damaged."""
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: does not open as safetensors ({error})") from None
    if _KEY not in metadata:
        raise InputError(f"{path}: is not a mean gradient; make one with cropi-grad --mean")
    facts = parse_json(metadata[_KEY], f"{path}: its header", _REMEDY)
    known: dict[str, Any] = checked(facts, _FACTS, f"{path}: its header is damaged", _REMEDY)
    return known


def read_finished(path: str | Path, *needed: str) -> dict[str, Any]:
    """The facts of a mean that is finished, those that are needed among them. InputError: it is unfinished, or one is missing."""
    facts = read_facts(path)
    if "norm" not in facts:
        raise InputError(f"{path}: is an unfinished mean; run the cropi-grad --mean that made it again")
    shape: dict[str, Shape] = {"halves?": {"prompts": ANYTHING, "norms": ANYTHING}}
    shape |= dict.fromkeys((*needed, "parameters"), ANYTHING)
    known: dict[str, Any] = checked(facts, shape, f"{path}: its header is damaged", _REMEDY)
    return known


def check_whole(path: str | Path, facts: Mapping[str, Any]) -> None:
    """InputError unless a mean is what its header says: a positive norm, float32 tensors of its parameters, and their hash. Reads all of it."""
    norm: Any = facts.get("norm")
    if not is_number(norm) or not norm > 0:
        raise InputError(f"{path}: its norm is {norm!r}, no positive number; the mean is damaged, make it again")
    wanted = {name: (tuple(shape), torch.float32) for name, shape in facts["parameters"]}
    every = [read_tensors(path), read_tensors(path, half=True)]
    for tensors in every if "halves" in facts else every[:1]:
        check_tensors(path, tensors, wanted)
    if content_hash(*every) != facts.get("content"):
        raise InputError(f"{path}: its numbers are not those that were written; the mean is damaged, make it again")


def check_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """InputError unless a file's tensors have these names, shapes and number formats."""
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != wanted:
        name = min(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
        raise InputError(
            f"{path}: tensor {name} is {_described(found.get(name))}, its header says {_described(wanted.get(name))}; "
            "the mean is damaged, make it again"
        )


def content_hash(*every: Mapping[str, torch.Tensor]) -> str:
    """A hash of a mean's tensors (and of its first half's), kept by the stores that used it."""
    digest = hashlib.sha256()
    for tensors in every:
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _described(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if tensor is None else f"{str(tensor[1]).removeprefix('torch.')} {list(tensor[0])}"


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
