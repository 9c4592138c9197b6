"""The objective whose gradient is a prompt's: what all ways to differentiate it share (docs/method.md, "The gradient of one prompt").

`prepare` turns a prompt's rollouts into a task (advantages, a coefficient a token) or says why there is no gradient; `token_gradients`
differentiates its objective by the log-probabilities of its response tokens; `facts` says how far the policy has drifted from the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cropi_tools.data.records import Rollout, pass_rate
from cropi_tools.objective import (
    Aggregation,
    Baseline,
    Estimator,
    Terms,
    Weighting,
    drift,
    group_advantages,
    policy_terms,
    token_coefficients,
)
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import SequenceBatch, lay_out, response_logprobs, separate_logprobs, token_limited
from cropi_tools.policy.packing import PackedBatch, packed, packs
from cropi_tools.policy.rotary_lengths import pass_lengths
from cropi_tools.runtime.errors import InputError

_CANCELLED = 1e-9  # advantages are of order one, in float64


class GradientSettings(NamedTuple):
    """What decides a prompt's gradient, apart from policy and rollouts."""

    estimator: Estimator = Estimator()
    policy_temperature: float = 1.0
    aggregation: Aggregation = "sequence"
    baseline: Baseline = "group"


class GradientTask(NamedTuple):
    """A prompt that has a gradient: its responses with an advantage and, for every token, a coefficient (one a response)."""

    rollout: Rollout
    responses: list[list[int]]
    advantages: list[float]
    coefficients: list[float]

    @property
    def tokens(self) -> int:
        """Response tokens."""
        return sum(map(len, self.responses))

    @property
    def prompt(self) -> list[int]:
        return self.rollout.prompt_token_ids

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompt and each response."""
        return [len(self.prompt) + len(response) for response in self.responses]


class PromptGradient(NamedTuple):
    """What one prompt gave. status: `ok`, or why it has no gradient. entry: facts for the index. tokens: that went through the policy."""

    status: str
    entry: dict[str, Any]
    tokens: int


def prepare(rollout: Rollout, settings: GradientSettings) -> GradientTask | str:
    """The task of a prompt, or the status of one that has no gradient: `zero-advantage`, `empty`, or `zero-gradient`.

    The last where equal responses got unequal rewards (a verifier that timed out, say) and nothing else differs: their advantages cancel, and
    what a backward pass leaves of them is rounding, whose direction must not be scored. (PPO's clip may drop one and keep the other.)
    """
    advantages = group_advantages(rollout.rewards, settings.baseline)
    if advantages is None:
        return "zero-advantage"
    responses = [sample.token_ids for sample in rollout.samples]
    lengths = [len(response) for response in responses]
    if not any(lengths):
        return "empty"
    if settings.estimator.ppo_clip is None and _cancel(responses, advantages):
        return "zero-gradient"
    # `constant` divides by responses times a fixed length; the length is 1 here, since neither a cosine nor a ranking sees it
    total = sum(lengths) if settings.aggregation == "token" else len(lengths)
    return GradientTask(rollout, responses, advantages, token_coefficients(lengths, settings.aggregation, total))


def _cancel(responses: Sequence[Sequence[int]], advantages: Sequence[float]) -> bool:
    """Whether the advantages of equal responses add up to nothing, of all that are not empty."""
    sums: dict[tuple[int, ...], float] = {}
    for response, advantage in zip(responses, advantages, strict=True):
        sums[tuple(response)] = sums.get(tuple(response), 0.0) + advantage
    return not any(abs(value) > _CANCELLED for response, value in sums.items() if response)


def without_gradient(rollout: Rollout, status: str) -> PromptGradient:
    """The result of a prompt that has no gradient."""
    return PromptGradient(status, {**_identity(rollout), "status": status}, 0)


def _identity(rollout: Rollout) -> dict[str, Any]:
    return {"id": rollout.id, "source": rollout.source, "pass_rate": pass_rate(rollout.rewards)}


def passes(model: Any, task: GradientTask, limit: int) -> list[range]:
    """The responses of a task in ranges whose forward pass stays within `limit` tokens; one response always fits.

    Those of a range are of one regime (`lengths.py`). Ranges without a token need no pass and are left out.
    """
    ranges: list[range] = []
    for alike in pass_lengths(model).ranges(task.lengths):
        if not packs([model], [task.lengths[row] for row in alike]):
            parts = token_limited([(task.prompt, task.responses[row]) for row in alike], limit)
            ranges += [range(alike.start + part.start, alike.start + part.stop) for part in parts]
            continue
        start, tokens = alike.start, len(task.prompt)
        for row in alike:
            if row > start and tokens + len(task.responses[row]) > limit:
                ranges.append(range(start, row))
                start, tokens = row, len(task.prompt)
            tokens += len(task.responses[row])
        ranges.append(range(start, alike.stop))
    return [rows for rows in ranges if any(task.responses[row] for row in rows)]


def batch_of(policy: Policy, task: GradientTask, rows: range) -> SequenceBatch | PackedBatch:
    """Some responses of a task as one forward pass."""
    return lay_out([policy.model], [(task.prompt, [task.responses[row] for row in rows])], policy.device)


def batch_tokens(batch: SequenceBatch | PackedBatch) -> int:
    """Tokens that go through the policy, padding included."""
    return batch.input_ids.numel()


def behavior_logprobs(
    task: GradientTask,
    rows: range,
    batch: SequenceBatch | PackedBatch,
    behavior: Policy | None,
    settings: GradientSettings,
) -> torch.Tensor | None:
    """beta's log-probabilities [tokens] of some responses: as recorded, or recomputed by `behavior` at the policy temperature.

    None: there are none, and the weighting needs none. InputError: there are none, and it does.
    """
    if behavior is not None:
        # a batch of several tasks is none of one
        own = batch if isinstance(batch, PackedBatch) and len(batch.lengths) == len(rows) else None
        if own is not None and packs([behavior.model], [task.lengths[row] for row in rows]):
            with torch.no_grad(), packed(behavior.model, own):
                return response_logprobs(behavior.model, own, settings.policy_temperature)[0]
        pairs = [(task.prompt, task.responses[row]) for row in rows]
        return separate_logprobs(behavior.model, pairs, settings.policy_temperature)
    stored: list[float] = []
    for row in rows:
        sample = task.rollout.samples[row]
        if sample.logprobs is None:
            if settings.estimator.weighting == "none":
                return None
            raise InputError(
                f"prompt '{task.rollout.id}': sample {row} has no log-probabilities (greedy or text-only rollouts); "
                "give the policy that sampled it with --behavior"
            )
        stored += sample.logprobs
    return torch.tensor(stored, device=batch.input_ids.device)


def behavior_of_each(
    tasks: Sequence[GradientTask], batch: PackedBatch, behavior: Policy | None, settings: GradientSettings
) -> list[torch.Tensor | None]:
    """`behavior_logprobs` of each task of a packed batch; one pass for all if a policy has to recompute them."""
    if behavior is not None and packs([behavior.model], (length for task in tasks for length in task.lengths)):
        with torch.no_grad(), packed(behavior.model, batch):
            together, _ = response_logprobs(behavior.model, batch, settings.policy_temperature)
        return list(together.split([task.tokens for task in tasks]))
    return [behavior_logprobs(task, range(len(task.responses)), batch, behavior, settings) for task in tasks]


def token_gradients(
    task: GradientTask,
    rows: range,
    logprobs: torch.Tensor,
    behavior: torch.Tensor | None,
    settings: GradientSettings,
    mean_weight: float | None = None,
) -> tuple[torch.Tensor, Terms]:
    """The derivative of the prompt's objective by the log-probability of each token of some of its responses, [tokens], and the terms.

    It is A_k c_kt w_kt, zero where clipped: all there is between the objective and the policy. The gradient is its product with the
    gradients of the log-probabilities, the derivative along a direction its product with theirs. logprobs [tokens]: without a graph.
    mean_weight: of all the prompt's tokens, where self-normalization needs it and `rows` are not all.
    """
    lengths = [len(task.responses[row]) for row in rows]
    advantages = spread([task.advantages[row] for row in rows], lengths, logprobs)
    coefficients = spread([task.coefficients[row] for row in rows], lengths, logprobs)
    beta = logprobs if behavior is None else behavior.to(logprobs)
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        terms = policy_terms(leaf, beta, advantages, lengths, settings.estimator, mean_weight)
        (derivative,) = torch.autograd.grad((coefficients * terms.surrogate).sum(), leaf)
    return derivative, terms._replace(surrogate=terms.surrogate.detach())


def spread(values: Sequence[float], lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """One value a response -> one a token, [tokens]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).repeat_interleave(
        torch.tensor(lengths, device=like.device)
    )


def facts(task: GradientTask, parts: Sequence[Terms], measured: bool, weighting: Weighting) -> dict[str, Any]:
    """The index entry of a prompt with a gradient; `measured`: whether beta's log-probabilities are known. parts: of all its responses that
    have tokens, in order.

    InputError: the importance ratios are not finite.
    """
    entry: dict[str, Any] = {**_identity(task.rollout), "status": "ok", "tokens": task.tokens}
    clipped = sum(int(part.clipped.sum()) for part in parts) / task.tokens
    names = ("kl", "effective_sample_size", "weight_count", "mean_ratio", "max_ratio")
    if not measured:
        return {**entry, **dict.fromkeys(names), "clipped_fraction": clipped}
    weights = None if weighting == "none" else torch.cat([part.weights for part in parts])
    lengths = [len(response) for response in task.responses]
    moved = drift(torch.cat([part.log_ratio for part in parts]), weights, lengths, weighting)
    if not all(map(math.isfinite, moved)):
        raise InputError(
            f"prompt '{task.rollout.id}': the importance weights are not finite; do these rollouts belong to this policy? "
            "If so, take a weighting without products"
        )
    return {**entry, **{name: getattr(moved, name) for name in names}, "clipped_fraction": clipped}
