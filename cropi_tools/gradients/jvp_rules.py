"""Derivatives along directions in the space of parameters, carried through a decoder's own forward pass.

The states of a packed row become a batch of 1 + D rows: row 0 the states themselves, row i their derivative along direction i. Whatever
the model does between its modules is linear in the states (residual sums, rotary positions, scales, reshaping) and so is right for all
rows as it stands. What is not linear, or has parameters, follows a rule here, with x the states, dx their derivative, dW that of W:

    Linear      y = W x + b             dy = W dx + dW x + db, and W multiplies all rows in one product
    Embedding   y = E[id]               dy = dE[id]
    RMS norm    y = w n, n = s x        dy = dw n + w (s dx - n mean(n s dx)), s = 1 / root mean square of x
    gated MLP   h = act(g) u            dh = act'(g) u dg + act(g) du
    attention   y = P v, P = softmax S  dy = dP v + P dv, dP = P (dS - sum(P dS))

Rules go by class and attribute names, so `forward_mode.py` tries them out against automatic differentiation before it trusts them. They
cost three matrix products a linear layer, as automatic forward mode does, and two more for each further direction, where that starts
anew; the operations are fewer and larger.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import embedding, linear
from transformers import AttentionInterface

from cropi_tools.policy.logprobs import CHUNK_ELEMENTS, at_least_float32
from cropi_tools.policy.packing import PackedBatch, attending_by

_NAME = "cropi_carried"
_SCORES = 1 << 24  # attention scores held at once

Tangents = Callable[[nn.Parameter], list[tuple[int, torch.Tensor]]]
"""Of a parameter: the rows of the directions in which it moves, counted from 1, and how, in its shape and number format."""


def carried_logprobs(
    model: Any, batch: PackedBatch, temperature: float, tangents: Tangents, directions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T] of the response tokens and their derivatives [directions, T], float32 or wider, without a graph.

    For a model that can be packed and whose logits are its output embedding applied to its last states.
    """
    rows = 1 + directions
    logprobs, derivatives = [], []
    with torch.no_grad(), _carrying(model, batch, tangents, rows):
        hidden = batch.forward(model.base_model).last_hidden_state.index_select(1, batch.predicting)
        head = model.get_output_embeddings()
        size = max(1, CHUNK_ELEMENTS // (rows * head.weight.shape[0]))
        for states, targets in zip(hidden.split(size, 1), batch.targets.split(size), strict=True):
            logits = at_least_float32(head(states))
            logits = logits / temperature if temperature != 1.0 else logits
            own, changes, chosen = logits[0], logits[1:], targets[:, None]
            table = torch.log_softmax(own, -1)
            logprobs.append(table.gather(-1, chosen)[:, 0])
            moved = changes.gather(-1, chosen.expand(directions, -1, -1))[..., 0]
            derivatives.append(moved - changes.mul_(table.exp_()).sum(-1))
    return torch.cat(logprobs), torch.cat(derivatives, 1)


@contextlib.contextmanager
def _carrying(model: Any, batch: PackedBatch, tangents: Tangents, rows: int) -> Iterator[None]:
    """Let the model's modules follow the rules, until the end of the block."""
    global _layout
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            rule = _rule_of(module)
            if rule is not None:
                stack.callback(module.__dict__.pop, "forward")
                module.forward = partial(rule, module, tangents, rows)
        stack.enter_context(attending_by(model, _NAME))
        _layout = _Layout(batch)
        try:
            yield
        finally:
            _layout = None


def _rule_of(module: Any) -> Callable[..., torch.Tensor] | None:
    if "forward" in module.__dict__:
        return None  # somebody else's replacement
    if type(module).forward is nn.Linear.forward:
        return _linear
    if type(module).forward is nn.Embedding.forward:
        return _embedding
    if type(module).__name__.endswith("RMSNorm"):
        return _norm
    if {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return _gated
    return None


def _linear(module: Any, tangents: Tangents, rows: int, states: torch.Tensor) -> torch.Tensor:
    found = linear(states, module.weight)
    own = states[0].reshape(-1, states.shape[-1])
    for row, tangent in tangents(module.weight):
        found[row].view(-1, found.shape[-1]).addmm_(own, tangent.T)
    if module.bias is not None:
        for row, shift in [(0, module.bias), *tangents(module.bias)]:
            found[row].add_(shift)
    return found


def _embedding(module: Any, tangents: Tangents, rows: int, ids: torch.Tensor) -> torch.Tensor:
    found = module.weight.new_zeros(rows, *ids.shape[1:], module.weight.shape[1])
    for row, table in [(0, module.weight), *tangents(module.weight)]:
        found[row] = embedding(ids[0], table)
    return found


def _norm(module: Any, tangents: Tangents, rows: int, states: torch.Tensor) -> torch.Tensor:
    wide = at_least_float32(states)
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    scaled = wide * (wide[0].square().mean(-1, keepdim=True) + epsilon).rsqrt()
    own, changes = scaled[0], scaled[1:]
    changes.addcmul_(own, (own * changes).mean(-1, keepdim=True), value=-1)
    found = scaled.to(states.dtype)
    moved = [(row, found[0] * tangent) for row, tangent in tangents(module.weight)]
    found *= module.weight
    for row, change in moved:
        found[row] += change
    return found


def _gated(module: Any, tangents: Tangents, rows: int, states: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(states), module.up_proj(states)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(module.act_fn(forward_ad.make_dual(gate[0], up[0])))
    active, slope = dual.primal, dual.tangent  # act(g), act'(g) u
    up[1:].mul_(active).addcmul_(gate[1:], slope)
    up[0].mul_(active)
    return module.down_proj(up)


class _Layout:
    """Where attention finds the tokens of a packed batch among states [N * heads]; of prompts first, then of responses.

    A matrix product takes the query heads of one key head, of one prompt or response, at once: query rows are ordered
    [prompt or response, key head, query head of it, token], key and value rows [prompt or response, key head, token].
    """

    def __init__(self, batch: PackedBatch) -> None:
        seen = torch.cat([batch.prefix_places[batch.prompt_of], batch.response_places], 1)
        self._places = ((batch.prefix_places, batch.prefix_places), (batch.response_places, seen))
        self._origin = batch.origin
        wide = batch.prefix_places.shape[1]
        causal = torch.ones(wide, wide, dtype=torch.bool, device=seen.device).tril()
        self.hidden = (~causal.expand(len(batch.prefix_places), 1, 1, wide, wide), ~batch.visible[:, :, None])
        self._indices: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def indices(self, heads: int, key_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of queries to gather from [N * heads], of keys and values from [N * key_heads], of outputs back into [N * heads]."""
        if (heads, key_heads) not in self._indices:
            every, key = (torch.arange(count, device=self._origin.device)[:, None] for count in (heads, key_heads))
            queries = torch.cat([(places[:, None] * heads + every).flatten() for places, _ in self._places])
            keys = torch.cat([(places[:, None] * key_heads + key).flatten() for _, places in self._places])
            back = torch.empty(len(self._origin), heads, dtype=torch.long, device=self._origin.device)
            start = 0
            for places, _ in self._places:
                count, longest = places.shape
                here = (self._origin >= start) & (self._origin < start + count * longest)
                row, token = (self._origin[here] - start) // longest, (self._origin[here] - start) % longest
                back[here] = start * heads + (row[:, None] * heads + every.T) * longest + token[:, None]
                start += count * longest
            self._indices[heads, key_heads] = queries, keys, back.flatten()
        return self._indices[heads, key_heads]


_layout: _Layout | None = None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with derivatives: query [1 + D, heads, N, size], key and value [1 + D, key heads, N, size] -> [1 + D, N, heads, size]."""
    assert _layout is not None
    rows, heads, tokens, size = query.shape
    groups, factor = heads // key.shape[1], size**-0.5 if scaling is None else scaling
    indices = _layout.indices(heads, key.shape[1])
    queries, keys, values = (
        at_least_float32(states.transpose(1, 2).reshape(rows, -1, size).index_select(1, index))
        for states, index in ((query, indices[0]), (key, indices[1]), (value, indices[1]))
    )
    found = torch.empty_like(queries)
    start, key_start, key_heads = 0, 0, key.shape[1]
    for hidden in _layout.hidden:
        length, seen = hidden.shape[-2:]
        for mask in hidden.split(max(1, _SCORES // (heads * length * seen))):
            count = len(mask) * key_heads
            stop, key_stop = start + count * groups * length, key_start + count * seen
            _attend(
                queries[:, start:stop].unflatten(1, (count, -1)),
                keys[:, key_start:key_stop].unflatten(1, (count, -1)),
                values[:, key_start:key_stop].unflatten(1, (count, -1)),
                mask,
                factor,
                found[:, start:stop].unflatten(1, (count, -1)),
            )
            start, key_start = stop, key_stop
    return found.index_select(1, indices[2]).view(rows, tokens, heads, size).to(query.dtype), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, factor: float, out: torch.Tensor
) -> None:
    """out [1 + D, n, l, size] of query [1 + D, n, l, size], key and value [1 + D, n, m, size]."""
    turned = key.transpose(-1, -2)
    scores = torch.bmm(query[0], turned[0]).mul_(factor)
    by_head = scores.view(len(hidden), len(scores) // len(hidden), -1, *hidden.shape[-2:])
    by_head.masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(scores, -1)
    torch.bmm(weights, value[0], out=out[0])
    for row in range(1, len(query)):
        change = torch.bmm(query[row], turned[0]).baddbmm_(query[0], turned[row], beta=factor, alpha=factor)
        change *= weights
        change.addcmul_(weights, change.sum(-1, keepdim=True), value=-1)
        torch.bmm(change, value[0], out=out[row])
        out[row].baddbmm_(weights, value[row])


AttentionInterface.register(_NAME, _attention)
