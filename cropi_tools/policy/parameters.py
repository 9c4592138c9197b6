"""Which parameters of a policy have gradients: all, some by name, or low-rank adapters put beside its linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from cropi_tools.policy.adapters import put_adapters
from cropi_tools.policy.loading import Policy
from cropi_tools.runtime.errors import UsageError


def train_only(policy: Policy, patterns: Sequence[str]) -> None:
    """Freeze the parameters that no pattern (as a shell's: *, ?, [...]) matches. UsageError: a pattern matches none."""
    parameters = dict(policy.model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UsageError(f"--params {pattern}: no parameter of that name; the first is {next(iter(parameters))}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


def add_adapters(policy: Policy, rank: int, seed: int) -> None:
    """Put fresh low-rank adapters (LoRA) beside all linear layers but the head; only they have gradients then.

    The policy's function does not change: of W + B A the first factor A is random (from `seed`), B is zero. So A's gradient is zero, and
    A is frozen; the gradient of B is that of W seen through A. CropiError: peft is not installed. InputError: it cannot adapt this model.
    """
    put_adapters(policy, rank, rank, seed)
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
