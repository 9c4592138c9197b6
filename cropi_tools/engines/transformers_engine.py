"""The embedded default: sampling with a loop of ours (`decoding.py`) where it is much faster and allowed, else by the library's `generate`
(`generating.py`), the same tokens from the same numbers.

A model whose rotary frequencies follow the length of a pass (`policy/rotary_lengths.py`) is sampled in pieces. A token is drawn from the
distribution after a pass over what precedes it, whatever its neighbors: as long as the length stays in one regime from a cache, across a
switch from a fresh pass over all of it. A response's log-probabilities are those of one pass over prompt and response, as everywhere; where
these are not in one regime, they are computed when the response is complete, and are then not those its first tokens were drawn with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from cropi_tools import runtime
from cropi_tools.engines.decoding import can_decode, decode
from cropi_tools.engines.generating import (
    NEVER_ON,
    PASS_TOKENS,
    ROWS,
    SWITCHED_OFF,
    WITHOUT_CACHE,
    Row,
    sample_rows,
    way_to_sample,
)
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling, scores_not_finite
from cropi_tools.engines.trial import Decoded
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import separate_logprobs
from cropi_tools.policy.rotary_lengths import pass_lengths
from cropi_tools.policy.weights import checkpoint_weights


class TransformersEngine(Engine):
    """Samples from a loaded policy, always from the model's present weights. Groups are decoded one after another.

    loop: whether the loop of ours may sample where the model allows it; part of no result beyond float rounding.
    """

    def __init__(self, policy: Policy, loop: bool = True) -> None:
        self._policy, self._loop = policy, loop
        self._told = False

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        """Each group by itself, ROWS responses at a time in the order given."""
        for requests in groups:
            yield self._sample(requests, sampling) if requests else []

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """As the protocol says. What is never used stands there as switched off."""
        model = self._policy.model
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "decoder": "loop" if self._by_loop() else way_to_sample(model, self._policy.folder).name,
            **pass_lengths(model).facts(),
            **sampling._asdict(),
            **NEVER_ON,
            **SWITCHED_OFF,
            "end_token_ids": self._policy.end_token_ids,
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    def _by_loop(self) -> bool:
        return self._loop and can_decode(self._policy.model)

    def _sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        short = pass_lengths(self._policy.model).short
        if all(short(len(request.prompt_token_ids) + sampling.max_tokens) for request in requests):
            return list(self._completions(self._decode(requests, sampling), sampling))
        return self._in_pieces(requests, sampling)

    def _decode(self, requests: Sequence[Request], sampling: Sampling) -> Decoded:
        """Tokens of requests that stay short."""
        if self._by_loop():
            return decode(self._policy.model, requests, sampling, self._policy.end_token_ids, ROWS)
        return self._rows([Row(*request) for request in requests], sampling)

    def _rows(self, rows: Sequence[Row], sampling: Sampling, cached: bool = True) -> Decoded:
        model = self._policy.model
        way = way_to_sample(model, self._policy.folder) if cached else WITHOUT_CACHE
        return sample_rows(model, way, rows, sampling.max_tokens, sampling.temperature, self._policy.end_token_ids)

    def _in_pieces(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Completions of requests some of which leave the first regime of lengths."""
        rule = pass_lengths(self._policy.model)
        found = [Completion([], [], "length") for _ in requests]
        going = list(range(len(requests)))
        while going:
            regimes: dict[tuple[int, int], dict[int, int]] = defaultdict(
                dict
            )  # of each, its rows with the tokens they may draw in it
            for number in going:
                drawn = len(found[number].token_ids)
                length = len(requests[number].prompt_token_ids) + drawn
                regime, last, left = rule.regime(length), rule.last(length), sampling.max_tokens - drawn
                # where every length is a regime, no piece would be longer than a token: there nothing is cached
                regimes[regime][number] = left if last is None or regime[1] else min(left, last - length + 1)
            going = []
            for regime, rooms in sorted(regimes.items()):
                for room, numbers in _together(rooms):
                    decoded = self._piece(
                        [requests[number] for number in numbers],
                        [found[number] for number in numbers],
                        regime,
                        sampling._replace(max_tokens=room),
                    )
                    for number, piece in zip(numbers, self._completions(decoded, sampling), strict=True):
                        found[number] = _joined(found[number], piece)
                        if piece.finish_reason == "length" and len(found[number].token_ids) < sampling.max_tokens:
                            going.append(number)
        return self._completed(requests, found, sampling)

    def _piece(
        self, requests: Sequence[Request], before: Sequence[Completion], regime: tuple[int, int], sampling: Sampling
    ) -> Decoded:
        """The next tokens of requests, all of one regime, with what they were answered before."""
        if regime == (0, 0) and not any(known.token_ids for known in before):
            return self._decode(requests, sampling)
        rows = [
            Row(request.prompt_token_ids + known.token_ids, request.seed, len(known.token_ids))
            for request, known in zip(requests, before, strict=True)
        ]
        return self._rows(rows, sampling, cached=not regime[1])

    def _completed(self, requests: Sequence[Request], found: list[Completion], sampling: Sampling) -> list[Completion]:
        """The completions with log-probabilities of one pass over prompt and response."""
        rule = pass_lengths(self._policy.model)
        pairs = [(request.prompt_token_ids, one.token_ids) for request, one in zip(requests, found, strict=True)]
        crossed = [
            number
            for number, (prompt, response) in enumerate(pairs)
            if rule.regime(len(prompt)) != rule.regime(len(prompt) + len(response))
        ]
        if not crossed or not sampling.temperature:
            return found
        crossed.sort(key=lambda number: len(pairs[number][0]) + len(pairs[number][1]))
        values = separate_logprobs(
            self._policy.model, [pairs[number] for number in crossed], sampling.temperature, PASS_TOKENS
        )
        for number, own in zip(crossed, values.split([len(pairs[number][1]) for number in crossed]), strict=True):
            found[number] = found[number]._replace(logprobs=own.tolist())
        if not self._told:
            self._told = True
            runtime.notify(
                f"responses pass {rule.limit} tokens, prompt included, where the policy's rotary frequencies change: their log-probabilities "
                "are those of one pass over the whole response, not those that its first tokens were drawn with"
            )
        return found

    def _completions(self, decoded: Decoded, sampling: Sampling) -> Iterator[Completion]:
        """Rows ended at their first end token; what was decoded after it is padding."""
        ends = torch.tensor(self._policy.end_token_ids, device=decoded.tokens.device)
        ended = torch.isin(decoded.tokens, ends)
        drawn = ended.cumsum(1) - ended.long() == 0
        if not torch.isfinite(decoded.values[drawn]).all():
            raise scores_not_finite(self._policy.folder)
        of_rows = zip(drawn.sum(1).tolist(), ended.any(1).tolist(), decoded.tokens, decoded.values, strict=True)
        for length, stopped, tokens, values in of_rows:
            logprobs = values[:length].tolist() if sampling.temperature else None
            yield Completion(tokens[:length].tolist(), logprobs, "stop" if stopped else "length")


def _together(rooms: Mapping[int, int]) -> Iterator[tuple[int, list[int]]]:
    """Rows in batches that draw equally many tokens, from how many each may: all as many as the first can if that is most of it for all."""
    least, most = min(rooms.values()), max(rooms.values())
    batches: dict[int, list[int]] = defaultdict(list)
    for number, room in sorted(rooms.items()):
        batches[least if 2 * least >= most else room].append(number)
    yield from sorted(batches.items())


def _joined(before: Completion, piece: Completion) -> Completion:
    """A response of two pieces, one after the other."""
    logprobs = None if before.logprobs is None or piece.logprobs is None else before.logprobs + piece.logprobs
    return Completion(before.token_ids + piece.token_ids, logprobs, piece.finish_reason)


class ReplicaEngine(TransformersEngine):
    """Samples from a copy of a policy that processes share, each from one of its own: data-parallel sampling, where a step costs no talk."""

    own_weights = True

    @torch.no_grad()
    def update_weights(self, policy: Policy) -> None:
        """Gather the policy's weights into the copy; collective."""
        mine = dict(self._policy.model.named_parameters())
        for name, tensor in checkpoint_weights(policy.model):
            if name in mine:
                mine[name].copy_(tensor)
