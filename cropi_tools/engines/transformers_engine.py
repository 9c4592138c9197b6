"""The embedded default: sampling with the library's own `generate`, for any Hugging Face causal language model.

The library samples a whole batch from one generator, so that a response would depend on its neighbours. Here every response brings
its own uniform numbers: a logits processor picks the token by inverting the cumulative distribution at the sample's number for that
position, notes its log-probability, and leaves `generate` only that token to choose. One number a token, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cropi_tools.data.errors import InputError
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling
from cropi_tools.policy.loading import Policy

ROWS = 256  # responses decoded together; part of no result beyond float rounding
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, position: int) -> np.ndarray:
    """The number in [0, 1) of each seed (uint64 [n]) for the token at `position`: SplitMix64 of the seed and the position, 53 bits."""
    with np.errstate(over="ignore"):
        x = seeds + np.uint64(position + 1) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _OwnUniforms(LogitsProcessor):
    """Chooses each row's next token by its own seed and keeps tokens and log-probabilities, [rows] a step."""

    def __init__(self, seeds: list[int], temperature: float) -> None:
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._temperature = temperature
        self.tokens: list[torch.Tensor] = []
        self.logprobs: list[torch.Tensor] = []
        self.chosen_scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._temperature == 0.0:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            logprobs = torch.log_softmax(scores.float() / self._temperature, -1)
            cumulative = logprobs.double().exp().cumsum(-1)
            u = torch.from_numpy(uniforms(self._seeds, len(self.tokens))).to(scores.device)[:, None]
            # the first token whose cumulative probability exceeds u; tokens of probability 0 are never chosen
            chosen = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
            chosen = chosen.clamp_(max=scores.shape[-1] - 1)
            self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        self.tokens.append(chosen[:, 0])
        self.chosen_scores.append(scores.gather(-1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


class TransformersEngine(Engine):
    """Samples from a loaded policy, always from the model's present weights. Groups are decoded one after another."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        """Each group by itself, ROWS responses at a time in the order given."""
        for requests in groups:
            found: list[Completion] = []
            for start in range(0, len(requests), ROWS):
                found += self._sample_rows(requests[start : start + ROWS], sampling)
            yield found

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """As the protocol says."""
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            **sampling._asdict(),
            "end_token_ids": self._policy.end_token_ids,
            "dtype": str(self._policy.model.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def _sample_rows(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        model: Any = self._policy.model
        ends = self._policy.end_token_ids
        pad = model.generation_config.pad_token_id
        longest = max(len(request.prompt_token_ids) for request in requests)
        input_ids = torch.full((len(requests), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):
            input_ids[row, longest - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
            mask[row, longest - len(request.prompt_token_ids) :] = 1
        chooser = _OwnUniforms([request.seed for request in requests], sampling.temperature)
        model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True
            ),
            logits_processor=LogitsProcessorList([chooser]),
        )
        if not torch.isfinite(torch.stack(chooser.chosen_scores)).all():
            # unnoticed, every sample would be the same token, all rewards equal, and training would go on without a gradient
            raise InputError(
                f"{self._policy.folder}: the policy's scores are not finite; its weights are damaged or its training has diverged "
                "(go back to an earlier policy, lower --learning-rate), or the number format overflows (--dtype float32)"
            )
        tokens = torch.stack(chooser.tokens, 1).tolist()
        logprobs = torch.stack(chooser.logprobs, 1).tolist() if chooser.logprobs else [None] * len(tokens)
        return [_cut(row, values, ends) for row, values in zip(tokens, logprobs, strict=True)]


def _cut(tokens: list[int], logprobs: list[float] | None, ends: list[int]) -> Completion:
    """End a row at its first end token; what the library decoded after it is padding."""
    stop = next((t for t, token in enumerate(tokens) if token in ends), None)
    length = len(tokens) if stop is None else stop + 1
    return Completion(
        tokens[:length], None if logprobs is None else logprobs[:length], "length" if stop is None else "stop"
    )
