"""Whether a policy with its adapters merged is the policy with its adapters beside it, tried out on a few tokens.

A merge that leaves something out raises no error, and the policy that is written, or sampled from, is another one than was trained. So the
very function that merges is held against the adapted policy: once with large random adapters, before anything is trained, and
again with the trained ones whenever merged weights leave the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from cropi_tools.policy.logprobs import response_logprobs, sequence_batch
from cropi_tools.policy.weights import ADAPTER_NAME, FACTORS, adapted_layers, adapters_off, merge_targets, merged
from cropi_tools.runtime.errors import CropiError, InputError, first_line

TOKENS = 32  # of the probe
SIZE = 0.3  # of the random adapters: their part of a layer's weight, in norm
STRUCTURE_LIMIT = 0.01  # of what the random adapters move; rounding is below 1e-4, a kind of layer left out above .1
FLOAT32_LIMIT = 1e-3  # |difference| of a log-probability; rounding is below 1e-4
BFLOAT16_LIMIT = 0.05


@torch.no_grad()
def check_structure(model: Any, folder: str, before: torch.Tensor, seed: int) -> None:
    """With random adapters in place of the fresh ones, which are put back: merged, the policy is the same.

    before: `probe` of the model when it had no adapters. InputError: the adapters change the function although they are zero, a layer with an
    adapter has no part in it, or merged and adapted policy differ.
    """
    remedy = "train all weights: leave --lora out"
    fresh: dict[Any, torch.Tensor] = {}
    try:
        same = _difference(probe(model), before)
        fresh = _randomize(model, seed)
        adapted = probe(model)
        moved, off = _difference(adapted, before), _difference(_merged_probe(model, None), adapted)
    except CropiError as error:
        raise InputError(f"{folder}: {error}; {remedy}") from None
    except Exception as error:  # of a model that peft has changed to what its family does not expect
        raise InputError(
            f"{folder}: {type(model).__name__} does not compute with peft's adapters ({first_line(error)}); {remedy}"
        ) from None
    finally:
        for factor, value in fresh.items():
            factor.copy_(value)
    if not same <= FLOAT32_LIMIT:
        raise InputError(f"{folder}: adapters of zeros change what {type(model).__name__} computes; {remedy}")
    if not off <= STRUCTURE_LIMIT * moved:
        raise InputError(
            f"{folder}: the adapters of {type(model).__name__} do not merge into its weights (log-probabilities differ by {off:.2g} of "
            f"{moved:.2g} that they moved); {remedy}"
        )


def check_merge(model: Any, weights: Mapping[str, torch.Tensor] | None = None, bfloat16: bool = False) -> None:
    """CropiError: with its adapters merged the policy computes something else than with them beside it. Collective where it is shared.

    weights: the merged weights as they are to be written; None, or a process that has none: those that `checkpoint_weights` gives.
    bfloat16: whether products are.
    """
    with torch.no_grad():
        off = _difference(_merged_probe(model, weights), probe(model))
    limit = BFLOAT16_LIMIT if bfloat16 else FLOAT32_LIMIT
    if not off <= limit:
        raise CropiError(
            f"merged into its weights the adapters make another policy: log-probabilities differ by {off:.2g} (limit {limit:.2g})"
        )


@torch.no_grad()
def probe(model: Any) -> torch.Tensor:
    """Log-probabilities [TOKENS - 1] of a fixed sequence of tokens from all over the vocabulary."""
    size = model.get_input_embeddings().num_embeddings
    ids = [(7919 * place + place * place) % size for place in range(TOKENS)]
    found, _ = response_logprobs(model, sequence_batch([(ids[:1], ids[1:])], next(model.parameters()).device))
    return found


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The median |difference|: rounding may send a token to another expert, and change that token and some after it."""
    return float((one - other).abs().median())


def _randomize(model: Any, seed: int) -> dict[Any, torch.Tensor]:
    """Give the adapters random values of a noticeable size; returns what they were."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for layer in adapted_layers(model).values():
        first, second = (getattr(layer, factor)[ADAPTER_NAME].weight for factor in FACTORS)
        weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
        fresh[second] = second.clone()
        noise = torch.randn(second.shape, generator=generator).to(second)
        size = SIZE * weight.norm() / layer.scaling[ADAPTER_NAME]
        second.copy_(noise * (size * len(first) ** 0.5 / (noise.norm() * first.norm())))
    return fresh


def _merged_probe(model: Any, weights: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    with adapters_off(model), _merged_in_turn(model, weights or {}):
        return probe(model)


@contextmanager
def _merged_in_turn(model: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside the block each adapted module has merged weights while it computes, one module at a time: a second model need not fit.

    CropiError: a module did not compute in the block, so that something else of the model reads its weights.
    """
    modules: dict[Any, dict[str, tuple[str, Any]]] = {}
    for name, layer in merge_targets(model).items():
        modules.setdefault(layer.get_base_layer(), {})[name.rpartition(".")[2]] = name, layer
    kept: dict[Any, dict[str, Any]] = {}
    waiting = dict(modules)

    def put_in(module: Any, arguments: Any) -> None:
        kept[module] = {key: module._parameters[key] for key in modules[module]}
        for key, (name, layer) in modules[module].items():
            own = kept[module][key]
            found = weights[name].to(own) if name in weights else merged(layer, own.detach())
            module._parameters[key] = torch.nn.Parameter(found, requires_grad=False)
        waiting.pop(module, None)

    def take_out(module: Any, arguments: Any, result: Any) -> None:
        module._parameters.update(kept.pop(module))

    hooks = [module.register_forward_pre_hook(put_in) for module in modules]
    hooks += [module.register_forward_hook(take_out, always_call=True) for module in modules]
    try:
        yield
        for module in waiting:
            name = next(iter(modules[module].values()))[0]
            raise CropiError(f"{name} is read without its layer, so that an adapter beside that has no part in it")
    finally:
        for hook in hooks:
            hook.remove()
        for module, own in kept.items():
            module._parameters.update(own)
