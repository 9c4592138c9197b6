"""The one place that knows how vLLM takes new weights while it runs; it has changed between releases.

vLLM fuses projections, may shard and repack them, and ties what the model ties. Its own reloading (layer by layer, into the tensors it
already has) knows all that, given the parameters under their checkpoint names. What it has cached of prompts was computed with the old weights,
so the prefix cache goes too: it would be wrong without any error.
"""

from __future__ import annotations

from typing import Any

from cropi_tools.policy.weights import stored_weights
from cropi_tools.runtime.errors import CropiError


def replace_weights(llm: Any, model: Any) -> None:
    """Copy the parameters of a transformers model into a vLLM `LLM` of the same architecture in this process. No request may be running."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stored_weights(model)})
    llm.apply_model(_prepare_tied)
    forget_prefixes(llm)


def _prepare_tied(model: Any) -> None:
    """Prepare layers again that share their weight with another, such as a tied head.

    Reloading prepares the layer under whose name the weight came, and no other; on a CPU the head multiplies with a packed copy made when it was
    prepared, which would stay the old one.
    """
    sharing: dict[int, list[Any]] = {}
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if weight is not None and hasattr(layer, "quant_method"):
            sharing.setdefault(id(weight), []).append(layer)
    for layers in sharing.values():
        for layer in layers if len(layers) > 1 else []:
            layer.quant_method.process_weights_after_loading(layer)


def forget_prefixes(llm: Any) -> None:
    """Empty the prefix cache."""
    if not llm.reset_prefix_cache():
        raise CropiError("vLLM could not empty its prefix cache after new weights: requests are still running")
