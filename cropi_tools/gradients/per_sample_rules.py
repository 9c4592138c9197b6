"""The gradient of a module's parameters, prompt by prompt, from its input and the gradient of its output.

A module works token by token on a row in which each prompt's tokens lie together. The gradient of a weight is a sum over tokens, so a
prompt's own is the same sum over its part of the row. With x_t the input and d_t the gradient of the output at token t:

    Linear      W[o, i]: sum of d_t[o] x_t[i]                bias: sum of d_t
    Embedding   E[id]:   sum of d_t where x_t is that id
    norms       w: sum of d_t n(x_t), n the normalized input, whether the module multiplies by w or by 1 + w; bias: sum of d_t

`rule_of` names the rule of a parameter, or none. It goes by the class alone; whoever takes the rules tries them out against automatic
differentiation before they are trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cropi_tools.policy.logprobs import at_least_float32
from cropi_tools.runtime.errors import UsageError


class NoRule(UsageError):
    """Gradients cannot be told apart by prompt with this policy and these parameters; the message says why."""


class Rows:
    """Which tokens of a row belong to which prompt: those of prompt i from bounds[i] up to bounds[i + 1]."""

    def __init__(self, bounds: Sequence[int], device: torch.device) -> None:
        self.bounds, self._device = list(bounds), device
        width = self.bounds[1]
        self._even = width > 0 and self.bounds == list(range(0, self.tokens + 1, width))
        self._membership: dict[torch.dtype, torch.Tensor] = {}

    @property
    def prompts(self) -> int:
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    def parts(self, prompts: int) -> Iterator[tuple[slice, slice, Rows]]:
        """At most so many prompts at a time: which ones, which tokens, and their own rows."""
        for first in range(0, self.prompts, prompts):
            bounds = self.bounds[first : first + prompts + 1]
            own = Rows([bound - bounds[0] for bound in bounds], self._device)
            yield slice(first, first + own.prompts), slice(bounds[0], bounds[-1]), own

    @cached_property
    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of each prompt's tokens, [prompts, longest], 0 where it has no more; and where it has one, 1.0, else 0.0."""
        sizes, starts = torch.tensor(self.bounds).diff()[:, None], torch.tensor(self.bounds[:-1])[:, None]
        count = torch.arange(int(sizes.max()))
        inside = count < sizes
        return torch.where(inside, starts + count, 0).to(self._device), inside.float().to(self._device)

    @cached_property
    def prompt_of(self) -> torch.Tensor:
        """The prompt of each token, [tokens]."""
        sizes = torch.tensor(self.bounds).diff()
        return torch.arange(self.prompts).repeat_interleave(sizes).to(self._device)

    def products(self, left: torch.Tensor, right: torch.Tensor, target: torch.Tensor, fresh: bool) -> None:
        """target[i] = (fresh) or += left[tokens of i].T @ right[tokens of i]; left [tokens, m], right [tokens, n]."""
        beta = 0 if fresh else 1  # 0: what stands in the target is not read
        if self._even:  # one call for all, a fifth faster where prompts are short
            left, right = (states.unflatten(0, (self.prompts, -1)) for states in (left, right))
            torch.baddbmm(target, left.transpose(1, 2), right, beta=beta, out=target)
            return
        for row, start, end in zip(target, self.bounds, self.bounds[1:], strict=False):
            torch.addmm(row, left[start:end].T, right[start:end], beta=beta, out=row)

    def sums(self, states: torch.Tensor, target: torch.Tensor, fresh: bool) -> None:
        """target[i] = (fresh) or += the sum of states [tokens, ...] over the tokens of prompt i."""
        flat = target.view(self.prompts, -1)
        torch.addmm(
            flat, self._members(states.dtype), states.reshape(self.tokens, -1), beta=0 if fresh else 1, out=flat
        )

    def _members(self, dtype: torch.dtype) -> torch.Tensor:
        """1 where a token belongs to a prompt, else 0, [prompts, tokens]."""
        if dtype not in self._membership:
            numbers = torch.arange(self.prompts, device=self._device)
            self._membership[dtype] = (self.prompt_of == numbers[:, None]).to(dtype)
        return self._membership[dtype]


Rule = Callable[[Any, torch.Tensor, torch.Tensor, Rows, torch.Tensor, bool], None]


def rule_of(module: Any, name: str) -> Rule | None:
    """The rule for a module's own parameter `name`, or None.

    rule(module, states, gradient, rows, target, fresh): states, the module's input, and gradient, of its output, both over the tokens of
    `rows`; fills target [prompts, *shape] (fresh), or adds to it. A subclass has its class's rule unless it computes in another way.
    """
    forward = type(module).forward
    rules: dict[str, Rule] = {}
    if forward is nn.Linear.forward:
        rules = {"weight": linear, "bias": _sum}
    elif forward is Conv1D.forward:
        rules = {"weight": transposed_linear, "bias": _sum}
    elif _is_embedding(module):
        rules = {"weight": embedding}
    elif forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1:
        rules = {"weight": _layer_norm, "bias": _layer_norm_bias}
    elif type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None:
        rules = {"weight": _rms_norm}
    return rules.get(name)


class RuledModule(NamedTuple):
    """A module with trained parameters: its name in the model, and each parameter with its rule."""

    name: str
    module: Any
    rules: list[tuple[torch.nn.Parameter, Rule]]

    def refusal(self) -> NoRule:
        return refusal(self.name, self.module)


def ruled_modules(model: Any) -> list[RuledModule]:
    """The modules with trained parameters; NoRule if one of these has no rule."""
    found = []
    for name, module in model.named_modules():
        rules = []
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            rule = rule_of(module, own)
            if rule is None:
                raise refusal(name, module)
            rules.append((parameter, rule))
        if rules:
            found.append(RuledModule(name, module, rules))
    return found


def refusal(name: str, module: Any) -> NoRule:
    return NoRule(f"{name} ({type(module).__name__}) has no rule for per-prompt gradients")


def refusal_of(model: Any, parameter: str) -> NoRule:
    """The refusal of the module that a parameter belongs to."""
    name = parameter.rpartition(".")[0]
    return refusal(name, model.get_submodule(name))


def _is_embedding(module: Any) -> bool:
    """Whether it gives the rows of its weight, perhaps times its `embed_scale` (Gemma)."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return False
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def linear(
    module: Any, states: torch.Tensor, gradient: torch.Tensor, rows: Rows, target: torch.Tensor, fresh: bool
) -> None:
    rows.products(gradient.reshape(rows.tokens, -1), states.reshape(rows.tokens, -1), target, fresh)


def transposed_linear(
    module: Any, states: torch.Tensor, gradient: torch.Tensor, rows: Rows, target: torch.Tensor, fresh: bool
) -> None:
    """The Conv1D of GPT-2: a linear layer with the weight [in, out]."""
    rows.products(states.reshape(rows.tokens, -1), gradient.reshape(rows.tokens, -1), target, fresh)


def _sum(
    module: Any, states: torch.Tensor, gradient: torch.Tensor, rows: Rows, target: torch.Tensor, fresh: bool
) -> None:
    """Of a bias."""
    rows.sums(gradient, target, fresh)


def embedding(
    module: Any, states: torch.Tensor, gradient: torch.Tensor, rows: Rows, target: torch.Tensor, fresh: bool
) -> None:
    if fresh:
        target.zero_()
    places = rows.prompt_of * module.num_embeddings + states.reshape(-1)
    target.view(-1, target.shape[-1]).index_add_(0, places, row_gradients(module, states, gradient).to(target.dtype))


def row_gradients(module: Any, ids: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Of an embedding, what each token adds to the gradient of the row of its id, [tokens, width]."""
    found = gradient.reshape(ids.numel(), -1)
    if module.padding_idx is not None:  # this row learns nothing as an input
        found = found.masked_fill((ids.reshape(-1) == module.padding_idx)[:, None], 0)
    if hasattr(module, "embed_scale"):
        found = found * module.embed_scale
    return found


def _layer_norm(
    module: Any, states: torch.Tensor, gradient: torch.Tensor, rows: Rows, target: torch.Tensor, fresh: bool
) -> None:
    normalized = functional.layer_norm(states, module.normalized_shape, eps=module.eps)
    rows.sums(_over_heads(gradient * normalized), target, fresh)


def _layer_norm_bias(
    module: Any, states: torch.Tensor, gradient: torch.Tensor, rows: Rows, target: torch.Tensor, fresh: bool
) -> None:
    rows.sums(_over_heads(gradient), target, fresh)


def _rms_norm(
    module: Any, states: torch.Tensor, gradient: torch.Tensor, rows: Rows, target: torch.Tensor, fresh: bool
) -> None:
    wide = at_least_float32(states)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(_epsilon(module)))
    rows.sums(_over_heads(gradient * (wide * scale).to(states.dtype)), target, fresh)


def _over_heads(products: torch.Tensor) -> torch.Tensor:
    """Of the whole state as it is; of each head's [..., heads, size], with one weight [size] for all heads, the sum over heads."""
    return products.sum(2) if products.dim() == 4 else products


def _epsilon(module: Any) -> Any:
    """What the module adds to the mean square, under the names there are for it; None: a module of another kind."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
