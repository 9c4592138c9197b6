"""A decoding loop of ours, for models of plain full attention, where it is much faster than the library's `generate`.

A prompt is computed once for all its samples, and what all prompts begin with, as worked examples, once for all prompts. Rows that are
finished are closed up or refilled from the requests that wait; a row is one response, and no row waits for another. What a row is answered
depends on nothing else, beyond float rounding: it has numbers of its own (`next_token.py`) and sees its prompt and itself
(`decoding_attention.py`). The model is called as anybody calls it; which models allow it is tried out, not looked up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from cropi_tools import runtime
from cropi_tools.engines.decoding_attention import KeyValueStore, PromptPass, ResponsePass, Seating, decoding, logits_of
from cropi_tools.engines.next_token import choose, uniforms
from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.engines.trial import SAMPLING, Decoded, trial_error
from cropi_tools.policy.logprobs import token_limited
from cropi_tools.policy.trials import MODEL_ERRORS, lowered_limits, rounding
from cropi_tools.runtime.clock import starting

PROMPT_TOKENS = 1 << 14  # of prompts computed together, padding included
SHARED_TOKENS = 16  # that all prompts begin with, from which on they are computed once
COPY_BYTES = 4 << 30  # of a copy of the model in float32
_IDLE = 16  # rows are closed up once one in so many is finished
_allowed: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def decode(
    model: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    end_token_ids: Sequence[int],
    rows: int,
    least_shared: int = SHARED_TOKENS,
) -> Decoded:
    """Sample all requests, at most `rows` at once. The model must be one that `can_decode`.

    Requests of the same prompt that come one after another share its computation; all of them share that of the tokens they all begin with,
    if these are at least `least_shared`.
    """
    with decoding(model):
        loop = _Loop(model, requests, sampling, end_token_ids, rows, least_shared)
        loop.run()
    return Decoded(loop.tokens[:, :-1], loop.values[:, :-1])


def can_decode(model: Any) -> bool:
    """Whether the loop is of use and its log-probabilities are those of the model's own forward pass, as long as prompts and responses
    together are short (`policy/rotary_lengths.py`); tried out on a few tokens, once a model.

    On CPUs in float32 and bfloat16 only: nowhere else has the loop been measured against `generate`. Rounding in bfloat16 hides what the loop
    may get wrong, so a copy in float32 is tried out too; a model too large for that is left to `generate`.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16):
        return False
    if model not in _allowed:
        _allowed[model] = _agrees(model) and (parameter.dtype == torch.float32 or _agrees_in_float32(model))
    return _allowed[model]


def _agrees(model: Any) -> bool:
    """Whether the loop's log-probabilities are the model's own, in its number format."""
    try:
        with lowered_limits(model):
            return trial_error(model, partial(_trial, model), True) <= rounding(next(model.parameters()).dtype)
    except MODEL_ERRORS:  # some model cannot do with limits as low as that
        return False


@starting()
def _agrees_in_float32(model: Any) -> bool:
    """The same of a copy in float32, where it is small enough to be made."""
    if sum(parameter.numel() for parameter in model.parameters()) * 4 > COPY_BYTES:
        return False
    return _agrees(copy.deepcopy(model).float())


def _trial(model: Any, requests: Sequence[Request]) -> Decoded:
    # fewer rows than requests: refilling is part of the trial
    return decode(model, requests, SAMPLING, [], len(requests) - 1, least_shared=1)


class _Loop:
    """Rows 0 to R - 1 are the responses in hand. What is known of each stands on the host, its keys and values on the device."""

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        sampling: Sampling,
        ends: Sequence[int],
        rows: int,
        least_shared: int,
    ) -> None:
        self._model, self._requests, self._temperature = model, requests, sampling.temperature
        self._limit, self._most = sampling.max_tokens, rows
        self._device = next(model.parameters()).device
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=self._device)
        self._seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        shape = len(requests), self._limit + 1  # the last column takes what finished rows still draw
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self._device)
        self.values = torch.zeros(shape, device=self._device)
        self._prompts = KeyValueStore(max(len(request.prompt_token_ids) for request in requests))
        self._responses = KeyValueStore(self._limit)
        self._started = 0  # requests taken so far
        # of each row: its request, tokens drawn, the place of its prompt, whether it is finished
        self._rows = np.zeros((4, 0), dtype=np.int64)
        self._last = torch.zeros(0, dtype=torch.long, device=self._device)  # the token each row drew last
        self._lengths = np.zeros(0, dtype=np.int64)  # of the prompt at each place
        self._open: tuple[int, torch.Tensor] | None = None  # the place and logits of a prompt the next request shares
        self._seating: Seating | None = None
        shared = common_start([request.prompt_token_ids for request in requests])
        self._shared = 0  # tokens that all prompts begin with; place 0 keeps them alone
        if shared >= least_shared:
            self._read([requests[0].prompt_token_ids[:shared]])
            self._shared = shared

    def run(self) -> None:
        """Until every request has its tokens."""
        while self._rows.shape[1] or self._started < len(self._requests):
            if self._rows[3].sum() * _IDLE >= self._rows.shape[1]:
                self._close_up()
                self._refill()
            else:
                self._draw()

    def _close_up(self) -> None:
        """Give up finished rows, and prompts that nobody needs any more."""
        sources, targets, count = _moves(self._rows[3] == 0)
        self._rows[:, targets] = self._rows[:, sources]
        self._rows = self._rows[:, :count]
        self._last[targets] = self._last[sources]
        self._last = self._last[:count]
        self._responses.move(sources, targets)
        needed = np.bincount(self._rows[2], minlength=len(self._lengths)) > 0
        if self._open:
            needed[self._open[0]] = True
        if self._shared:
            needed[0] = True
        sources, targets, count = _moves(needed)
        renamed = np.arange(len(needed))
        renamed[sources] = targets
        self._rows[2] = renamed[self._rows[2]]
        self._lengths[targets] = self._lengths[sources]
        self._lengths = self._lengths[:count]
        if self._open:
            self._open = int(renamed[self._open[0]]), self._open[1]
        self._prompts.move(sources, targets)

    def _refill(self) -> None:
        """Take as many requests as there is room for, compute their prompts and draw their first tokens."""
        first = self._started
        self._started = min(len(self._requests), first + self._most - self._rows.shape[1])
        if self._started > first:
            places, logits = self._first_logits(range(first, self._started))
            request = np.arange(first, self._started)
            numbers = torch.from_numpy(uniforms(self._seeds[request], 0)).to(self._device)
            chosen, values = choose(logits, numbers, self._temperature)
            self.tokens[first : self._started, 0] = chosen
            self.values[first : self._started, 0] = values
            runtime.count_tokens(len(chosen))
            done = torch.isin(chosen, self._ends).cpu().numpy() | (self._limit == 1)
            self._rows = np.hstack([self._rows, [request, np.ones_like(request), places, done]])
            self._last = torch.cat([self._last, chosen])
        if self._rows.shape[1]:
            self._seating = Seating.of(
                self._rows[2], self._lengths, self._prompts.key_heads, self._model.dtype, self._device
            )

    def _first_logits(self, numbers: range) -> tuple[list[int], torch.Tensor]:
        """The places of these requests' prompts, and the logits [requests, vocabulary] of their first tokens."""
        fresh: list[list[int]] = []
        places: list[int] = []
        known = len(self._lengths)
        for number in numbers:
            if not self._repeats(number):
                fresh.append(self._requests[number].prompt_token_ids)
                places.append(known + len(fresh) - 1)
            elif places:
                places.append(places[-1])
            else:
                assert self._open is not None
                places.append(self._open[0])
        logits = self._read(fresh)
        if self._open:
            logits.append(self._open[1])  # its place is below `known`: the last of the list, as index -1
        of_requests = torch.stack([logits[max(place - known, -1)] for place in places])
        more = numbers.stop < len(self._requests) and self._repeats(numbers.stop)
        self._open = (places[-1], of_requests[-1].clone()) if more else None
        return places, of_requests

    def _repeats(self, number: int) -> bool:
        """Whether a request has the prompt of the one before it."""
        ids = self._requests[number].prompt_token_ids
        return number > 0 and ids == self._requests[number - 1].prompt_token_ids

    def _read(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """Keep prompts at the next places of the store; the logits [vocabulary] after each."""
        logits: list[torch.Tensor] = []
        # batches are of whole prompts, since attention to the shared tokens takes memory too
        for some in token_limited([(ids, []) for ids in prompts], PROMPT_TOKENS):
            part = [prompts[number][self._shared :] for number in some]
            keep = torch.arange(len(part)) + len(self._lengths)
            self._lengths = np.append(self._lengths, [self._shared + len(ids) for ids in part])
            self._prompts.reserve(len(self._lengths), self._shared + max(map(len, part)))
            now, ids, positions = PromptPass.of(self._prompts, keep, part, self._shared, self._device)
            last = torch.from_numpy(np.cumsum([len(ids) for ids in part]) - 1)
            logits += logits_of(self._model, now, ids, positions, last.to(self._device))
        return logits

    def _draw(self) -> None:
        """The next token of every row, finished or not."""
        request, count, prompt, done = self._rows
        numbers = torch.from_numpy(uniforms(self._seeds[request], count)).to(self._device)
        before = self._lengths[prompt] + np.minimum(count, self._limit - 1) - 1
        index = torch.from_numpy(np.stack([request, count, before])).to(self._device)
        longest = int(count.max())
        self._responses.reserve(len(request), longest)
        assert self._seating is not None
        now = ResponsePass.at(self._prompts, self._responses, self._seating, index[1] - 1, longest)
        self._last, values = choose(logits_of(self._model, now, self._last, index[2]), numbers, self._temperature)
        self.tokens[index[0], index[1]] = self._last
        self.values[index[0], index[1]] = values
        runtime.count_tokens(int((done == 0).sum()))
        count += count < self._limit
        done |= torch.isin(self._last, self._ends).cpu().numpy() | (count == self._limit)


def common_start(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; 0 where there is one prompt alone. A prompt's last token is its own, whose logits are wanted."""
    first, last = min(prompts), max(prompts)  # all others lie between
    if first == last:
        return 0
    alike = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return min(alike, min(map(len, prompts)) - 1)


def _moves(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """How to have the wanted places first, few of them moved: from where, to where, and how many are wanted."""
    count = int(wanted.sum())
    return count + np.flatnonzero(wanted[count:]), np.flatnonzero(~wanted[:count]), count
