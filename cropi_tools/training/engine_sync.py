"""From the trainer to an engine that samples from its own copy of the weights, with a check after every update.

An engine left with old weights, with some old weights, or with cached prompts of old weights raises no error: training continues, off-policy and
worse. So after every update the engine samples a few responses to the longest prompts, which are the likeliest to be cached, and the
trainer computes their log-probabilities itself. Both are of the same weights, so they agree to rounding, or something is stale.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from cropi_tools.data.jsonl import Record
from cropi_tools.engines.protocol import Engine, Request, Sampling, sample_seed
from cropi_tools.policy.adapters import has_adapters
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import SHARED, separate_logprobs
from cropi_tools.policy.merging import check_merge
from cropi_tools.policy.prompts import encoded_prompt
from cropi_tools.runtime.errors import CropiError
from cropi_tools.training.update import mixed_precision

PROMPTS, SAMPLES, TOKENS = 4, 2, 32  # what is compared after an update
FLOAT32_LIMIT = 1e-3  # mean |difference| of a log-probability; rounding alone is below 1e-5
BFLOAT16_LIMIT = 0.05  # two programs that round differently are .005 to .03 apart
JUMP = 4.0  # in bfloat16 a mean above the limit is still normal if earlier ones were within this factor


class EngineSync:
    """Hands a policy's weights to an engine and compares their log-probabilities.

    prompts, sampling: those of training. bfloat16: whether the engine's weights and the trainer's products are.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        prompts: Sequence[Record],
        sampling: Sampling,
        bfloat16: bool,
        seed: int,
    ) -> None:
        self._engine, self._policy, self._bfloat16, self._seed = engine, policy, bfloat16, seed
        self._sampling = sampling._replace(max_tokens=min(TOKENS, sampling.max_tokens))
        longest = sorted(prompts, key=lambda record: len(str(record["prompt"])), reverse=True)[:PROMPTS]
        self._probes = [(record["id"], encoded_prompt(policy.tokens, record)) for record in longest]
        self._seen: list[float] = []

    def __call__(self, step: int) -> float:
        """Update the engine to the weights after `step`; returns the mean |difference| of log-probabilities. CropiError: they do not agree."""
        if has_adapters(self._policy.model):
            check_merge(self._policy.model, bfloat16=self._bfloat16 and hasattr(self._policy.model, SHARED))
        self._engine.update_weights(self._policy)
        mismatch = self._compare(step)
        limit = self._limit()
        if not mismatch <= limit:
            remedy = "the cause may be rounding: try --dtype float32" if self._bfloat16 else "use --engine transformers"
            raise CropiError(
                f"after step {step} the engine's log-probabilities differ from the policy's by {mismatch:.2g} on average "
                f"(limit {limit:.2g}), so it samples from other weights; {remedy}"
            )
        self._seen.append(mismatch)
        return mismatch

    def _limit(self) -> float:
        if not self._bfloat16:
            return FLOAT32_LIMIT
        return max(BFLOAT16_LIMIT, JUMP * statistics.median(self._seen)) if self._seen else BFLOAT16_LIMIT

    @torch.no_grad()
    def _compare(self, step: int) -> float:
        requests = [
            Request(tokens, sample_seed(self._seed, "agreement", step, name, k))
            for name, tokens in self._probes
            for k in range(SAMPLES)
        ]
        completions = self._engine.sample(requests, self._sampling)
        pairs = [
            (request.prompt_token_ids, found.token_ids) for request, found in zip(requests, completions, strict=True)
        ]
        with mixed_precision(self._policy.device, self._bfloat16):
            own = separate_logprobs(self._policy.model, pairs, self._sampling.temperature)
        told = torch.tensor([value for found in completions for value in found.logprobs or ()], device=own.device)
        return float((own - told).abs().mean())
