"""A model's weights as a checkpoint has them: under its names, tied ones once, adapters merged, gathered where processes share them.

Gathering is collective: every process must go through the whole iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

BASE, FACTORS = ".base_layer", ("lora_A", "lora_B")
ADAPTER_NAME = "default"  # peft's name of the only adapter


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that processes may share."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy whole values into a tensor of which this process may hold a part."""
    with torch.no_grad():
        target.copy_(alike(values, target))


def alike(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Whole values on the device of `target` and shared out as it is."""
    moved = values.to(target.device)
    if not hasattr(target, "device_mesh"):
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(moved, target.device_mesh, target.placements)


def adapted_layers(model: Any) -> dict[str, Any]:
    """Layers with an adapter beside them, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def checkpoint_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors, one at a time; those that need neither gathering nor merging are the model's own."""
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    layers = adapted_layers(model)
    for name, tensor in model.state_dict().items():
        if name in tied or any(factor in name for factor in FACTORS):
            continue
        found = whole(tensor)
        layer = layers.get(name.partition(f"{BASE}.weight")[0])
        if layer is not None and name.endswith(f"{BASE}.weight"):
            found = found + _delta(layer).to(found)
        yield name.replace(BASE, ""), found


def _delta(layer: Any) -> torch.Tensor:
    """What an adapter adds to its layer's weight."""
    first, second = (whole(getattr(layer, factor)[ADAPTER_NAME].weight) for factor in FACTORS)
    product = second @ first
    return layer.scaling[ADAPTER_NAME] * (product.T if layer.fan_in_fan_out else product)
