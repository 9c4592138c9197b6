"""A model's weights as a checkpoint has them: under its names, tied ones once, adapters merged, gathered where processes share them.

Gathering is collective: every process must go through the whole iteration.
"""

from __future__ import annotations

import contextlib
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


def merge_targets(model: Any) -> dict[str, Any]:
    """Adapted layers by the parameter that each is beside, under the name it has without adapters.

    Beside stacked experts, where a module has several such parameters, peft puts one layer around another.
    """
    return {
        f"{name.replace(BASE, '')}.{getattr(layer, 'parameter_name', 'weight')}": layer
        for name, layer in adapted_layers(model).items()
    }


@torch.no_grad()
def checkpoint_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors, one at a time; those that need neither gathering nor merging are the model's own."""
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    layers = merge_targets(model)
    for name, tensor in model.state_dict().items():
        if name in tied or any(factor in name for factor in FACTORS):
            continue
        target = name.replace(BASE, "")
        yield target, merged(layers[target], tensor) if target in layers else whole(tensor)


def stored_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """`checkpoint_weights` as the files have them: a family may rename weights on loading, and stack those of experts."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions of the library before 5 load what is stored
        yield from checkpoint_weights(model)
        return
    for name, tensor in checkpoint_weights(model):
        yield from revert_weight_conversion(model, {name: tensor}).items()


def merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The whole of a weight with what the adapter beside it adds."""
    found = whole(weight)
    return found + _delta(layer).to(found)


def _delta(layer: Any) -> torch.Tensor:
    """What an adapter adds to its weight, in the weight's shape."""
    first, second = (whole(getattr(layer, factor)[ADAPTER_NAME].weight) for factor in FACTORS)
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        product = second @ first
        return layer.scaling[ADAPTER_NAME] * (product.T if layer.fan_in_fan_out else product)
    # peft stacks the experts of both factors: first [experts * rank, in], second [out, rank * experts]
    parts = (
        second.reshape(second.shape[0], -1, experts).permute(2, 0, 1),
        first.reshape(experts, -1, first.shape[-1]),
    )
    product = layer.scaling[ADAPTER_NAME] * torch.bmm(*parts)
    # peft calls the stack's second dimension `in` and its last `out`, and swaps the two where a family has them the other way round
    return product if getattr(layer, "_did_swap_in_out_features", False) else product.transpose(1, 2)
