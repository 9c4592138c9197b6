"""The gradient of one prompt from its stored rollouts, the reference path: one prompt a backward pass.

Each parameter's gradient is handed on as soon as the backward pass has it (norm, inner products, sketch) and is freed, so that memory
stays at weights, activations and one parameter. A prompt of more tokens than `max_tokens` takes several passes; then, and only then, its
gradient is summed up, in float32, before it is handed on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from cropi_tools.gradients.prompt_objective import (
    GradientSettings,
    GradientTask,
    PromptGradient,
    batch_of,
    batch_tokens,
    behavior_logprobs,
    facts,
    passes,
    token_gradients,
)
from cropi_tools.policy.layers import checkpoint_activations
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import at_least_float32, response_logprobs
from cropi_tools.policy.packing import attending

TOKENS_PER_PASS = 16384
Consume = Callable[[str, torch.Tensor], None]


class ReferenceGradients:
    """Gradients of one policy's prompts; `behavior` recomputes beta by the same forward pass, at the policy temperature.

    max_tokens: of one forward pass, bounds activations. recompute: activations of each layer are computed again in the backward pass
    instead of kept (gradient checkpointing).
    """

    def __init__(
        self,
        policy: Policy,
        settings: GradientSettings,
        behavior: Policy | None = None,
        max_tokens: int = TOKENS_PER_PASS,
        recompute: bool = False,
    ) -> None:
        self._policy, self._settings, self._behavior, self._max_tokens = policy, settings, behavior, max_tokens
        self.parameters = policy.trained
        if recompute:
            checkpoint_activations(policy.model)

    def room_for(self, tasks: Sequence[GradientTask], task: GradientTask) -> bool:
        """Whether `task` can be computed together with `tasks`: never, it is one prompt a backward pass."""
        return not tasks

    def compute(self, tasks: Sequence[GradientTask], consume: Consume) -> list[PromptGradient]:
        """Hand the gradient of a prompt's objective to `consume`, parameter by parameter in no particular order.

        tasks: one. consume(name, gradients): [1, ...] in the number format of the parameter; freed afterwards. Parameters the prompt
        does not reach are left out. InputError: no behavior log-probabilities, or importance ratios that are not finite.
        """
        (task,) = tasks
        parts = passes(self._policy.model, task, self._max_tokens)
        mean_weight = None
        if self._settings.estimator.self_normalize and len(parts) > 1:
            mean_weight = self._mean_weight(task, parts)
        sums: dict[str, torch.Tensor] = {}

        def arrived(name: str, gradient: torch.Tensor) -> None:
            if len(parts) == 1:
                consume(name, gradient[None])
            elif name in sums:
                sums[name] += gradient
            else:
                sums[name] = at_least_float32(gradient)

        terms, tokens, measured = [], 0, True
        for rows in parts:
            batch = batch_of(self._policy, task, rows)
            with attending(self._policy.model, batch):
                logprobs, _ = response_logprobs(self._policy.model, batch, self._settings.policy_temperature)
                behavior = behavior_logprobs(task, rows, batch, self._behavior, self._settings)
                derivative, found = token_gradients(
                    task, rows, logprobs.detach(), behavior, self._settings, mean_weight
                )
                with self._handing_on(arrived):
                    logprobs.backward(derivative)
            terms.append(found)
            measured = measured and behavior is not None
            tokens += batch_tokens(batch)
        for name in list(sums):
            consume(name, sums.pop(name)[None])
        return [PromptGradient("ok", facts(task, terms, measured, self._settings.estimator.weighting), tokens)]

    def _mean_weight(self, task: GradientTask, parts: list[range]) -> float:
        """The mean of the weights that self-normalization divides by, over all passes."""
        total = 0.0
        one = self._settings._replace(estimator=self._settings.estimator._replace(self_normalize=False))
        for rows in parts:
            batch = batch_of(self._policy, task, rows)
            with torch.no_grad(), attending(self._policy.model, batch):
                logprobs, _ = response_logprobs(self._policy.model, batch, one.policy_temperature)
                behavior = behavior_logprobs(task, rows, batch, self._behavior, one)
                weights = token_gradients(task, rows, logprobs, behavior, one)[1].weights
            clip = one.estimator.weight_clip
            total += float((weights if clip is None else weights.clamp(*clip)).double().sum())
        return total / task.tokens

    @contextlib.contextmanager
    def _handing_on(self, arrived: Consume) -> Iterator[None]:
        """During a backward pass: every parameter's gradient goes to `arrived` when it is complete, and is freed."""

        def hook(name: str) -> Callable[[torch.Tensor], None]:
            def hand_on(parameter: torch.Tensor) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None  # the hook is called when it has been accumulated
                arrived(name, gradient)

            return hand_on

        for _, parameter in self.parameters:
            parameter.grad = None  # of whatever came before: it would be added to
        hooks = [parameter.register_post_accumulate_grad_hook(hook(name)) for name, parameter in self.parameters]
        try:
            yield
        finally:
            for registered in hooks:
                registered.remove()
            for _, parameter in self.parameters:
                parameter.grad = None
