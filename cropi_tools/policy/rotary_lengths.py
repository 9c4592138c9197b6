"""Models whose rotary frequencies follow the longest position of a forward pass, and which sequences such a model may compute together.

transformers chooses one set of frequencies for a whole pass (`modeling_rope_utils.dynamic_rope_update`): `longrope` (Phi-3-128k, Phi-4-mini)
another one for passes beyond the length of pretraining, `dynamic` (NTK) one for every length beyond it. A sequence's log-probabilities
are defined as those of one pass over prompt and response alone, so that sequences in one pass must agree in their frequencies: they must
be of the same regime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

LENGTH_DEPENDENT = frozenset({"longrope", "dynamic"})
_known: WeakKeyDictionary[Any, PassLengths] = WeakKeyDictionary()


class PassLengths(NamedTuple):
    """How a model's forward pass depends on the length of its longest sequence; not at all without arguments.

    switches: lengths, ascending, beyond each of which the whole pass is computed with other frequencies. grows_from: the length beyond
    which every length has frequencies of its own.
    """

    switches: tuple[int, ...] = ()
    grows_from: int | None = None

    def regime(self, length: int) -> tuple[int, int]:
        """What lengths whose passes use the same frequencies have in common; (0, 0) for short ones."""
        grown = self.grows_from is not None and length > self.grows_from
        return sum(length > switch for switch in self.switches), length if grown else 0

    def short(self, length: int) -> bool:
        """Whether a sequence is in the first regime, as all are of a model whose passes do not depend on length."""
        return self.regime(length) == (0, 0)

    @property
    def limit(self) -> int | None:
        """The longest length of the first regime; None: all lengths are."""
        return self.last(0)

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: nothing for a model whose passes do not depend on length."""
        return {} if self.limit is None else {"rotary_frequencies_change_beyond": self.limit}

    def last(self, length: int) -> int | None:
        """The longest length of the same regime; None: there is no longest one."""
        if self.regime(length)[1]:
            return length
        limits = [*self.switches, *([] if self.grows_from is None else [self.grows_from])]
        return min((limit for limit in limits if limit >= length), default=None)

    def ranges(self, lengths: Sequence[int]) -> Iterator[range]:
        """Sequences one after another that one pass may compute, as ranges."""
        regimes = [self.regime(length) for length in lengths]
        cuts = [0, *(place for place in range(1, len(lengths)) if regimes[place] != regimes[place - 1]), len(lengths)]
        return (range(start, stop) for start, stop in pairwise(cuts) if stop > start)


def pass_lengths(*models: Any) -> PassLengths:
    """How passes through a model depend on length, by its own rotary modules; through several models, so that all of them agree.

    From the first call on, a pass no longer depends on the passes before it either: transformers keeps the frequencies of the longest
    one for the shorter ones that follow.
    """
    rules = [_rule_of(model) for model in models]
    if len(rules) == 1:
        return rules[0]
    switches = {switch for rule in rules for switch in rule.switches}
    return PassLengths(
        tuple(sorted(switches)), min((rule.grows_from for rule in rules if rule.grows_from is not None), default=None)
    )


def _rule_of(model: Any) -> PassLengths:
    if model not in _known:
        switches, grows = set(), []
        for module in model.modules():
            for rope, switch in _ropes(module):
                if "dynamic" in rope:
                    grows.append(module.original_max_seq_len)
                    module.register_forward_pre_hook(_forget)
                elif switch is not None:
                    switches.add(switch)
        _known[model] = PassLengths(tuple(sorted(switches)), min(grows, default=None))
    return _known[model]


def _ropes(module: Any) -> Iterator[tuple[str, int | None]]:
    """The types of a rotary module, one or one for each kind of layer, each with the length beyond which it switches frequencies."""
    ropes: Any = getattr(module, "rope_type", None)
    configuration: Any = getattr(module, "config", None)
    # the settings' names before and since transformers 5
    settings = getattr(configuration, "rope_parameters", None) or getattr(configuration, "rope_scaling", None) or {}
    for layer, rope in (ropes if isinstance(ropes, dict) else {None: ropes}).items():
        if not isinstance(rope, str):
            continue
        own = settings if layer is None else settings.get(layer) or {}
        switch = None
        if rope == "longrope" or "long_mscale" in own:  # PhiMoE scales by length, whatever its type
            known = getattr(configuration, "original_max_position_embeddings", None)
            switch = own.get("original_max_position_embeddings") or known or configuration.max_position_embeddings
        yield rope, switch


def _forget(module: Any, _: Any) -> None:
    """Undo the growth of a dynamic rotary module's frequencies in earlier passes."""
    ropes = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    for layer, rope in ropes.items():
        prefix = f"{layer}_" if layer else ""
        if "dynamic" in rope:
            present = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(present.device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
