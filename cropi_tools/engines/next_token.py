"""Which token comes next: the cumulative distribution inverted at a sample's own number for that position.

A number is a hash of the sample's seed and the position, so a choice depends on neither the batch nor what was drawn before.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 512  # tokens whose probabilities are summed before any are added up one by one


def uniforms(seeds: np.ndarray, position: int | np.ndarray) -> np.ndarray:
    """The number in [0, 1) of each seed (uint64 [n]) for the token at `position`, one for all or [n]: SplitMix64 of both, 53 bits."""
    with np.errstate(over="ignore"):
        x = seeds + (np.asarray(position).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens [rows] that `numbers` (float64 [rows], in [0, 1)) pick from softmax(logits / temperature), logits [rows, vocabulary].

    The token of a number u is the first one whose cumulative probability exceeds u; one of probability 0 is never chosen. Beside it
    its float32 log-probability [rows]. Temperature 0: the most likely token and, as nothing is drawn, its logit.

    Either is not finite where the logits are not.
    """
    if temperature == 0.0:
        values, chosen = logits.max(-1)
        return chosen, values.float()
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    top = scaled.amax(-1, keepdim=True)
    rows, vocabulary = scaled.shape
    blocks = -(-vocabulary // _BLOCK)
    if blocks == 1:
        cumulative = (scaled - top).exp_().double().cumsum_(-1)
        total = cumulative[:, -1:]
        chosen = _first_above(cumulative, numbers[:, None] * total)
    else:
        # only the block that holds the token is added up token by token in float64: for a large vocabulary that is most of the work
        weights = scaled.new_zeros(rows, blocks * _BLOCK)
        torch.exp(scaled - top, out=weights[:, :vocabulary])
        weights = weights.view(rows, blocks, _BLOCK)
        sums = weights.sum(-1).double().cumsum_(-1)
        total = sums[:, -1:]
        target = numbers[:, None] * total
        block = _first_above(sums, target)
        before = sums.gather(-1, (block - 1).clamp_(min=0)) * (block > 0)
        inside = weights.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum_(-1)
        # a block's sum and the sum of its tokens differ by rounding, and the target must lie below the latter
        chosen = _first_above(inside, (target - before).minimum(inside[:, -1:] * (1 - 2.0**-52))) + block * _BLOCK
    logprobs = scaled.gather(-1, chosen.clamp(max=vocabulary - 1)) - top - total.log().float()
    return chosen.clamp_(max=vocabulary - 1)[:, 0], logprobs[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first place [rows, 1] of ascending values [rows, n] that exceeds the target [rows, 1]; the last where none does."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)
