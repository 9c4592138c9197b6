"""What --against asks for, and what it does not go with: where an update is no multiple of each prompt's own gradient, or cannot be watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from cropi_tools.options import Option, named

Against = Annotated[
    tuple[tuple[str, str], ...],
    Option(
        "--against",
        "Write every trained prompt's influence on this mean gradient of --model (cropi-grad --mean); may be repeated.",
        "Gradients",
        "NAME=MEAN",
        read=named,
    ),
]

_ADDED = "an update with it is no sum of the prompts' own gradients"

REFUSED: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda asked: len(dict(asked.against)) < len(asked.against), "--against: every mean needs a name of its own"),
    (lambda asked: asked.kl > 0, f"--against goes with --kl 0: {_ADDED}"),
    (lambda asked: asked.entropy > 0, f"--against goes with --entropy 0: {_ADDED}"),
    (lambda asked: asked.mask_truncated, "--against goes with --no-mask-truncated: cropi-grad leaves no response out"),
    (
        lambda asked: 0 < asked.minibatch < asked.batch,
        "--against goes with one update a step: after the first one the policy is another; leave --minibatch out",
    ),
    (
        lambda asked: asked.lora > 0,
        "--against tells the gradients of all weights, and --lora trains others; leave one out",
    ),
    (
        lambda asked: asked.checkpoint_activations,
        "--against holds what --checkpoint-activations would compute again; leave one out",
    ),
)
"""With --against: what is refused when it is so."""
