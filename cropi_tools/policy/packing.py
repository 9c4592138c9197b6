"""Padding-free packing: prompts and their responses one token after another in a single row, each prompt's tokens once for all its responses.

    p p p  a a a a  b b  c c c | q q  d d  e e e e
    0 1 2  3 4 5 6  3 4  3 4 5 | 0 1  2 3  2 3 4 5      positions

The last token of a response predicts nothing and is left out. Everything that works token by token (embedding, projections, norms) runs on
this row, so padding costs nothing and a prompt is computed once, not once a response. Only attention must know who sees whom: a response
sees its prompt and itself. That is an attention function of our own, registered with transformers and switched on by `packed`; inside
it, and only there, responses are laid out as padded rows.

Not every model allows it: sliding windows, soft caps, sinks, recurrent layers. Families do these under many names, so `can_pack` tries it out
on a few tokens, once a model (`trials.py`). A model whose rotary frequencies follow the longest position of a pass is packed only as long
as all are short (`lengths.py`): `packs` says whether sequences of these lengths are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cropi_tools.policy.rotary_lengths import pass_lengths
from cropi_tools.policy.trials import MODEL_ERRORS, lowered_limits, rounding, trial_prompts
from cropi_tools.runtime.clock import starting

_NAME = "cropi_packed"
_HARMLESS = frozenset({"is_causal", "position_ids", "use_cache", "output_attentions", "cache_position"})
_SHORT = 1 << 14  # queries times keys of a row up to which a CPU attends faster by elementary operations
_packable: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_active: PackedBatch | None = None
_plain = False


class Unpackable(Exception):
    """The model's attention has something that an attention function of ours does not know."""


class PackedBatch(NamedTuple):
    """Prompts with their responses in one row of N tokens, and T response tokens in order.

    input_ids, positions [1, N]; predicting [T]: the place of the token before each response token, which predicts it; targets [T];
    lengths: tokens of each response; bounds, response_bounds: where each prompt's tokens start in the N, its response tokens in the T
    (one more than there are prompts).

    For attention: prefix_places [B, longest prompt], response_places [S, longest response] with zeros as padding; prompt_of [S];
    visible [S, 1, longest response, longest prompt + longest response] bool; origin [N]: where each token's output lies in the
    outputs of prompts and responses, one after the other.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]
    bounds: list[int]
    response_bounds: list[int]
    prefix_places: torch.Tensor
    response_places: torch.Tensor
    prompt_of: torch.Tensor
    visible: torch.Tensor
    origin: torch.Tensor

    def forward(self, module: Any) -> Any:
        """The output of the model, or of its body, on the row; inside `packed` only."""
        return module(input_ids=self.input_ids, position_ids=self.positions, use_cache=False)

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Of states [1, N, width] those that predict response tokens, [T, width]."""
        return states[0].index_select(0, self.predicting)


def packed_batch(prompts: Sequence[tuple[list[int], Sequence[list[int]]]], device: torch.device | str) -> PackedBatch:
    """Lay out prompts, each token ids and its responses. A prompt has a token and a response; responses may be empty.

    N tokens: of every prompt, and of every response but its last.
    """
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    bounds, response_bounds = [0], [0]
    starts: list[tuple[int, int]] = []  # of each response: its prompt, its first place
    for number, (prompt, responses) in enumerate(prompts):
        start = len(ids)
        ids += prompt
        positions += range(len(prompt))
        for response in responses:
            starts.append((number, len(ids)))
            if response:
                predicting += [start + len(prompt) - 1, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response[:-1]
            positions += range(len(prompt), len(prompt) + len(response[:-1]))
            targets += response
            lengths.append(len(response))
        bounds.append(len(ids))
        response_bounds.append(len(targets))
    prefixes = torch.tensor([len(prompt) for prompt, _ in prompts])
    tokens = torch.tensor(lengths).sub(1).clamp(min=0)  # those in the row
    places = torch.tensor([place for _, place in starts])
    prompt_of = torch.tensor([number for number, _ in starts])
    wide, long = int(prefixes.max()), max(int(tokens.max()), 1)
    in_prompt = torch.arange(wide) < prefixes[:, None]
    in_response = torch.arange(long) < tokens[:, None]
    prefix_places = torch.where(in_prompt, torch.tensor(bounds[:-1])[:, None] + torch.arange(wide), 0)
    response_places = torch.where(in_response, places[:, None] + torch.arange(long), 0)
    causal = torch.ones(long, long, dtype=torch.bool).tril()
    visible = torch.cat([in_prompt[prompt_of][:, None].expand(-1, long, -1), causal.expand(len(starts), -1, -1)], 2)
    origin = torch.empty(len(ids), dtype=torch.long)
    origin[prefix_places[in_prompt]] = in_prompt.flatten().nonzero()[:, 0]
    origin[response_places[in_response]] = in_prompt.numel() + in_response.flatten().nonzero()[:, 0]
    row = torch.tensor([ids, positions], device=device)
    return PackedBatch(
        row[0, None],
        row[1, None],
        torch.tensor(predicting, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        lengths,
        bounds,
        response_bounds,
        *(tensor.to(device) for tensor in (prefix_places, response_places, prompt_of, visible[:, None], origin)),
    )


@contextlib.contextmanager
def packed(model: Any, batch: PackedBatch, plain: bool = False) -> Iterator[None]:
    """Let the model attend as `batch` is laid out: around its forward pass, and around the backward pass where activations are recomputed.

    plain: attention in elementary operations, which forward-mode differentiation knows; slower otherwise.
    """
    global _active, _plain
    before = _active, _plain
    _active, _plain = batch, plain
    try:
        with attending_by(model, _NAME):
            yield
    finally:
        _active, _plain = before


def attending(model: Any, batch: Any) -> contextlib.AbstractContextManager[None]:
    """Around the forward and the backward pass of a batch, packed or padded."""
    return packed(model, batch) if isinstance(batch, PackedBatch) else contextlib.nullcontext()


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Inside `packed`: let the model attend as it usually does."""
    with attending_by(
        model, "eager" if model.config._attn_implementation == _NAME else model.config._attn_implementation
    ):
        yield


@contextlib.contextmanager
def attending_by(model: Any, implementation: str) -> Iterator[None]:
    """Let the model attend by a function registered with transformers, until the end of the block."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before


def can_pack(model: Any) -> bool:
    """Whether the model gives the same logits on the packed row as on a row for every response, as long as all are short; tried out once."""
    if model not in _packable:
        with torch.no_grad(), lowered_limits(model):
            _packable[model] = _probe(model)
    return _packable[model]


def packs(models: Sequence[Any], lengths: Iterable[int]) -> bool:
    """Whether each of the models may compute sequences of these lengths, prompt and response, in one packed row."""
    rule = pass_lengths(*models)
    return all(map(can_pack, models)) and all(map(rule.short, lengths))


@starting()
def _probe(model: Any) -> bool:
    prompts = trial_prompts(model.get_input_embeddings().num_embeddings)
    device = next(model.parameters()).device
    pairs = [(prompt, response) for prompt, responses in prompts for response in responses if response]
    if not all(pass_lengths(model).short(len(prompt) + len(response)) for prompt, response in pairs):
        return False
    batch = packed_batch(prompts, device)
    try:
        with packed(model, batch):
            found = batch.select(batch.forward(model).logits)
        rows = [
            model(input_ids=torch.tensor([prompt + response], device=device), use_cache=False).logits[
                0, len(prompt) - 1 : -1
            ]
            for prompt, response in pairs
        ]
    except (Unpackable, *MODEL_ERRORS):
        return False
    return bool((found - torch.cat(rows)).abs().max() <= rounding(found.dtype))


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the active packed batch: query [1, heads, N, size], key and value [1, key heads, N, size] -> [1, N, heads, size]."""
    batch = _active
    refuse_unknown(dropout, others)
    if batch is None or query.shape[0] != 1 or query.shape[2] != batch.input_ids.shape[1]:
        raise Unpackable
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [N, heads, size]

    def laid_out(places: torch.Tensor) -> Iterator[torch.Tensor]:
        """Query, key and value as [rows, heads, longest, size]."""
        for states in (query, key, value):
            yield states.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)

    prefix_query, prefix_key, prefix_value = laid_out(batch.prefix_places)
    own_query, own_key, own_value = laid_out(batch.response_places)
    if len(batch.bounds) == 2:  # one prompt: nothing to look up
        shared = (states.expand(len(own_query), -1, -1, -1) for states in (prefix_key, prefix_value))
    else:
        shared = (states.index_select(0, batch.prompt_of) for states in (prefix_key, prefix_value))
    all_key, all_value = (torch.cat(pair, 2) for pair in zip(shared, (own_key, own_value), strict=True))
    wide = prefix_query.shape[2]
    causal = torch.ones(1, 1, wide, wide, dtype=torch.bool, device=query.device).tril()
    outputs = (
        attend(prefix_query, prefix_key, prefix_value, causal, scaling),
        attend(own_query, all_key, all_value, batch.visible, scaling),
    )
    flat = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
    return flat.index_select(0, batch.origin)[None], None


def refuse_unknown(dropout: float, others: dict[str, Any]) -> None:
    """Unpackable where a model gives its attention function something that plain causal attention does not have."""
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if dropout or unknown:
        raise Unpackable(", ".join(unknown))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attention of query [rows, heads, longest, size] to key and value [rows, key heads, keys, size] where `visible`, like the query."""
    rows, heads, longest, size = query.shape
    groups = heads // key.shape[1]
    short = query.device.type == "cpu" and longest * key.shape[2] <= _SHORT
    if short and query.dtype.itemsize < 4:
        # as exact as the fused kernel, which keeps its scores in float32 too and is slower in the backward pass
        return attend(query.float(), key.float(), value.float(), visible, scale).to(query.dtype)
    if not (_plain or short):
        key, value = (states.repeat_interleave(groups, 1) if groups > 1 else states for states in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    factor = size**-0.5 if scale is None else scale
    # the query heads that share a key head become one, so that keys need no copies
    together = (query * factor).reshape(rows, key.shape[1], groups * longest, size)
    hidden = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill_(~visible, float("-inf"))
    scores = (together @ key.transpose(2, 3)).unflatten(2, (groups, longest)) + hidden[:, :, None]
    return (torch.softmax(scores, -1).flatten(2, 3) @ value).view(query.shape)


AttentionInterface.register(_NAME, _attention)
