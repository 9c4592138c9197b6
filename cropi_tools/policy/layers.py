"""A model's layers: found whatever its family calls them, and told to compute their activations twice in place of holding them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cropi_tools.runtime.errors import InputError


def decoder_layers(model: Any) -> list[Any]:
    """The model's layers, whatever its family calls them. InputError: there are none."""
    lists: list[Any] = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    named = set(getattr(model, "_no_split_modules", None) or ())
    layers = [found for found in lists if len(found) and all(type(layer).__name__ in named for layer in found)]
    if not any(len(found) for found in lists):
        raise InputError(
            f"{type(model).__name__}: has no list of layers, so neither sharing nor checkpointing knows its parts"
        )

    def size(found: Any) -> int:
        return sum(parameter.numel() for parameter in found.parameters())

    # a layer's experts are a list too, and a longer one perhaps
    return list(max(layers or lists, key=size))


def checkpoint_activations(model: Any) -> None:
    """Compute every layer's activations again in the backward pass in place of holding them."""
    for layer in decoder_layers(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def recomputes_activations(model: Any) -> bool:
    """Whether `checkpoint_activations` was called on the model."""
    return any(getattr(layer.forward, "func", None) is checkpoint for layer in model.modules())
