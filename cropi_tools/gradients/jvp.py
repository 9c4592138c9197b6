"""Forward-mode influence: inner products of prompts' gradients with directions, without a gradient (docs/method.md, "Influence").

With l_t the log-probability of response token t, the gradient of a prompt's objective is the sum of w_t grad l_t, where w_t is the
derivative of the objective by l_t (`token_gradients`). So

    <g, v> = sum of w_t dl_t / de, the derivative of l_t at theta + e v,

and one forward pass that carries derivatives along v gives dl_t / de for all tokens of a batch of prompts. The weights follow from the
log-probabilities of the same pass: every weighting and clip, and halves of the responses (`inner_of`), need no other. There is no norm.

Two ways to carry derivatives: by the rules of `forward_rules.py`, all directions in one pass, and by automatic differentiation, one pass
a direction. The first is taken where, on a few tokens, it agrees with the second. Derivatives are computed in the number format of the
weights, as log-probabilities are, and are as precise: an inner product's error is far below 1e-4 of |g||v| / sqrt(parameters) with
float32, and some tenths of that measure with bfloat16.

What it costs. A linear layer takes three matrix products, as many as its forward and backward pass, so the gain is only what gradients
cost beyond them: forming, measuring and sketching one per prompt. Each further direction takes two products more, where a gradient at
hand takes next to nothing: with several directions gradients become the cheaper way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.func import functional_call

from cropi_tools.gradients.accumulator import Direction, keep_on_device
from cropi_tools.gradients.jvp_rules import carried_logprobs
from cropi_tools.gradients.prompt_objective import (
    GradientSettings,
    GradientTask,
    PromptGradient,
    batch_of,
    batch_tokens,
    behavior_logprobs,
    behavior_of_each,
    facts,
    passes,
    token_gradients,
)
from cropi_tools.gradients.reference import TOKENS_PER_PASS
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import SequenceBatch, has_plain_head, response_logprobs, sequence_batch
from cropi_tools.policy.packing import (
    PackedBatch,
    attending_by,
    can_pack,
    packed,
    packed_batch,
    packs,
)
from cropi_tools.policy.trials import rounding, trial_prompts, trial_tolerance
from cropi_tools.runtime.errors import InputError, first_line

TOKENS_TOGETHER = 1200  # of several prompts in one pass on a CPU: with more, states and derivatives leave its caches


class Forward(NamedTuple):
    """What forward mode gives for one prompt. For each response token, [T]: its log-probability, that under the behavior policy if
    known, its derivative along each direction. lengths: tokens of each response. inner: the inner product with each direction. flat: the
    objective does not depend on any of them (all clipped), so there is no gradient.
    """

    gradient: PromptGradient
    logprobs: torch.Tensor
    behavior: torch.Tensor | None
    tangents: dict[str, torch.Tensor]
    lengths: list[int]
    inner: dict[str, float]
    flat: bool


class ForwardMode:
    """Inner products of prompts' gradients with directions; `behavior` recomputes beta by the same forward pass.

    directions: one or more, by name; where one has no part of a parameter, it does not move it, and frozen parameters never move.
    max_tokens: of one forward pass. InputError: something in the model has no forward-mode derivative.
    """

    def __init__(
        self,
        policy: Policy,
        settings: GradientSettings,
        directions: Mapping[str, Direction],
        behavior: Policy | None = None,
        max_tokens: int = TOKENS_PER_PASS,
    ) -> None:
        self._policy, self._settings, self._behavior, self._max_tokens = policy, settings, behavior, max_tokens
        self._directions: dict[str, Any] = dict(directions)
        keep_on_device(self._directions, policy.device)
        self.parameters = policy.trained
        self._names = {parameter: name for name, parameter in self.parameters}
        self.by_rules = self._rules_hold()

    def room_for(self, tasks: Sequence[GradientTask], task: GradientTask) -> bool:
        """Whether `task` can be computed together with `tasks`; an empty batch always has room."""
        if not tasks:
            return True
        tokens = sum(len(one.prompt) + one.tokens for one in [*tasks, task])
        together = TOKENS_TOGETHER if self._policy.device.type == "cpu" else self._max_tokens
        lengths = (length for one in [*tasks, task] for length in one.lengths)
        return tokens <= min(self._max_tokens, together) and packs([self._policy.model], lengths)

    def compute(self, tasks: Sequence[GradientTask]) -> list[Forward]:
        """The derivatives of prompts' log-probabilities and the inner products.

        tasks: as many as `room_for` allows. InputError: no behavior log-probabilities, importance ratios that are not finite, or a
        model without forward-mode derivatives.
        """
        if len(tasks) == 1:
            return [self._alone(tasks[0])]
        batch = packed_batch([(task.prompt, task.responses) for task in tasks], self._policy.device)
        behavior = behavior_of_each(tasks, batch, self._behavior, self._settings)
        logprobs, tangents = self._differentiate(batch)
        sizes = [task.tokens for task in tasks]
        rows = [end - start for start, end in pairwise(batch.bounds)]
        pieces = zip(tasks, logprobs.split(sizes), tangents.split(sizes, 1), behavior, rows, strict=True)
        return [self._result(*piece) for piece in pieces]

    def _alone(self, task: GradientTask) -> Forward:
        """One prompt, in several passes if need be."""
        tokens, found, behavior = 0, [], []
        for rows in passes(self._policy.model, task, self._max_tokens):
            batch = batch_of(self._policy, task, rows)
            tokens += batch_tokens(batch)
            behavior.append(behavior_logprobs(task, rows, batch, self._behavior, self._settings))
            found.append(self._differentiate(batch))
        logprobs, tangents = torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found], 1)
        known = [part for part in behavior if part is not None]
        return self._result(task, logprobs, tangents, torch.cat(known) if len(known) == len(found) else None, tokens)

    def _result(
        self,
        task: GradientTask,
        logprobs: torch.Tensor,
        tangents: torch.Tensor,
        behavior: torch.Tensor | None,
        tokens: int,
    ) -> Forward:
        derivative, terms = token_gradients(task, range(len(task.responses)), logprobs, behavior, self._settings)
        inner = (tangents.double() @ derivative.double()).tolist()
        entry = facts(task, [terms], behavior is not None, self._settings.estimator.weighting)
        return Forward(
            PromptGradient("ok", entry, tokens),
            logprobs,
            behavior,
            dict(zip(self._directions, tangents, strict=True)),
            [len(response) for response in task.responses],
            dict(zip(self._directions, inner, strict=True)),
            not bool(derivative.any()),
        )

    def _differentiate(self, batch: SequenceBatch | PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [T] of a batch's response tokens, and their derivatives [directions, T]."""
        if self.by_rules and isinstance(batch, PackedBatch):
            return self._by_rules_of(batch)
        return self._automatic(batch)

    def _by_rules_of(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        temperature = self._settings.policy_temperature
        return carried_logprobs(self._policy.model, batch, temperature, self._tangents, len(self._directions))

    def _tangents(self, parameter: torch.nn.Parameter) -> list[tuple[int, torch.Tensor]]:
        """How each direction moves a parameter."""
        name = self._names.get(parameter)
        if name is None:
            return []
        parts = ((row, one.get(name, parameter.device)) for row, one in enumerate(self._directions.values(), 1))
        return [(row, part.view_as(parameter).to(parameter.dtype)) for row, part in parts if part is not None]

    def _automatic(self, batch: SequenceBatch | PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """By automatic differentiation in forward mode, one pass a direction."""
        model = _LogProbabilities(self._policy.model)
        moving = [(name, dict(self._tangents(parameter))) for name, parameter in self.parameters]
        logprobs, tangents = torch.empty(0), []
        for row in range(1, 1 + len(self._directions)):
            with torch.no_grad(), _elementary_attention(self._policy.model, batch), forward_ad.dual_level():
                weights = dict(self.parameters)
                duals = {
                    f"model.{name}": forward_ad.make_dual(weights[name].detach(), parts[row])
                    for name, parts in moving
                    if row in parts
                }
                try:
                    found = functional_call(model, duals, (batch, self._settings.policy_temperature))
                except NotImplementedError as error:
                    reason = first_line(error)
                    raise InputError(
                        f"{self._policy.folder}: has no forward-mode derivatives ({reason}); use --method reference"
                    ) from None
                logprobs, tangent = forward_ad.unpack_dual(found)
                tangents.append(torch.zeros_like(logprobs) if tangent is None else tangent)
        return logprobs, torch.stack(tangents)

    def _rules_hold(self) -> bool:
        """Whether the rules give, on a few tokens and along a random direction, what automatic differentiation does.

        Not along the directions at hand: these may leave the few tokens where they are, and would show nothing.
        """
        asked, self._directions = self._directions, {"trial": _RandomDirection(self.parameters)}
        try:
            return self._trial()
        finally:
            self._directions = asked

    def _trial(self) -> bool:
        model = self._policy.model
        prompts = trial_prompts(self._policy.vocabulary)
        if not can_pack(model):
            pairs = [(prompt, response) for prompt, responses in prompts for response in responses]
            rows = sequence_batch(pairs, self._policy.device)
            found, _ = self._automatic(rows)
            with torch.no_grad():
                known, _ = response_logprobs(model, rows, self._settings.policy_temperature)
            if not (found - known).abs().max() <= rounding(model.dtype):
                raise InputError(
                    f"{self._policy.folder}: {type(model).__name__} gives other log-probabilities with attention in elementary operations, "
                    "which forward-mode derivatives need; use --method reference"
                )
            return False
        batch = packed_batch(prompts, self._policy.device)
        expected = torch.cat([found.reshape(-1, len(batch.targets)) for found in self._automatic(batch)])
        if not has_plain_head(model):
            return False
        try:
            found = torch.cat([found.reshape(-1, len(batch.targets)) for found in self._by_rules_of(batch)])
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):  # whatever a model makes of more rows
            return False
        allowed = trial_tolerance(next(model.parameters()).dtype) * expected.norm(dim=1)
        return bool(((found - expected).norm(dim=1) <= allowed).all())


def inner_of(
    forward: Forward, task: GradientTask, rows: Sequence[int], settings: GradientSettings
) -> dict[str, float] | None:
    """The inner products of another task over some of the same responses, `rows` in order, from the derivatives at hand.

    task: with advantages and coefficients of its own, as `prepare` makes it of those samples. None: it has no gradient.
    """
    if len(rows) == 0 or sum(forward.lengths[row] for row in rows) != task.tokens:
        raise ValueError(f"the task of prompt '{task.rollout.id}' has other responses than rows {list(rows)}")
    behavior = None if forward.behavior is None else _taken(forward, forward.behavior, rows)
    logprobs = _taken(forward, forward.logprobs, rows)
    derivative = token_gradients(task, range(len(rows)), logprobs, behavior, settings)[0].double()
    if not derivative.any():
        return None
    return {name: float(derivative @ _taken(forward, each, rows).double()) for name, each in forward.tangents.items()}


def _taken(forward: Forward, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Of one value a response token those of some responses."""
    pieces = values.split(forward.lengths)
    return torch.cat([pieces[row] for row in rows])


class _RandomDirection:
    """A direction that moves every trained parameter at random, the same each time it is asked."""

    def __init__(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        self._sizes = {name: parameter.numel() for name, parameter in parameters}

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        """The part of a parameter, flat float32 on `device`."""
        draw = torch.Generator().manual_seed(len(name) + self._sizes[name])
        return torch.empty(self._sizes[name]).uniform_(-1, 1, generator=draw).to(device)


class _LogProbabilities(torch.nn.Module):
    """Response log-probabilities as a module, so that the parameters in them can be replaced."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SequenceBatch | PackedBatch, temperature: float) -> torch.Tensor:
        return response_logprobs(self.model, batch, temperature)[0]


@contextlib.contextmanager
def _elementary_attention(model: Any, batch: SequenceBatch | PackedBatch) -> Iterator[None]:
    """Attention in operations that have forward-mode derivatives."""
    how = packed(model, batch, plain=True) if isinstance(batch, PackedBatch) else attending_by(model, "eager")
    with how:
        yield
