"""From rollouts to what a forward pass takes: responses with advantage and coefficient, in micro-batches without padding.

A prompt's responses stay together, so that the prompt is computed once for all of them. Denominators are those of the whole mini-batch,
whatever the micro-batches and however many processes share it. Groups without advantage get no gradient at all, KL and entropy included,
and no forward pass; their tokens stay in the denominator, as in TRL and verl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from cropi_tools.data.jsonl import Record
from cropi_tools.objective import group_advantages, token_coefficients
from cropi_tools.policy import logprobs
from cropi_tools.policy.logprobs import SequenceBatch
from cropi_tools.policy.packing import PackedBatch
from cropi_tools.policy.rotary_lengths import pass_lengths
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loss import TokenInputs
from cropi_tools.training.loss_settings import LossSettings


class Response(NamedTuple):
    """A response that gets a gradient. logprobs: as the engine reported them; old: of the policy before the step's first update."""

    tokens: list[int]
    logprobs: list[float]
    advantage: float
    coefficient: float
    old: list[float] | None = None


class Group(NamedTuple):
    """A prompt and its responses that get a gradient. number: its place among the rollouts of the mini-batch."""

    prompt: list[int]
    responses: list[Response]
    number: int = 0

    @property
    def longest(self) -> int:
        return max(len(response.tokens) for response in self.responses)


def advantage_groups(rollouts: Sequence[Record], settings: LossSettings, ranks: Ranks) -> list[Group]:
    """This process's groups of a mini-batch.

    rollouts: its records of `sample_groups`. Coefficients are over the rollouts of all processes. A truncated response that is masked
    stays among its group's rewards and among the responses that are averaged, its tokens do not count (as in TRL).
    """
    samples = [sample for record in rollouts for sample in record["samples"]]
    counted = [sample for sample in samples if not _masked(sample, settings)]
    responses, tokens = ranks.sum([float(len(samples)), float(sum(len(sample["token_ids"]) for sample in counted))])
    totals = {"sequence": responses, "token": tokens, "constant": responses * settings.fixed_length}
    groups = []
    for number, record in enumerate(rollouts):
        advantages = group_advantages([sample["reward"] for sample in record["samples"]], settings.advantage)
        if advantages is None:
            continue
        lengths = [len(sample["token_ids"]) for sample in record["samples"]]
        coefficients = token_coefficients(lengths, settings.aggregation, max(totals[settings.aggregation], 1.0))
        found = [
            Response(sample["token_ids"], sample["logprobs"], advantage, coefficient)
            for sample, advantage, coefficient in zip(record["samples"], advantages, coefficients, strict=True)
            if sample["token_ids"] and not _masked(sample, settings)
        ]
        if found:
            groups.append(Group(record["prompt_token_ids"], found, number))
    return groups


def _masked(sample: Record, settings: LossSettings) -> bool:
    return settings.mask_truncated and sample["finish_reason"] == "length"


def micro_batches(groups: Sequence[Group], limit: int, models: Sequence[Any]) -> list[list[Group]]:
    """The groups in parts of at most `limit` tokens, counted as attention lays them out; equal lengths together, and a prompt with too many
    responses in several parts. One response always fits. The sequences of a part are of one regime of the models' (`policy/rotary_lengths.py`).
    """
    regime = pass_lengths(*models).regime
    parts: list[list[Group]] = []
    part: list[Group] = []
    prompts = rows = longest = 0
    kind = (0, 0)
    for group, response in _by_length(groups, regime):
        same = bool(part) and part[-1].prompt is group.prompt
        wide = max(longest, len(response.tokens))
        added = 0 if same else len(group.prompt)
        own = regime(len(group.prompt) + len(response.tokens))
        if part and (prompts + added + (rows + 1) * wide > limit or own != kind):
            parts.append(part)
            part, prompts, rows, wide, same = [], 0, 0, len(response.tokens), False
            added = len(group.prompt)
        if same:
            part[-1].responses.append(response)
        else:
            part.append(Group(group.prompt, [response], group.number))
        prompts, rows, longest, kind = prompts + added, rows + 1, wide, own
    return [*parts, part] if part else parts


def _by_length(groups: Sequence[Group], regime: Callable[[int], tuple[int, int]]) -> Iterator[tuple[Group, Response]]:
    """Responses with their groups: by regime, a group's together, short ones first."""
    pairs = [
        (group, response)
        for group in sorted(groups, key=lambda group: group.longest)
        for response in sorted(group.responses, key=lambda response: len(response.tokens))
    ]
    return iter(sorted(pairs, key=lambda pair: regime(len(pair[0].prompt) + len(pair[1].tokens))))


def lay_out(models: Sequence[Any], part: Sequence[Group], device: torch.device) -> PackedBatch | SequenceBatch:
    """A micro-batch as one pass through each of the models."""
    return logprobs.lay_out(models, [(group.prompt, [one.tokens for one in group.responses]) for group in part], device)


def token_inputs(part: Sequence[Group], lengths: Sequence[int], device: torch.device) -> TokenInputs:
    """A micro-batch's inputs of the loss, but for the reference."""
    responses = [response for group in part for response in group.responses]
    repeats = torch.tensor(lengths, device=device)
    constants = torch.tensor([(one.advantage, one.coefficient) for one in responses], device=device)
    advantages, coefficients = constants.repeat_interleave(repeats, 0).unbind(1)
    behavior = torch.tensor([value for one in responses for value in one.logprobs], device=device)
    old = None
    if responses[0].old is not None:
        old = torch.tensor([value for one in responses for value in one.old or ()], device=device)
    return TokenInputs(behavior, advantages, coefficients, old)
