"""What a way of running a model is tried out on, once a model, before it is used: a few tokens that reach every branch by length.

Families differ in ways that no list of names would keep up with, so a faster way is compared with plain forward passes and taken where it
agrees. Some branches lie beyond thousands of tokens: windows, chunks, sparse attention, temperatures by position. They are read from the
model's settings at every pass, so a trial lowers them to a few tokens and restores them afterward: the same code runs, at no cost. What
cannot be tried this way, rotary frequencies that follow the length of a pass, `lengths.py` reads from the configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from cropi_tools.policy.rotary_lengths import LENGTH_DEPENDENT

LOWERED = 4  # tokens; the trial's sequences are longer, in their prompts and in their responses
# what models raise when they are run in a way that they do not know: the library has no one error for it
MODEL_ERRORS = (
    *(ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError, AssertionError, NotImplementedError),
)
# settings that are lengths in tokens, from which on a model computes something else
_LIMITS = frozenset(
    {
        "attention_chunk_size",
        "attention_window_size",
        "floor_scale",
        "index_topk",
        "keep_window_size",
        "local_attention",
        "local_attention_window_len",
        "log_scaling_n_floor",
        "sliding_window",
        "sliding_window_size",
        "window_size",
    }
)


def trial_prompts(vocabulary: int) -> list[tuple[list[int], list[list[int]]]]:
    """Two prompts with responses of different lengths, one of them empty: the few tokens that something is tried out on."""
    ids = [(7 * place + 3) % vocabulary for place in range(16)]
    return [(ids[:3], [ids[3:7], ids[7:9], []]), (ids[9:14], [ids[:2], ids[5:9]])]


def trial_tolerance(kind: torch.dtype) -> float:
    """How far, relatively, a derivative by rules may be from automatic differentiation in a trial; norms pass through float32."""
    return {torch.float64: 1e-5, torch.float32: 1e-4}.get(kind, 0.1)


def rounding(kind: torch.dtype) -> float:
    """How far apart a model in this number format may compute the same logits or log-probabilities in two ways."""
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(kind, 0.2)


@contextlib.contextmanager
def lowered_limits(model: Any) -> Iterator[None]:
    """Until the end of the block, every length from which on the model computes something else is a few tokens."""
    with contextlib.ExitStack() as stack:
        for settings in _settings(model):
            for name, value in list(settings.items()):
                # a rotary type's own limit: in types that do not follow the length of a pass it is one of a temperature by position
                limit = name in _LIMITS or (name == "original_max_position_embeddings" and "rope_type" in settings)
                if limit and isinstance(value, int) and value > LOWERED:
                    stack.callback(settings.__setitem__, name, value)
                    settings[name] = LOWERED
        yield


def _settings(model: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries that a model reads its settings from: its modules', their configurations', those inside a configuration."""
    seen: set[int] = set()

    def of_configuration(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # frequencies that follow the length of a pass are not tried out
        if id(found) in seen or found.get("rope_type") in LENGTH_DEPENDENT:
            return
        seen.add(id(found))
        yield found
        for value in list(found.values()):
            if isinstance(value, dict):
                yield from of_configuration(value)
            elif hasattr(value, "to_dict"):
                yield from of_configuration(vars(value))

    for module in model.modules():
        yield vars(module)
        if hasattr(module, "config"):
            yield from of_configuration(vars(module.config))
