"""A policy that several processes share (FSDP2): each holds a part of every parameter, gradient and moment.

A decoder layer is gathered for its forward and its backward pass, all the rest for the whole of both. Everything that goes through the model is
collective: all processes must make the same number of passes, each with or without gradient as the others. Gradients are averaged over the
processes, so a loss whose parts should add up is multiplied by their number.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from cropi_tools.policy.layers import decoder_layers
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import SHARED, chunked_logprobs, has_plain_head
from cropi_tools.policy.packing import can_pack
from cropi_tools.policy.rotary_lengths import pass_lengths


def share_out(policy: Policy, device: str, bfloat16: bool) -> Policy:
    """Share the parameters of a policy that all processes have loaded, on the CPU or on their own device. Each keeps its part on `device`.

    bfloat16: gathered parameters and products are; the parts, gradients' sums and moments stay float32.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = policy.model
    # tried out now: later that would be a pass that all must make at the same moment
    can_pack(model)
    has_plain_head(model)
    pass_lengths(model)
    mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
    formats = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=formats)
    fully_shard(model, mesh=mesh, mp_policy=formats)
    if hasattr(model, "set_reduce_scatter_unused_params"):
        # an expert that no token of this process came to has no gradient here, but sums are collective; older versions of torch cannot
        model.set_reduce_scatter_unused_params(True)
    _give_logprobs(model)
    return policy


def _give_logprobs(model: Any) -> None:
    """Let a shared model gather its parameters for `response_logprobs`, which never runs the model's own forward pass."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(model, SHARED, MethodType(chunked_logprobs, model))
    register_fsdp_forward_method(model, SHARED)
    gathered = getattr(model, SHARED)

    def logprobs(*arguments: Any) -> Any:
        found = gathered(*arguments)
        if not torch.is_grad_enabled():
            # what is outside of the layers is kept for a backward pass, and there is none
            model.reshard()
        return found

    setattr(model, SHARED, logprobs)
