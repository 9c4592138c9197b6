"""Which way cropi-grad differentiates: several short prompts a pass where the model allows it and is small, else one prompt a pass."""

from __future__ import annotations

from typing import Literal

from cropi_tools import runtime
from cropi_tools.gradients.estimates import GradientPath
from cropi_tools.gradients.per_sample import GRADIENT_BYTES, FastGradients
from cropi_tools.gradients.per_sample_rules import NoRule
from cropi_tools.gradients.prompt_objective import GradientSettings
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.policy.loading import Policy
from cropi_tools.runtime.clock import starting

Method = Literal["auto", "reference", "fast"]


@starting()
def choose_path(
    method: Method,
    policy: Policy,
    settings: GradientSettings,
    behavior: Policy | None,
    max_tokens: int,
    recompute: bool,
) -> GradientPath:
    """The path of a method.

    `auto`: the fast path, but the reference path for policies so large that two prompts' gradients of a parameter would pass the fast
    path's memory, where activations are recomputed, and where a module has no rule, which is said. NoRule: the method is `fast`, and a
    module has none.
    """
    if method == "fast":
        try:
            return FastGradients(policy, settings, behavior, max_tokens)
        except NoRule as reason:
            raise NoRule(f"--method fast: {reason}; use --method auto or reference") from None
    reference = ReferenceGradients(policy, settings, behavior, max_tokens, recompute)
    large = any(2 * parameter.nbytes > GRADIENT_BYTES for _, parameter in reference.parameters)
    if method == "reference" or recompute or large:
        return reference
    try:
        return FastGradients(policy, settings, behavior, max_tokens)
    except NoRule as reason:
        runtime.notify(f"one prompt a pass: {reason}")
        return reference
