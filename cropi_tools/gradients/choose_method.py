"""Which way cropi-grad differentiates: several short prompts a pass where the model allows it and memory holds it, else one prompt a pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from cropi_tools import runtime
from cropi_tools.gradients.estimates import GradientPath
from cropi_tools.gradients.per_sample import GRADIENT_BYTES, FastGradients
from cropi_tools.gradients.per_sample_rules import NoRule
from cropi_tools.gradients.prompt_objective import GradientSettings
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.policy.loading import Policy
from cropi_tools.runtime.clock import starting
from cropi_tools.runtime.estimate import in_bytes
from cropi_tools.runtime.limits import memory_limit

Method = Literal["auto", "reference", "fast"]

PARTS = 4  # of memory: a large policy's gradients may take one, weights, activations and means have the others


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

    `auto`: the fast path, but the reference path where activations are recomputed, for large policies where memory does not hold two
    prompts' gradients, and where a module has no rule; the last two are said. NoRule: the method is `fast`, and a module has none.
    """
    room = _Room.of(policy)
    if method == "fast":
        try:
            return FastGradients(policy, settings, behavior, max_tokens, room.gradient_bytes)
        except NoRule as reason:
            raise NoRule(f"--method fast: {reason}; use --method auto or reference") from None
    reference = ReferenceGradients(policy, settings, behavior, max_tokens, recompute)
    if method == "reference" or recompute:
        return reference
    if room.large and not room.enough:
        runtime.notify(f"one prompt a pass: the gradients of two would take {room.told('more')}")
        return reference
    try:
        path = FastGradients(policy, settings, behavior, max_tokens, room.gradient_bytes)
    except NoRule as reason:
        runtime.notify(f"one prompt a pass: {reason}")
        return reference
    if room.large:
        runtime.notify(f"two short prompts a pass: their gradients take {room.told('no more')}")
    return path


class _Room(NamedTuple):
    """What the gradients of two prompts take, and what there is, in bytes.

    two: of the largest parameter. needed: these, and all of one prompt, which are held while the fast path is tried out.
    """

    two: int
    needed: int
    memory: int
    device: torch.device

    @classmethod
    def of(cls, policy: Policy) -> _Room:
        sizes = [parameter.nbytes for _, parameter in policy.trained]
        two = 2 * max(sizes, default=0)
        return cls(two, two + sum(sizes), device_memory(policy.device), policy.device)

    @property
    def large(self) -> bool:
        """Whether the fast path's usual memory does not hold them."""
        return self.two > GRADIENT_BYTES

    @property
    def enough(self) -> bool:
        return PARTS * self.needed <= self.memory

    @property
    def gradient_bytes(self) -> int:
        """What the fast path may use beyond its usual memory: two prompts' at once, or one's."""
        return self.two if self.enough else 0

    def told(self, than: str) -> str:
        return (
            f"{in_bytes(self.needed)}, {than} than a quarter of the {in_bytes(self.memory)} of memory on {self.device}"
        )


def device_memory(device: torch.device) -> int:
    """Bytes of memory that a process may have on a device, never what is free just now: a resumed store must be computed in the same way."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    return memory_limit()
