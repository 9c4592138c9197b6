"""What a server does not say of itself, found out by a few short requests before the first real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cropi_tools.engines.protocol import Sampling
from cropi_tools.engines.server_client import Client
from cropi_tools.engines.server_dialects import MALFORMED, Dialect
from cropi_tools.runtime.errors import InputError

_TOP = 5  # tokens compared; servers allow that many without being told
_TELLING = 0.3  # nats by which the two readings must differ somewhere
_SEED = 20_251  # any

Body = Callable[[list[int], int, Sampling], dict[str, Any]]
"""A request's body from its prompt, seed and sampling."""


async def tells_sampled_logprobs(
    client: Client, dialect: Dialect, prompts: Sequence[list[int]], sampling: Sampling, body: Body
) -> bool:
    """Whether the log-probabilities that the server tells are those of softmax(logits / temperature).

    At temperature 1 they are what any server tells. Else the most likely first tokens after each of `prompts` are compared at 1 and at
    another temperature, well away from 1: differences between tokens grow by 1 / temperature, or stay where the server tells them of
    the softmax at 1. False also where it tells none, or nothing can be made out.
    """
    if not dialect.tells_logprobs:
        return False
    if sampling.temperature == 1.0:
        return True
    other = min(sampling.temperature, 0.5) if sampling.temperature < 1.0 else max(sampling.temperature, 2.0)
    for prompt in prompts:
        found = []
        for temperature in (1.0, other):
            fields = {**body(prompt, _SEED, Sampling(1, temperature)), **dialect.probe(_TOP)}
            try:
                found.append(dialect.likeliest(await client.complete(fields)))
            except (InputError, *MALFORMED):
                return False  # a real request will say what is wrong, unless it is these fields that the server refuses
        verdict = scaled(found[0], found[1], other)
        if verdict is not None:
            return verdict
    return False


def scaled(at_one: Mapping[str, float], at_other: Mapping[str, float], temperature: float) -> bool | None:
    """Whether differences of log-probabilities between tokens are those at temperature 1 divided by `temperature` (True), the same
    (False), or cannot be told (None)."""
    common = sorted(at_one.keys() & at_other.keys(), key=lambda token: -at_one[token])
    if len(common) < 2:
        return None
    raw = [at_one[common[0]] - at_one[token] for token in common[1:]]
    told = [at_other[common[0]] - at_other[token] for token in common[1:]]
    if max(abs(gap / temperature - gap) for gap in raw) < _TELLING:
        return None
    if_scaled = sum((one - gap / temperature) ** 2 for one, gap in zip(told, raw, strict=True))
    if_same = sum((one - gap) ** 2 for one, gap in zip(told, raw, strict=True))
    # a server's rounding of its scores is far smaller than this; what is neither is not to be trusted
    return if_scaled < 0.05 * if_same


async def keeps_to_seeds(client: Client, dialect: Dialect, prompt: list[int], sampling: Sampling, body: Body) -> bool:
    """Whether the same request twice gives the same response."""
    fields = body(prompt, _SEED, sampling)
    texts = [client.read(dialect, await client.complete(fields)).text for _ in range(2)]
    return texts[0] == texts[1]
