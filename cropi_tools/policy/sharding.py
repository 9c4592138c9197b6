"""A policy that several processes share (FSDP2): each holds a part of every parameter, gradient and moment.

A decoder layer is gathered for its forward and its backward pass, all the rest for the whole of both. Everything that goes through the model is
collective: all processes must make the same number of passes.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cropi_tools.data.errors import InputError
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import SHARED, chunked_logprobs, has_plain_head
from cropi_tools.policy.packing import can_pack


def decoder_layers(model: Any) -> list[Any]:
    """The model's layers, whatever its family calls them. InputError: there are none."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    named = set(getattr(model, "_no_split_modules", None) or ())
    layers = [found for found in lists if found and all(type(layer).__name__ in named for layer in found)]
    if not any(layers or lists):
        raise InputError(
            f"{type(model).__name__}: has no list of layers, so neither sharing nor checkpointing knows its parts"
        )
    return max(layers or lists, key=lambda found: len(found))


def checkpoint_activations(model: Any) -> None:
    """Compute every layer's activations anew in the backward pass in place of holding them."""
    for layer in decoder_layers(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def share_out(policy: Policy, device: str, bfloat16: bool) -> Policy:
    """Share the parameters of a policy that all processes have loaded, on the CPU or on their own device. Each keeps its part on `device`.

    bfloat16: gathered parameters and products are; the parts, gradients' sums and moments stay float32.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    model = policy.model
    # tried out now: later that would be a pass that all must make at the same moment
    can_pack(model)
    has_plain_head(model)
    mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
    formats = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=formats)
    # log-probabilities are formed from the body and the head, never by the model's own forward pass: this is their way in
    setattr(model, SHARED, MethodType(chunked_logprobs, model))
    fully_shard(model, mesh=mesh, mp_policy=formats)
    register_fsdp_forward_method(model, SHARED)
    return policy
