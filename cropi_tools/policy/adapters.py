"""Low-rank adapters (LoRA, arXiv 2106.09685) that are trained in place of the weights: put in, switched off, merged, saved.

A linear layer W becomes W + (alpha / rank) B A; A is random, B zero, so the policy's function does not change at first. The library peft does
the arithmetic; here is what it does not: adapters beside a model that keeps its own class and checkpoint names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cropi_tools.data.errors import CropiError
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.weights import ADAPTER_NAME, FACTORS, adapted_layers, fill, whole

ADAPTER = "adapter"  # the folder inside a policy that peft opens
_WEIGHTS = "adapter_model.safetensors"


def inject_adapters(policy: Policy, rank: int, alpha: float, seed: int) -> Any:
    """Put adapters beside all linear layers but the head, which alone have gradients then; returns peft's settings of them.

    CropiError: the library peft is not installed.
    """
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, policy.model)
    policy.model.eval()
    return settings


def has_adapters(model: Any) -> bool:
    """Whether adapters were put in."""
    return bool(adapted_layers(model))


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside the block the model is what it was before adapters were put in."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


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
    """Give the adapters the values of FOLDER/adapter."""
    found = load_file(folder / ADAPTER / _WEIGHTS)
    for name, parameter in _factors(model):
        fill(parameter, found[name])
