"""What an engine takes and gives."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol


class Request(NamedTuple):
    """One response to sample: the prompt's token ids and the 64-bit seed of this one sample."""

    prompt_token_ids: list[int]
    seed: int


class Sampling(NamedTuple):
    """All that shapes the sampled distribution. No top-p, top-k or penalty: they would bias importance weights."""

    max_tokens: int
    temperature: float


class Completion(NamedTuple):
    """One response. The end token is in `token_ids` if it was sampled; `stop` means it was, `length` that the limit came first.

    logprobs: float32 log-probabilities of the tokens under softmax(logits / temperature); None when greedy (temperature 0), where
    nothing was sampled.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Samples responses; results come in the order of the requests."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]: ...


def sample_seed(*parts: str | int) -> int:
    """A 64-bit seed from its coordinates, such as (run seed, prompt id, sample number); stable across machines and versions."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
