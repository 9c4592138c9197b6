"""One GRPO update: from a batch of rollouts to a gradient in the parameters.

Loss (minimised), with the objective's vocabulary and fixed denominators over the whole batch, whatever the micro-batches:

    - sum_k A_k sum_t c_kt min(rho_kt, clip(rho_kt))  +  kl * sum c k3(pi_theta || reference)  -  entropy * sum c H(pi_theta)

rho is the ratio to the distribution really sampled, as the engine reported it. Groups without advantage get no gradient at all, KL and
entropy included, and no forward pass; their tokens stay in the denominator, as in TRL and verl.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from cropi_tools.data.jsonl import Record
from cropi_tools.objective import Clip, Estimator, group_advantages, kl_k3, policy_terms, token_coefficients
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import response_logprobs, sequence_batch, token_limited

TOKENS_PER_PASS = 16384  # padded tokens in one forward pass

Aggregation = Literal["sequence", "token"]  # the constant one would need a fixed length


class LossSettings(NamedTuple):
    """What the loss is. temperature: the sampling temperature, of both sides of the ratio."""

    temperature: float
    clip: Clip
    kl: float
    entropy: float
    aggregation: Aggregation
    autocast: bool = False


class _Response(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    advantage: float
    coefficient: float


def backward(
    policy: Policy, reference: Policy | None, rollouts: Sequence[Record], settings: LossSettings
) -> dict[str, float]:
    """Add the loss's gradient to the parameters' `.grad`; returns figures of the batch.

    rollouts: records of `sample_and_verify`. Figures: loss, kl (k3 against the reference), behavior_kl (k3 between sampler and policy),
    entropy, clip_fraction (means over the tokens that had a forward pass), tokens_trained.
    """
    responses = _responses(rollouts, settings.aggregation)
    # equal lengths together: less padding
    responses.sort(key=lambda response: len(response.prompt) + len(response.tokens))
    sequences = [(response.prompt, response.tokens) for response in responses]
    sums = dict.fromkeys(("loss", "kl", "behavior_kl", "entropy", "clip_fraction"), 0.0)
    tokens = 0
    for rows in token_limited(sequences, TOKENS_PER_PASS):
        part = [responses[row] for row in rows]
        batch = sequence_batch([sequences[row] for row in rows], policy.device)
        with mixed_precision(policy.device, settings.autocast):
            logprobs, entropy = response_logprobs(
                policy.model, batch, settings.temperature, "gradient" if settings.entropy else "value"
            )
        behavior = torch.tensor([value for response in part for value in response.logprobs], device=logprobs.device)
        lengths = torch.tensor(batch.lengths, device=logprobs.device)
        advantages = torch.tensor([response.advantage for response in part], device=logprobs.device).repeat_interleave(
            lengths
        )
        weights = torch.tensor([response.coefficient for response in part], device=logprobs.device).repeat_interleave(
            lengths
        )
        terms = policy_terms(logprobs, behavior, advantages, batch.lengths, Estimator(ppo_clip=settings.clip))
        loss = -(weights * terms.surrogate).sum()
        if reference is not None:
            with torch.no_grad(), mixed_precision(policy.device, settings.autocast):
                known, _ = response_logprobs(reference.model, batch, settings.temperature)
            divergence = kl_k3(known - logprobs)
            loss = loss + settings.kl * (weights * divergence).sum()
            sums["kl"] += float(divergence.detach().sum())
        if settings.entropy:
            loss = loss - settings.entropy * (weights * entropy).sum()
        loss.backward()
        sums["loss"] += float(loss.detach())
        sums["behavior_kl"] += float(kl_k3(terms.log_ratio).sum())
        sums["entropy"] += float(entropy.detach().sum())
        sums["clip_fraction"] += float(terms.clipped.sum())
        tokens += len(batch.targets)
    means = {name: value if name == "loss" else value / max(tokens, 1) for name, value in sums.items()}
    return {**means, "tokens_trained": tokens}


def _responses(rollouts: Sequence[Record], aggregation: Aggregation) -> list[_Response]:
    """The responses that get a gradient, with advantage and coefficient."""
    samples = [sample for record in rollouts for sample in record["samples"]]
    total = len(samples) if aggregation == "sequence" else sum(len(sample["token_ids"]) for sample in samples)
    found = []
    for record in rollouts:
        advantages = group_advantages([sample["reward"] for sample in record["samples"]])
        if advantages is None:
            continue
        coefficients = token_coefficients(
            [len(sample["token_ids"]) for sample in record["samples"]], aggregation, total
        )
        for sample, advantage, coefficient in zip(record["samples"], advantages, coefficients, strict=True):
            if sample["token_ids"]:
                found.append(
                    _Response(
                        record["prompt_token_ids"], sample["token_ids"], sample["logprobs"], advantage, coefficient
                    )
                )
    return found


def mixed_precision(device: torch.device, wanted: bool) -> Any:
    """A block in which matrix products are in bfloat16, if wanted."""
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def clip_gradient(parameters: Sequence[torch.nn.Parameter], largest: float) -> float:
    """Scale the gradient to norm `largest` at most (0 = leave it); returns the norm before. A norm that is not finite is returned as it is."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else math.inf))
    return norm
