"""A way of sampling tried out: a few short responses, whose log-probabilities must be those of plain forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.policy.packing import Unpackable
from cropi_tools.policy.rotary_lengths import pass_lengths
from cropi_tools.policy.trials import LOWERED, MODEL_ERRORS
from cropi_tools.runtime.clock import starting

SAMPLING = Sampling(LOWERED + 2, 1.0)
_PROMPTS = (1, 3, 2 * LOWERED + 1)  # tokens: fewer and more than convolutions and lowered limits reach
_SHARED = 2 * LOWERED - 2  # tokens that some of them begin with


class Decoded(NamedTuple):
    """The tokens drawn for each request, in order, and their values as `choose` gives them: [requests, tokens].

    What comes after an end token means nothing.
    """

    tokens: torch.Tensor
    values: torch.Tensor


@torch.no_grad()
@starting()
def trial_error(model: Any, sample: Callable[[Sequence[Request]], Decoded], attention_alone: bool) -> float:
    """The largest difference between the log-probabilities of a few samples and those of a forward pass over each response alone.

    sample: draws SAMPLING.max_tokens tokens a request, with no end token. attention_alone: nothing but attention relates the model's tokens;
    else it is asked several times, since a state may be kept from one batch to the next (RecurrentGemma, prompts of one token).

    Infinite where the model raises an error in it, or where the model computes even so few tokens by their length
    (`policy/rotary_lengths.py`); NaN where the model's scores are not finite.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [(7 * place + 3) % vocabulary for place in range(_PROMPTS[-1])]
    alike = _PROMPTS[:1] * len(_PROMPTS)
    shapes = (_PROMPTS,) if attention_alone else (alike, alike, _PROMPTS)
    groups = [
        [Request(ids[-length:], 10 * number + k) for k, length in enumerate(lengths)]
        for number, lengths in enumerate(shapes)
    ]
    if attention_alone:  # what prompts begin with may be computed once for all
        groups.append([Request(ids[:_SHARED] + ids[-length:], 10 + length) for length in (1, 3, 2)])
    if not pass_lengths(model).short(_PROMPTS[-1] + SAMPLING.max_tokens):
        return float("inf")
    try:
        decoded = [sample(group) for group in groups]
    except (Unpackable, *MODEL_ERRORS):
        return float("inf")
    error = 0.0
    requests = [request for group in groups for request in group]
    for request, (response, found) in zip(
        requests, (row for group in decoded for row in zip(*group, strict=True)), strict=True
    ):
        row = torch.cat([torch.tensor(request.prompt_token_ids, device=response.device), response])
        logits = model(input_ids=row[None], use_cache=False).logits[0, -len(response) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(-1, response[:, None])[:, 0]
        difference = float((found - expected).abs().max())
        if math.isnan(difference):
            return difference
        error = max(error, difference)
    return error
