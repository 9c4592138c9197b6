"""Whether training has diverged: a figure that is no number, or a policy that has collapsed.

A policy has collapsed when its entropy or the length of its responses has all but gone and its reward is no better for it, or when for many
steps no group had responses of different rewards and its reward is worse than at first: nothing can be learned then, and nothing will bring
it back. One that became certain because it solved its prompts has not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WINDOW = 5  # steps that are averaged, at the beginning and now
FLAT = (
    2 * WINDOW
)  # steps to learn from that are missed in a row, after which a policy with a lower reward does not come back
_FIGURES = ("entropy", "response_tokens", "reward")
_WORDS = {"entropy": "entropy per token", "response_tokens": "length of the responses"}
_GO_ON = "--collapse 0 to continue all the same"


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
        # Steps in a row, up to the last one, in which no token was trained on; all steps before these, and how many of them trained something.
        # A state without them is of a version that did not count: its steps are taken to have trained.
        counted = len(self._first["reward"])
        self._flat: int = given.get("flat", 0)
        self._before: int = given.get("before", counted)
        self._live: int = given.get("live", counted)

    def check(self, figures: Mapping[str, float]) -> str | None:
        """Take a step's figures (of metrics.jsonl); the reason to stop, or None."""
        for name, value in figures.items():
            if not math.isfinite(value):
                remedy = "look at the verifier's scores" if name == "reward" else "lower --learning-rate"
                return f"{name.replace('_', ' ')} is {value}; {remedy}"
        for name in _FIGURES:
            if len(self._first[name]) < WINDOW:
                self._first[name].append(figures[name])
            self._last[name] = [*self._last[name], figures[name]][-WINDOW:]
        if figures["tokens_trained"]:
            self._before, self._flat = self._before + self._flat + 1, 0
            self._live += 1
        else:
            self._flat += 1
        if self._collapse == 0:
            return None
        first, last = _mean(self._first["reward"]), _mean(self._last["reward"])
        if last > first or first == last >= 1.0:
            return None
        for name, word in _WORDS.items():
            if len(self._last[name]) == WINDOW and self._low(name, _mean(self._last[name])):
                return (
                    f"the policy has collapsed: the {word} fell from {_mean(self._first[name]):.3g} to {_mean(self._last[name]):.3g} and the "
                    f"reward from {first:.3g} to {last:.3g}; lower --learning-rate, give --kl or --entropy, or {_GO_ON}"
                )
        if self._missed() >= FLAT and last < first:
            return (
                f"the policy has collapsed: in the last {self._flat} steps all responses to a prompt had the same reward, so nothing can be "
                f"learned, and the reward fell from {first:.3g} to {last:.3g}; lower --learning-rate, give --kl or --entropy, or {_GO_ON}"
            )
        return None

    def warning(self) -> str | None:
        """What should be said after the last step, once: that a run has learned nothing since it began."""
        if self._live or self._flat != FLAT:
            return None
        remedy = "take easier ones" if _mean(self._last["reward"]) < 0.5 else "take harder ones"
        return (
            f"none of the first {FLAT} steps trained anything: all responses to a prompt had the same reward, {_mean(self._last['reward']):.3g} "
            f"on average; {remedy}, more samples (-n), or look at the verifier"
        )

    def suspicious(self) -> bool:
        """Whether the last step alone looks like a collapse: no checkpoint should take the place of a good one then.

        A single reward says little, so it must be better by itself and over the window to make up for what is low. A step without a group to
        learn from is a bad sign where its reward is worse than at first: before FLAT such steps nobody can tell.
        """
        rewards = self._last["reward"]
        if self._collapse == 0 or not rewards:
            return False
        now, first = min(rewards[-1], _mean(rewards)), _mean(self._first["reward"])
        if now > first or first == now >= 1.0:
            return False
        if self._missed() >= 1.0 and now < first:
            return True
        return any(self._last[name] and self._low(name, self._last[name][-1]) for name in _WORDS)

    def _missed(self) -> float:
        """How many steps that train something were to be expected in the stretch without one, by their share before it.

        Where rewards are rare, steps without any are nothing new: there it takes a longer stretch to tell.
        """
        return self._flat * self._live / self._before if self._before else 0.0

    def _low(self, name: str, value: float) -> bool:
        """Whether a figure has all but gone. What was nothing from the first cannot go."""
        first = _mean(self._first[name])
        return self._collapse > 0 and first > 0 and value <= self._collapse * first

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to look on."""
        return {
            "first": self._first,
            "last": self._last,
            "flat": self._flat,
            "before": self._before,
            "live": self._live,
        }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
