"""How many positions a policy has: beyond them a learned table ends, and rotary angles are ones the policy never saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi_tools.data.metadata import is_number

_NO_POSITIONS = frozenset({"rwkv", "mamba", "mamba2", "falcon_mamba", "bloom", "mpt", "xlstm"})
"""Recurrent models and those with ALiBi: a length in their configuration is that of training, not a limit."""

_EXTENDED = frozenset({"yarn", "linear", "dynamic"})
"""Rotary scalings whose factor multiplies the positions; for others `max_position_embeddings` is the extended length already."""


def positions(config: Any) -> int | None:
    """The most tokens a sequence may have by a model's configuration; None: there is no limit.

    Learned positions (GPT-2, OPT) fail beyond it, rotary ones give numbers that mean nothing without an error, so both count. A scaling of
    rotary positions extends them: YaRN from its original length, linear and dynamic scaling from the stated one.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if type(limit) is not int or limit <= 0 or config.model_type in _NO_POSITIONS or getattr(config, "alibi", False):
        return None
    if getattr(config, "position_embedding_type", None) == "nope":
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(scaling, Mapping):
        return limit
    kind: Any = scaling.get("rope_type", scaling.get("type"))
    factor: Any = scaling.get("factor")
    if not isinstance(kind, str) or kind not in _EXTENDED or not is_number(factor):
        return limit
    original = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
    if type(original) is not int or original <= 0:
        original = None
    return max(limit, int((original or limit) * factor))
