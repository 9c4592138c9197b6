"""Low-rank adapters (LoRA, arXiv 2106.09685) that are trained in place of the weights: put in, switched off, merged, saved.

A linear layer W becomes W + (alpha / rank) B A; A is random, B zero, so the policy's function does not change at first. The library peft does
the arithmetic; here is what it does not: adapters beside a model that keeps its own class and checkpoint names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cropi_tools import runtime
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.loading_errors import opening
from cropi_tools.policy.merging import check_structure, probe
from cropi_tools.policy.weights import ADAPTER_NAME, BASE, FACTORS, adapted_layers, fill, merge_targets, whole
from cropi_tools.policy.weights import adapters_off as adapters_off
from cropi_tools.runtime.errors import CropiError, InputError, first_line

ADAPTER = "adapter"  # the folder inside a policy that peft opens
_WEIGHTS = "adapter_model.safetensors"


def inject_adapters(policy: Policy, rank: int, alpha: float, seed: int) -> Any:
    """Put adapters beside all linear layers but the head, which alone have gradients then; returns peft's settings of them.

    Says which weights have none. CropiError: peft is not installed. InputError: it cannot adapt this model, or the adapters cannot be merged.
    """
    before = probe(policy.model)
    settings = put_adapters(policy, rank, alpha, seed)
    check_structure(policy.model, policy.folder, before, seed)
    without = _without_adapters(policy.model)
    if without:
        runtime.notify(f"{policy.folder}: no adapters beside {', '.join(without)}, which stay as they are")
    return settings


def put_adapters(policy: Policy, rank: int, alpha: float, seed: int) -> Any:
    """`inject_adapters` without its trial: for adapters that are never merged. CropiError, InputError: as there."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise CropiError("--lora needs the library peft: pip install 'cropi-tools[lora]'") from None
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by the rank, whole or not
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=policy.folder,
    )
    try:
        # peft warns of its own settings for families, which are not ours to change; whether they are right is tried out
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, policy.model)
    except Exception as error:  # whatever peft makes of a family it does not know
        raise InputError(
            f"{policy.folder}: peft cannot put adapters into {type(policy.model).__name__} ({first_line(error)}); leave --lora out"
        ) from None
    for name, value in vars(settings).items():
        if isinstance(value, set):
            # a set's order changes from process to process, and with it the bytes of the file
            setattr(settings, name, sorted(value))
    policy.model.eval()
    return settings


def _without_adapters(model: Any) -> list[str]:
    """Matrices that have no adapter, embeddings and head aside; `*` for numbers."""
    targets, head = merge_targets(model), model.get_output_embeddings()
    found = set()
    for name, module in model.named_modules():
        if module is head or isinstance(module, torch.nn.Embedding) or any(factor in name for factor in FACTORS):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}".replace(BASE, "")
            if full not in targets and min(parameter.shape[-2:]) > 1 < parameter.ndim and not own.endswith("bias"):
                found.add(re.sub(r"\.\d+\.", ".*.", full))
    return sorted(found)


def has_adapters(model: Any) -> bool:
    """Whether adapters were put in."""
    return bool(adapted_layers(model))


def _factors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapters' parameters under the names that peft gives them in a file."""
    for name, parameter in model.named_parameters():
        if any(factor in name for factor in FACTORS):
            yield "base_model.model." + name.replace(f".{ADAPTER_NAME}.", "."), parameter


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapters' parameters, whole, as peft names them."""
    return {name: whole(parameter.detach()).contiguous() for name, parameter in _factors(model)}


def save_adapters(tensors: Mapping[str, torch.Tensor], settings: Any, folder: Path) -> None:
    """Write FOLDER/adapter, which peft's `PeftModel.from_pretrained` opens beside the policy that training started from."""
    target = folder / ADAPTER
    target.mkdir(exist_ok=True)
    save_file(dict(tensors), target / _WEIGHTS, metadata={"format": "pt"})
    settings.save_pretrained(str(target))


def load_adapters(model: Any, folder: Path) -> None:
    """Give the adapters the values of FOLDER/adapter. InputError: it does not open, or holds other adapters than these."""
    with opening(str(folder / ADAPTER), _WEIGHTS):
        found = load_file(folder / ADAPTER / _WEIGHTS)
    own = dict(_factors(model))
    strange = sorted(own.keys() ^ found.keys())
    strange += sorted(name for name in own.keys() & found.keys() if own[name].shape != found[name].shape)
    if strange:
        raise InputError(f"{folder / ADAPTER / _WEIGHTS}: {strange[0]} is missing, left over or of another shape")
    for name, parameter in own.items():
        fill(parameter, found[name])
