"""What the decoding loop keeps of the tokens already seen, and the attention that reads it.

As in `policy/packing.py`, a model gets one row of tokens and knows nothing of who sees whom; an attention function of ours, registered
with transformers, does. In a `PromptPass` the row holds prompts one after another, and their keys and values are kept, once a prompt; what
all prompts begin with is computed once and copied. In a `ResponsePass` it holds the last token of every response, which sees its prompt and
what came before in the response itself. A prompt is read for all its responses at once. Layers are told apart by the order in which they ask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import AttentionInterface

from cropi_tools.policy.packing import Unpackable, attend, attending_by, refuse_unknown

_NAME = "cropi_decoding"
_FIRST_LENGTH = 64  # tokens of a response that there is room for at first
_active: _Active | None = None


class KeyValueStore:
    """Keys and values of each layer, [places, key heads, length, size]; room is made as it is needed, up to `limit` tokens."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._places = self._length = 0

    @property
    def key_heads(self) -> int:
        """Of the first layer; a model whose layers differ, or that asks for no attention of ours, is Unpackable."""
        if len({keys.shape[1] for keys, _ in self._layers}) != 1:
            raise Unpackable
        return self._layers[0][0].shape[1]

    def reserve(self, places: int, length: int) -> None:
        """Have room for so many places of so many tokens; what is kept stays."""
        if places <= self._places and length <= self._length:
            return
        if length > self._length:
            self._length = min(max(length, 2 * self._length, _FIRST_LENGTH), self._limit)
        self._places = max(places, self._places)
        for number, old in enumerate(self._layers):
            self._layers[number] = self._empty(*old)
            for before, now in zip(old, self._layers[number], strict=True):
                now[: before.shape[0], :, : before.shape[2]] = before

    def layer(self, number: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of a layer; made like `key` and `value` [.., key heads, .., size] when the layer asks for the first time."""
        if number == len(self._layers):
            self._layers.append(self._empty(key, value))
        return self._layers[number]

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy what is kept at some places to others."""
        if not len(sources):
            return
        for pair in self._layers:
            for kept in pair:
                kept[torch.from_numpy(targets)] = kept[torch.from_numpy(sources)]

    def _empty(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # zeros: what is masked is multiplied by zero, which must not be infinite
        shapes = [(self._places, states.shape[1], self._length, states.shape[3]) for states in (key, value)]
        return key.new_zeros(shapes[0]), value.new_zeros(shapes[1])


class PromptPass(NamedTuple):
    """Prompts in one row of N tokens: `keep` [B] is each one's place in the store, `places` [B, longest] their tokens' places in the row with
    zeros as padding, `origin` [N] where in B x longest each token lies. Before each come the first `shared` tokens of place 0.
    """

    store: KeyValueStore
    keep: torch.Tensor
    places: torch.Tensor
    origin: torch.Tensor
    shared: int

    @classmethod
    def of(
        cls,
        store: KeyValueStore,
        keep: torch.Tensor,
        prompts: Sequence[list[int]],
        shared: int,
        device: torch.device,
    ) -> tuple[PromptPass, torch.Tensor, torch.Tensor]:
        """The pass that keeps prompts' keys and values at places `keep` [B], with its token ids [N] and positions [N].

        prompts: their tokens after the shared ones.
        """
        lengths = torch.tensor([len(ids) for ids in prompts])
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        origin = inside.flatten().nonzero()[:, 0]
        places = torch.zeros(inside.shape, dtype=torch.long)
        places[inside] = torch.arange(len(origin))
        row = torch.tensor([token for ids in prompts for token in ids], device=device)
        positions = (shared + origin % inside.shape[1]).to(device)
        return cls(store, keep.to(device), places.to(device), origin.to(device), shared), row, positions

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Of query [1, heads, N, size], key and value [1, key heads, N, size]: [1, N, heads, size]."""
        count, longest = self.places.shape
        query, key, value = (
            states[0].index_select(1, self.places.flatten()).unflatten(1, (count, longest)).transpose(0, 1)
            for states in (query, key, value)
        )
        end = self.shared + longest
        stores = self.store.layer(layer, key, value)
        for kept, states in zip(stores, (key, value), strict=True):
            if self.shared:
                kept[self.keep, :, : self.shared] = kept[:1, :, : self.shared]
            kept[self.keep, :, self.shared : end] = states
        if self.shared:
            key, value = (kept[self.keep, :, :end] for kept in stores)
        causal = torch.ones(1, 1, longest, end, dtype=torch.bool, device=query.device).tril(self.shared)
        output = attend(query, key, value, causal, scaling)
        return output.transpose(1, 2).flatten(0, 1).index_select(0, self.origin)[None]


class Seating(NamedTuple):
    """Which of R responses belong to which of P prompts, so that a prompt is read for all its responses together.

    A prompt has as many seats as the one with most responses. Rows and seats are told apart by key head as well: seats [P x key heads x
    seats], the row in R x key heads at each one, any where it is empty; seat_of [R x key heads], the seat of each row. hidden
    [P x key heads, 1, longest prompt]: 0 at the tokens of a prompt, minus infinity after them.
    """

    seats: torch.Tensor
    seat_of: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def of(
        cls, prompts: np.ndarray, lengths: np.ndarray, key_heads: int, kind: torch.dtype, device: torch.device
    ) -> Seating:
        """From each response's prompt [R] and each prompt's length [P]; kind: that of the scores `hidden` is added to."""
        order = np.argsort(prompts, kind="stable")
        counts = np.bincount(prompts, minlength=len(lengths))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - (np.cumsum(counts) - counts)[prompts[order]]
        heads, most = np.arange(key_heads), counts.max()
        seats = np.zeros((len(lengths), key_heads, most), dtype=np.int64)
        seats[prompts[:, None], heads, rank[:, None]] = np.arange(len(prompts))[:, None] * key_heads + heads
        seat_of = (prompts[:, None] * key_heads + heads) * most + rank[:, None]
        after = torch.from_numpy(np.repeat(np.arange(lengths.max()) >= lengths[:, None], key_heads, 0))[:, None]
        hidden = torch.zeros(after.shape, dtype=kind).masked_fill_(after, -torch.inf)
        return cls(
            torch.from_numpy(seats.ravel()).to(device), torch.from_numpy(seat_of.ravel()).to(device), hidden.to(device)
        )


class ResponsePass(NamedTuple):
    """One token of each of R responses, at `columns` [R] of its store, all below `longest`.

    hidden [R x key heads, 1, longest]: 0 at the columns a response sees, minus infinity after them; rows [R]: 0, 1, ...
    """

    prompts: KeyValueStore
    responses: KeyValueStore
    seating: Seating
    columns: torch.Tensor
    longest: int
    rows: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def at(
        cls, prompts: KeyValueStore, responses: KeyValueStore, seating: Seating, columns: torch.Tensor, longest: int
    ) -> ResponsePass:
        """The pass of tokens at these columns."""
        places = torch.arange(longest, device=columns.device)
        hidden = seating.hidden.new_zeros(len(columns), longest).masked_fill_(places > columns[:, None], -torch.inf)
        hidden = hidden.repeat_interleave(len(seating.seat_of) // len(columns), 0)[:, None]
        rows = torch.arange(len(columns), device=columns.device)
        return cls(prompts, responses, seating, columns, longest, rows, hidden)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Of query [1, heads, R, size], key and value [1, key heads, R, size]: [1, R, heads, size]."""
        _, heads, count, size = query.shape
        rows = (
            count * key.shape[1]
        )  # a row a key head; the query heads that share it are its queries, so that keys need no copies
        group = heads // key.shape[1]
        scale = size**-0.5 if scaling is None else scaling
        kept = self.responses.layer(layer, key, value)
        for store, states in zip(kept, (key, value), strict=True):
            store[self.rows, :, self.columns] = states[0].transpose(0, 1)
        own_key, own_value = (store[:count, :, : self.longest].flatten(0, 1) for store in kept)
        seats, seat_of, prompt_hidden = self.seating
        readers, _, wide = prompt_hidden.shape
        shared = self.prompts.layer(layer, key, value)
        prompt_key, prompt_value = (store.flatten(0, 1)[:readers, :wide] for store in shared)
        query = query[0].transpose(0, 1).reshape(rows, group, size)
        seated = query.index_select(0, seats).view(readers, -1, size)
        of_prompt = torch.baddbmm(prompt_hidden, seated, prompt_key.transpose(1, 2), alpha=scale)
        of_own = torch.baddbmm(self.hidden, query, own_key.transpose(1, 2), alpha=scale)
        scores = torch.cat([of_prompt.view(-1, group, wide).index_select(0, seat_of), of_own], 2)
        weights = torch.softmax(scores, 2)
        seated = weights[:, :, :wide].index_select(0, seats).view(readers, -1, wide)
        from_prompt = torch.bmm(seated, prompt_value).view(-1, group, value.shape[3]).index_select(0, seat_of)
        return torch.baddbmm(from_prompt, weights[:, :, wide:], own_value).view(1, count, heads, -1)


class _Pass(Protocol):
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor: ...


class _Active:
    """The pass in hand and the layers that have asked in it."""

    def __init__(self, now: _Pass) -> None:
        self.now, self.layer = now, 0


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Let the model attend by passes, until the end of the block."""
    global _active
    try:
        with attending_by(model, _NAME):
            yield
    finally:
        _active = None


def logits_of(
    model: Any, now: _Pass, input_ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | int = 0
) -> torch.Tensor:
    """The model's logits [tokens kept, vocabulary] of tokens [N] at positions [N]; keep: which of the tokens, all unless told."""
    global _active
    _active = _Active(now)
    return model(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep).logits[
        0
    ]


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
    """Attention of the pass in hand."""
    refuse_unknown(dropout, others)
    if _active is None or query.shape[0] != 1:
        raise Unpackable
    _active.layer += 1
    return _active.now.attend(_active.layer - 1, query, key, value, scaling), None


AttentionInterface.register(_NAME, _attention)
