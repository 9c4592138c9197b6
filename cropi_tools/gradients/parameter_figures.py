"""Of a parameter's gradients, prompt by prompt: the squared norm and the inner product with each mean, nothing else kept.

A prompt's gradient of a linear layer is the sum of d_t x_t^T over its tokens, x_t the input and d_t the gradient of the output. Two forms:

    formed   the gradient itself, a block at a time, and from each block its squares and its products with the means' blocks
    ghost    product: the sum of d_t . (V x_t);  squared norm: the sum over s, t of (x_s . x_t)(d_s . d_t), and no gradient

The first costs one more product of the layer's size, however many means there are, and the way of each gradient through a cache; the second
one product a mean, and the square of a prompt's tokens. `_forms` counts which is less. Of embeddings only rows whose ids occur are formed,
of norms and biases every prompt's gradient as it is.

All figures are float64 [prompts, 1 + means]: the square, then the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from cropi_tools.gradients.accumulator import block_products
from cropi_tools.gradients.per_sample_rules import (
    Rows,
    Rule,
    embedding,
    linear,
    row_gradients,
    transposed_linear,
)
from cropi_tools.policy.logprobs import at_least_float32

_BLOCK = 1 << 20  # coordinates of one gradient that are formed at once on a CPU, whose caches hold them
_TOGETHER = 1 << 18  # coordinates of several gradients
_DEVICE_BLOCK = 1 << 26
_PASSING = 24  # multiplications in whose time a coordinate is written, and read once more for each figure; on a CPU
_DEVICE_PASSING = 400
_CALLS = 1 << 20  # multiplications in whose time the operations of one prompt are called
_COPYING = 64  # and one number is copied to where they are called once for all prompts
Means = Sequence[torch.Tensor | None]


def figures_of(
    rule: Rule,
    parameter: torch.Tensor,
    module: Any,
    states: torch.Tensor,
    gradient: torch.Tensor,
    rows: Rows,
    means: Means,
) -> torch.Tensor:
    """Figures of a module's parameter from the module's input and the gradient of its output, both over the tokens of `rows`.

    means: each mean's part of this parameter, flat float32; None where it has none.
    """
    if rule is embedding:
        return _of_embedding(module, states, gradient, rows, means)
    if rule is linear or rule is transposed_linear:
        left, right = _sides(rule, states, gradient, rows)
        return _of_linear(left, right, rows, means)
    target = parameter.new_empty((rows.prompts, *parameter.shape))
    rule(module, states.to(parameter.dtype), gradient.to(parameter.dtype), rows, target, True)
    return dense_figures(target.flatten(1), means)


def _sides(rule: Rule, states: torch.Tensor, gradient: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors [tokens, height] and [tokens, width] whose product over a prompt's tokens is its gradient [height, width].

    In the number format of the gradient: that of the layer's own products, where autocast has made it a narrower one.
    """
    inner = states.reshape(rows.tokens, -1).to(gradient.dtype)
    outer = gradient.reshape(rows.tokens, -1)
    return (outer, inner) if rule is linear else (inner, outer)


def dense_figures(gradients: torch.Tensor, means: Means) -> torch.Tensor:
    """Figures of gradients [prompts, size]."""
    if len(gradients) == 1:  # read once, and nothing written
        return torch.stack(list(block_products(gradients[0], means))).double().sum(0, keepdim=True)
    wide = at_least_float32(gradients)
    columns = [(wide * wide).sum(1)]
    for mean in means:
        columns.append(wide.new_zeros(len(wide)) if mean is None else torch.mv(wide, mean.to(wide.dtype)))
    return torch.stack(columns, 1).double()


def crossed(left: torch.Tensor, states: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The product of one prompt's gradients of a tied weight, as output embedding and as input embedding; float64.

    left [T, tokens]: the gradient of its response tokens' logits at the ids of all its tokens. states [T, width]: what the output embedding
    took. gradient [tokens, width]: of what the input embedding gave.
    """
    return (at_least_float32(left) * at_least_float32(states @ gradient.T.to(states.dtype))).sum().double()


def _of_embedding(module: Any, ids: torch.Tensor, gradient: torch.Tensor, rows: Rows, means: Means) -> torch.Tensor:
    each = at_least_float32(row_gradients(module, ids, gradient))
    places, of_token = (rows.prompt_of * module.num_embeddings + ids.reshape(-1)).unique(return_inverse=True)
    sums = each.new_zeros((len(places), each.shape[1])).index_add_(0, of_token, each)
    columns = [sums.square().sum(1)]
    for mean in means:
        if mean is None:
            columns.append(torch.zeros_like(columns[0]))
        else:
            chosen = mean.view(-1, sums.shape[1]).index_select(0, places % module.num_embeddings)
            columns.append((sums * chosen.to(sums.dtype)).sum(1))
    found = sums.new_zeros((rows.prompts, len(columns)), dtype=torch.float64)
    return found.index_add_(0, places // module.num_embeddings, torch.stack(columns, 1).double())


def _of_linear(left: torch.Tensor, right: torch.Tensor, rows: Rows, means: Means) -> torch.Tensor:
    if _forms(left, right, rows, len(means)):
        return _formed(left, right, rows, means)
    return _ghost(left, right, rows, means)


def _forms(left: torch.Tensor, right: torch.Tensor, rows: Rows, means: int) -> bool:
    """Whether to form the gradients: multiplications of either form, and the way of what is formed."""
    height, width = left.shape[1], right.shape[1]
    squares = sum((end - start) ** 2 for start, end in pairwise(rows.bounds))
    passing = _PASSING if left.device.type == "cpu" else _DEVICE_PASSING
    formed = height * width * (rows.tokens + rows.prompts * (1 + means) * passing)
    return formed <= means * height * width * rows.tokens + squares * (height + width)


def _formed(left: torch.Tensor, right: torch.Tensor, rows: Rows, means: Means) -> torch.Tensor:
    height, width = left.shape[1], right.shape[1]
    block, several = (_BLOCK, _TOGETHER) if left.device.type == "cpu" else (_DEVICE_BLOCK, _DEVICE_BLOCK)
    found = left.new_zeros((rows.prompts, 1 + len(means)), dtype=torch.float64)
    tall = min(height, max(1, block // width))
    together = min(rows.prompts, max(1, several // (tall * width)))
    memory = left.new_empty(together * tall * width)
    some = list(rows.parts(together))
    for top in range(0, height, tall):  # a block of the means serves all prompts before the next one is read
        lines = slice(top, min(top + tall, height))
        size = (lines.stop - top) * width
        parts = [None if mean is None else mean[top * width : top * width + size] for mean in means]
        for prompts, tokens, own in some:
            target = memory[: own.prompts * size].view(own.prompts, lines.stop - top, width)
            own.products(left[tokens, lines], right[tokens], target, True)
            found[prompts] += dense_figures(target.flatten(1), parts)
    return found


def _ghost(left: torch.Tensor, right: torch.Tensor, rows: Rows, means: Means) -> torch.Tensor:
    found = left.new_zeros((rows.prompts, 1 + len(means)), dtype=torch.float64)
    found[:, 0] = _ghost_squares(at_least_float32(left), at_least_float32(right), rows)
    for column, mean in enumerate(means, 1):
        if mean is not None:
            weight = mean.view(left.shape[1], right.shape[1]).to(right.dtype)
            each = torch.mul(at_least_float32(left), at_least_float32(right @ weight.T)).sum(1)
            found[:, column].index_add_(0, rows.prompt_of, each.double())
    return found


def _ghost_squares(left: torch.Tensor, right: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The squared norms, in float32 products and float64 sums; what rounding leaves below 0 is 0."""
    sizes = [end - start for start, end in pairwise(rows.bounds)]
    more = rows.prompts * max(sizes) * (max(sizes) + _COPYING) - sum(size**2 for size in sizes)
    if more * (left.shape[1] + right.shape[1]) <= rows.prompts * _CALLS:
        places, inside = rows.table
        first, second = (
            states.index_select(0, places.flatten()).unflatten(0, places.shape) for states in (left, right)
        )
        first *= inside[:, :, None]
        found = (first @ first.mT).mul_(second @ second.mT).sum((1, 2), dtype=torch.float64)
    else:
        each = []
        for first, second in zip(left.split(sizes), right.split(sizes), strict=True):
            each.append((first @ first.T).mul_(second @ second.T).sum(dtype=torch.float64))
        found = torch.stack(each)
    return found.clamp_(min=0)
