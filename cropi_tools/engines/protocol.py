"""What an engine takes and gives."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cropi_tools.runtime.errors import InputError

if TYPE_CHECKING:
    from cropi_tools.policy.loading import Policy


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
    nothing was sampled, and where an endpoint cannot tell them.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: Literal["stop", "length"]


class Engine(ABC):
    """Samples responses.

    Requests come in groups, which are what a caller commits at once. Groups are answered in order, each whole and in the order of its
    requests. An engine may begin later groups before an earlier one is done, and takes only as many from `groups` as it needs to stay busy;
    what a request is answered depends on the request alone, beyond float rounding of the logits. What is generated is told to
    `runtime.count_tokens` as it comes.

    own_weights: whether it samples from a copy of the weights, which follows a policy in training only by `update_weights`.
    """

    own_weights = False

    @abstractmethod
    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        """The completions of each group, in order."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The completions of one group."""
        (found,) = self.stream([requests], sampling)
        return found

    @abstractmethod
    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """Everything that shapes the sampled distribution, as it was really set, and the engine's version: for the manifest."""

    def update_weights(self, policy: Policy) -> None:  # noqa: B027 - most engines have nothing to do
        """Sample from these weights from now on. Nothing to do for an engine that reads the policy's own."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Give back what the engine holds: processes, connections, memory."""


def sample_seed(*parts: str | int) -> int:
    """A 64-bit seed from its coordinates, such as (run seed, prompt id, sample number); stable across machines and versions."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def scores_not_finite(folder: str) -> InputError:
    """The error of an engine whose policy gives NaN or infinite scores.

    Unnoticed, every sample would be the same token, all rewards equal, and training would go on without a gradient.
    """
    return InputError(
        f"{folder}: the policy's scores are not finite; its weights are damaged or its training has diverged "
        "(go back to an earlier policy, lower --learning-rate), or the number format overflows (--dtype float32)"
    )
