"""The embedded default: sampling with the library's own `generate`, for any Hugging Face causal language model, or by a loop of ours.

The library samples a whole batch from one generator, so that a response would depend on its neighbours. Here every response brings
its own uniform numbers: a logits processor picks the token by inverting the cumulative distribution at the sample's number for that
position, notes its log-probability, and leaves `generate` only that token to choose. One number a token, whatever the batch.

Where a loop of ours is much faster and allowed (`decoding.py`), it samples instead, the same tokens from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cropi_tools.engines.decoding import Decoded, can_decode, decode
from cropi_tools.engines.next_token import choose, uniforms
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling, scores_not_finite
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.weights import checkpoint_weights

ROWS = 256  # responses decoded together; part of no result beyond float rounding
# What else could bend a distribution, switched off. `generate` is told one by one: what is left unset it takes from the model's own settings.
# Those of the second kind act only where the library draws tokens, which it never does here.
_SWITCHED_OFF = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "num_beams": 1}
_NEVER_ON = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}


class _OwnUniforms(LogitsProcessor):
    """Chooses each row's next token by its own seed and keeps what was chosen, [rows] a step."""

    def __init__(self, seeds: list[int], temperature: float) -> None:
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._temperature = temperature
        self.tokens: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = torch.from_numpy(uniforms(self._seeds, len(self.tokens))).to(scores.device)
        chosen, values = choose(scores, numbers, self._temperature)
        self.tokens.append(chosen)
        self.values.append(values)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


class TransformersEngine(Engine):
    """Samples from a loaded policy, always from the model's present weights. Groups are decoded one after another.

    loop: whether the loop of ours may sample where the model allows it; part of no result beyond float rounding.
    """

    def __init__(self, policy: Policy, loop: bool = True) -> None:
        self._policy, self._loop = policy, loop

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        """Each group by itself, ROWS responses at a time in the order given."""
        for requests in groups:
            yield self._sample(requests, sampling) if requests else []

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """As the protocol says. What is never used stands there as switched off."""
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "decoder": "loop" if self._by_loop() else "generate",
            **sampling._asdict(),
            **_NEVER_ON,
            **_SWITCHED_OFF,
            "end_token_ids": self._policy.end_token_ids,
            "dtype": str(self._policy.model.dtype).removeprefix("torch."),
        }

    def _by_loop(self) -> bool:
        return self._loop and can_decode(self._policy.model)

    def _sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if self._by_loop():
            parts = [decode(self._policy.model, requests, sampling, self._policy.end_token_ids, ROWS)]
        else:
            starts = range(0, len(requests), ROWS)
            parts = [self._generate(requests[start : start + ROWS], sampling) for start in starts]
        return [completion for part in parts for completion in self._completions(part, sampling)]

    @torch.no_grad()
    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> Decoded:
        model: Any = self._policy.model
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
                do_sample=False,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=self._policy.end_token_ids,
                pad_token_id=pad,
                use_cache=True,
                **_SWITCHED_OFF,
            ),
            logits_processor=LogitsProcessorList([chooser]),
        )
        return Decoded(torch.stack(chooser.tokens, 1), torch.stack(chooser.values, 1))

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
