"""What the tests ask engines, and how far their answers are from a policy's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed
from cropi_tools.policy.logprobs import response_logprobs, sequence_batch


def requests(prompts: int, samples: int = 1, length: int = 20) -> list[Request]:
    """Prompts of about `length` tokens and more, each its own."""
    return [
        Request([2 + (i * 7 + t * (3 + i % 5)) % 68 for t in range(length + i)], sample_seed("ask", i, k))
        for i in range(prompts)
        for k in range(samples)
    ]


def differences(policy: Any, asked: Sequence[Request], found: Sequence[Completion], sampling: Sampling) -> torch.Tensor:
    """|log-probability told - policy's own| of every token."""
    pairs = [(request.prompt_token_ids, one.token_ids) for request, one in zip(asked, found, strict=True)]
    with torch.no_grad():
        own, _ = response_logprobs(policy.model, sequence_batch(pairs, "cpu"), sampling.temperature)
    return (own - torch.tensor([value for one in found for value in one.logprobs or ()])).abs()


def disturb(policy: Any, size: float) -> None:
    """Move every parameter, as an update does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
