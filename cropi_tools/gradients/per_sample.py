"""The gradients of several prompts from one forward and one backward pass: the fast path for short prompts.

A small policy is done with one prompt before its operations have paid for their start. Here as many prompts as a pass holds lie in one
packed row. Automatic differentiation is asked for no parameter's gradient, which would be the sum over all prompts: hooks keep the input
of each module with trained parameters and catch the gradient of its output, and `fast_rules.py` makes each prompt's gradient from the
two. It is handed on as soon as a parameter is complete. The logits of a pass are held whole, so its response tokens are bounded.

This works where every trained parameter has a rule and prompts can be told apart on the row. Both are tried out on a few tokens against
automatic differentiation; where it does not, `NoRule` names the module, and the reference path (`gradients.py`) remains.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, zip_longest
from typing import Any

import torch

from cropi_tools.gradients.per_sample_rules import NoRule, Rows, RuledModule, refusal_of, ruled_modules
from cropi_tools.gradients.prompt_objective import (
    GradientSettings,
    GradientTask,
    PromptGradient,
    behavior_of_each,
    facts,
    token_gradients,
)
from cropi_tools.gradients.reference import TOKENS_PER_PASS, Consume, ReferenceGradients
from cropi_tools.objective import Terms
from cropi_tools.policy.layers import recomputes_activations
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import CHUNK_ELEMENTS, at_least_float32, has_plain_head, response_logprobs
from cropi_tools.policy.packing import PackedBatch, can_pack, packed, packed_batch, packs
from cropi_tools.policy.trials import trial_prompts, trial_tolerance

CPU_TOKENS = 2048  # on a CPU, where wider states leave its caches with more tokens than that
CPU_STATES = 1 << 17  # tokens times width of a pass on a CPU, which allows narrow policies more tokens
GRADIENT_BYTES = 1 << 28  # of one parameter's gradients, of all prompts of a pass, unless more are allowed
_TRIAL_BLOCK = 1 << 22  # coordinates that are compared at a time, in float64
_NOISE = 1e-2  # times the tolerance and the whole gradient: what is below counts as zero

Derive = Callable[[torch.Tensor], torch.Tensor]


class FastGradients:
    """Gradients of one policy's prompts, several a pass; `behavior` recomputes beta by the same forward pass.

    max_tokens: of one forward pass; on a CPU fewer, as many as make it faster. gradient_bytes: of one parameter's gradients, of all
    prompts of a pass, where GRADIENT_BYTES are too few. NoRule: a trained parameter lies in a module without a rule, or the model cannot
    be packed, does more than its output embedding to its last states, or recomputes activations.
    """

    def __init__(
        self,
        policy: Policy,
        settings: GradientSettings,
        behavior: Policy | None = None,
        max_tokens: int = TOKENS_PER_PASS,
        gradient_bytes: int = 0,
    ) -> None:
        model = policy.model
        kind = type(model).__name__
        if not can_pack(model):
            raise NoRule(f"{kind} gives other results when several prompts lie in one row")
        if not has_plain_head(model):
            raise NoRule(f"{kind} does more than its output embedding to its last states")
        if recomputes_activations(model):
            raise NoRule(f"{kind} recomputes activations, and would call every rule twice")
        self._policy, self._settings, self._behavior = policy, settings, behavior
        self._limit, self._gradient_bytes = max_tokens, gradient_bytes
        useful = max(CPU_TOKENS, CPU_STATES // model.get_input_embeddings().embedding_dim)
        self._max_tokens = min(max_tokens, useful) if policy.device.type == "cpu" else max_tokens
        self.parameters = policy.trained
        self._modules = ruled_modules(model)
        self._largest = max((p.nbytes for _, p in self.parameters), default=0)
        self._memory = torch.empty(0)
        self._reference: ReferenceGradients | None = None
        self._try_out()

    def room_for(self, tasks: Sequence[GradientTask], task: GradientTask) -> bool:
        """Whether `task` can be computed together with `tasks`; an empty batch always has room."""
        return not tasks or self._fits([*tasks, task])

    def _fits(self, tasks: Sequence[GradientTask]) -> bool:
        tokens = sum(len(task.prompt) + task.tokens for task in tasks)
        logits = sum(task.tokens for task in tasks) * self._policy.vocabulary
        gradients = len(tasks) * self._largest
        return (
            tokens <= self._max_tokens
            and logits <= CHUNK_ELEMENTS
            and (gradients <= max(GRADIENT_BYTES, self._gradient_bytes) or len(tasks) == 1)
            and packs([self._policy.model], (length for task in tasks for length in task.lengths))
        )

    def compute(self, tasks: Sequence[GradientTask], consume: Consume) -> list[PromptGradient]:
        """Hand the gradients of prompts' objectives to `consume`, parameter by parameter in no particular order.

        tasks: as many as `room_for` allows; a single one that is too long for a packed pass takes the reference path. consume(name,
        gradients): [len(tasks), *shape] in the number format of the parameter; on a CPU the memory is used again afterwards. Parameters
        no prompt reaches are left out. InputError: no behavior log-probabilities, or importance ratios that are not finite.
        """
        if not self._fits(tasks):
            (task,) = tasks
            if self._reference is None:
                self._reference = ReferenceGradients(self._policy, self._settings, self._behavior, self._limit)
            return self._reference.compute([task], consume)
        batch = packed_batch([(task.prompt, task.responses) for task in tasks], self._policy.device)
        behavior = behavior_of_each(tasks, batch, self._behavior, self._settings)
        found: list[Terms] = []

        def derive(logprobs: torch.Tensor) -> torch.Tensor:
            derivative, terms = self._token_gradients(tasks, batch, logprobs, behavior)
            found.extend(terms)
            return derivative

        self._differentiate(batch, derive, consume)
        weighting = self._settings.estimator.weighting
        return [
            PromptGradient("ok", facts(task, [terms], beta is not None, weighting), end - start)
            for task, terms, beta, start, end in zip(
                tasks, found, behavior, batch.bounds, batch.bounds[1:], strict=False
            )
        ]

    def _token_gradients(
        self,
        tasks: Sequence[GradientTask],
        batch: PackedBatch,
        logprobs: torch.Tensor,
        behavior: Sequence[torch.Tensor | None],
    ) -> tuple[torch.Tensor, list[Terms]]:
        """`token_gradients` of all tasks, [response tokens], and the terms of each."""
        pieces = _by_prompt(logprobs, batch)
        known = [own if beta is None else beta.to(own) for own, beta in zip(pieces, behavior, strict=True)]
        if self._settings.estimator.self_normalize:  # the one thing that mixes the responses of a prompt
            results = [
                token_gradients(task, range(len(task.responses)), own, beta, self._settings)
                for task, own, beta in zip(tasks, pieces, known, strict=True)
            ]
            return torch.cat([derivative for derivative, _ in results]), [terms for _, terms in results]
        together = GradientTask(
            tasks[0].rollout,
            [response for task in tasks for response in task.responses],
            [advantage for task in tasks for advantage in task.advantages],
            [coefficient for task in tasks for coefficient in task.coefficients],
        )
        derivative, terms = token_gradients(
            together, range(len(together.responses)), logprobs, torch.cat(known), self._settings
        )
        return derivative, [Terms(*parts) for parts in zip(*(_by_prompt(each, batch) for each in terms), strict=True)]

    def _differentiate(self, batch: PackedBatch, derive: Derive, consume: Consume) -> None:
        """Per-prompt gradients of an objective with the derivative derive(logprobs) by them, both [response tokens]."""
        model = self._policy.model
        head = model.get_output_embeddings()
        current = _Pass(self.parameters, head, batch, consume, self._room)
        with current.watching(self._modules), packed(model, batch):
            logits = head(batch.select(batch.forward(model.base_model).last_hidden_state))
            logits.backward(self._logit_gradient(logits.detach(), batch.targets, derive))
        current.finish()

    def _logit_gradient(self, logits: torch.Tensor, targets: torch.Tensor, derive: Derive) -> torch.Tensor:
        """The derivative by the logits [tokens, vocabulary]: that of log softmax(logits / temperature), written out."""
        temperature = self._settings.policy_temperature
        wide = at_least_float32(logits)
        table = torch.log_softmax(wide / temperature if temperature != 1.0 else wide, -1)
        chosen = targets[:, None]
        derivative = derive(table.gather(-1, chosen)[:, 0])[:, None] / temperature
        return table.exp_().mul_(-derivative).scatter_add_(-1, chosen, derivative).to(logits.dtype)

    def _room(self, prompts: int, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Memory for the gradients of a parameter that are consumed at once, [prompts, *shape]; on a CPU always the same."""
        shape = (prompts, *parameter.shape)
        if parameter.device.type != "cpu":  # where a consumer may still be reading when the next gradient comes
            return parameter.new_empty(shape)
        size = prompts * parameter.numel()
        if self._memory.numel() < size or self._memory.dtype != parameter.dtype:
            self._memory = parameter.new_empty(size)
        return self._memory[:size].view(shape)

    def _try_out(self) -> None:
        """Compare with automatic differentiation on two prompts of a few tokens. NoRule: some module's gradient differs."""
        model = self._policy.model
        batch = packed_batch(trial_prompts(self._policy.vocabulary), self._policy.device)
        derivative = torch.linspace(-1, 1, len(batch.targets), device=self._policy.device)
        first = batch.response_bounds[1]
        with packed(model, batch):
            logprobs, _ = response_logprobs(model, batch, self._settings.policy_temperature)
            objective = (logprobs * derivative)[:first].sum()
            found = torch.autograd.grad(objective, [p for _, p in self.parameters], allow_unused=True)
        expected = {name: g for (name, _), g in zip(self.parameters, found, strict=True) if g is not None}
        del found
        whole = sum(_norm(gradient) ** 2 for gradient in expected.values()) ** 0.5

        def compare(name: str, gradients: torch.Tensor) -> None:
            known = expected.pop(name, None)
            size = 0.0 if known is None else _norm(known)
            allowed = trial_tolerance(gradients.dtype) * (size + _NOISE * whole)
            if not _norm(gradients[0], known) <= allowed:
                raise refusal_of(model, name)

        self._differentiate(batch, lambda logprobs: derivative.to(logprobs), compare)
        for name in expected:  # what no module was seen to use
            raise refusal_of(model, name)


class _Pass:
    """One forward and backward pass: its rows, and which parameters' gradients are not complete yet."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        head: Any,
        batch: PackedBatch,
        consume: Consume,
        room: Callable[[int, torch.nn.Parameter], torch.Tensor],
    ) -> None:
        self._names = {parameter: name for name, parameter in parameters}
        self._head, self._consume, self._room = head, consume, room
        device = batch.input_ids.device
        self._body, self._responses = Rows(batch.bounds, device), Rows(batch.response_bounds, device)
        self._awaited: Counter[torch.nn.Parameter] = Counter()  # uses of a parameter whose gradient has not come
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}  # of parameters used more than once

    @contextlib.contextmanager
    def watching(self, modules: Sequence[RuledModule]) -> Iterator[None]:
        """Catch what the modules take and what their outputs' gradients are; meanwhile no parameter has a gradient of its own."""
        with contextlib.ExitStack() as stack:
            for parameter in self._names:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            for ruled in modules:
                handle = ruled.module.register_forward_hook(
                    lambda _, inputs, output, ruled=ruled: self._called(ruled, inputs, output)
                )
                stack.callback(handle.remove)
            yield

    def _called(self, ruled: RuledModule, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """A module was called: wait for the gradient of its output, which is where the graph begins if nothing below is trained."""
        rows = self._responses if ruled.module is self._head else self._body
        if not inputs or output.shape[: 1 if rows is self._responses else 2].numel() != rows.tokens:
            raise ruled.refusal()  # it is called in an unusual way, or sees a selection of the tokens
        states = inputs[0].detach()
        if not output.requires_grad:
            output.requires_grad_()
        self._awaited.update(parameter for parameter, _ in ruled.rules)
        output.register_hook(lambda gradient: self._arrived(ruled, states, gradient, rows))

    def _arrived(self, ruled: RuledModule, states: torch.Tensor, gradient: torch.Tensor, rows: Rows) -> None:
        for parameter, rule in ruled.rules:
            self._awaited[parameter] -= 1
            target, fresh = self._sums.pop(parameter, None), False
            if target is None:
                fresh = True
                target = (
                    parameter.new_empty(rows.prompts, *parameter.shape)
                    if self._awaited[parameter]
                    else self._room(rows.prompts, parameter)
                )
            rule(ruled.module, states, gradient, rows, target, fresh)
            if self._awaited[parameter]:
                self._sums[parameter] = target
            else:
                self._consume(self._names[parameter], target)

    def finish(self) -> None:
        """Hand on the gradients that waited for a use which has no part in the objective."""
        while self._sums:
            parameter, gradients = self._sums.popitem()
            self._consume(self._names[parameter], gradients)


def _norm(tensor: torch.Tensor, other: torch.Tensor | None = None) -> float:
    """The norm of a tensor, or of its difference from another, in float64, without a copy of a large one in that format."""
    total = 0.0
    others = [None] if other is None else other.reshape(-1).split(_TRIAL_BLOCK)
    for block, known in zip_longest(tensor.reshape(-1).split(_TRIAL_BLOCK), others):
        wide = block.double() if known is None else block.double() - known.double()
        total += float(wide.square().sum())
    return total**0.5


def _by_prompt(values: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, ...]:
    """Values of response tokens [T, ...], cut by prompt."""
    bounds = batch.response_bounds
    return values.split([end - start for start, end in pairwise(bounds)])
