"""Whether training has diverged: a figure that is no number, or a policy that has collapsed.

A policy has collapsed when its entropy or the length of its responses has all but gone and its reward is no better for it. One that became
certain because it solved its prompts has not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WINDOW = 5  # steps that are averaged, at the beginning and now
_FIGURES = ("entropy", "response_tokens", "reward")
_WORDS = {"entropy": "entropy per token", "response_tokens": "length of the responses"}


class Watch:
    """Looks at every step's figures.

    collapse: the share of its first value that a figure may fall to; 0: only numbers that are not finite are a divergence. seen: the figures
    of the first steps and of the last ones, as `state` gives them.
    """

    def __init__(self, collapse: float, seen: Mapping[str, Any] | None = None) -> None:
        self._collapse = collapse
        given = seen or {}
        self._first: dict[str, list[float]] = {name: list(given.get("first", {}).get(name, [])) for name in _FIGURES}
        self._last: dict[str, list[float]] = {name: list(given.get("last", {}).get(name, [])) for name in _FIGURES}

    def check(self, figures: Mapping[str, float]) -> str | None:
        """Take a step's figures (of metrics.jsonl); the reason to stop, or None."""
        for name, value in figures.items():
            if not math.isfinite(value):
                remedy = "look at the verifier's scores" if name == "reward" else "lower --learning-rate"
                return f"{name.replace('_', ' ')} is {value}; {remedy}"
        for name in _FIGURES:
            if name == "entropy" and not figures["tokens_trained"]:
                continue  # nothing went through the policy, so nothing is known of it
            if len(self._first[name]) < WINDOW:
                self._first[name].append(figures[name])
            self._last[name] = [*self._last[name], figures[name]][-WINDOW:]
        if _mean(self._last["reward"]) > _mean(self._first["reward"]):
            return None
        for name, word in _WORDS.items():
            if len(self._last[name]) == WINDOW and self._low(name, _mean(self._last[name])):
                return (
                    f"the policy has collapsed: the {word} fell from {_mean(self._first[name]):.3g} to {_mean(self._last[name]):.3g} and the "
                    f"reward from {_mean(self._first['reward']):.3g} to {_mean(self._last['reward']):.3g}; lower --learning-rate, give --kl or "
                    "--entropy, or --collapse 0 to go on all the same"
                )
        return None

    def suspicious(self) -> bool:
        """Whether the last step alone looks like a collapse: no checkpoint should take the place of a good one then.

        A single reward says little, so it must be better by itself and over the window to make up for what is low.
        """
        rewards = self._last["reward"]
        if not rewards or min(rewards[-1], _mean(rewards)) > _mean(self._first["reward"]):
            return False
        return any(self._last[name] and self._low(name, self._last[name][-1]) for name in _WORDS)

    def _low(self, name: str, value: float) -> bool:
        """Whether a figure has all but gone. What was nothing from the first cannot go."""
        first = _mean(self._first[name])
        return self._collapse > 0 and first > 0 and value <= self._collapse * first

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to look on."""
        return {"first": self._first, "last": self._last}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
