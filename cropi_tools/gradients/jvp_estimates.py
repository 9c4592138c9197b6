"""The figures of a batch of prompts by forward mode: inner products, of the halves too, but no norms and no sketches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cropi_tools.gradients.estimates import PromptFigures, check_finite, half_of, rows_of, tokens_as_rows
from cropi_tools.gradients.jvp import Forward, ForwardMode, inner_of
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask
from cropi_tools.gradients.targets import Against


class ForwardEstimates:
    """Estimates by forward mode: inner products, no norm and no sketch."""

    def __init__(self, forward: ForwardMode, settings: GradientSettings, against: Against, halves: bool) -> None:
        self._forward, self._settings, self._against, self._halves = forward, settings, against, halves
        self.room_for = forward.room_for

    def of(self, tasks: Sequence[GradientTask]) -> list[PromptFigures]:
        """The estimates of a batch of tasks. InputError: a derivative that is not finite."""
        found = []
        for task, forward in zip(tasks, self._forward.compute(tasks) if tasks else [], strict=True):
            check_finite(task, forward.inner.values())
            inner = {name: forward.inner[name] for name in self._against.directions}
            if forward.flat:
                entry = {**forward.gradient.entry, "status": "zero-gradient"}
                found.append(PromptFigures(entry, None, forward.gradient.tokens, tokens_as_rows(task)))
                continue
            entry = {**forward.gradient.entry, "gradient_norm": None, "inner": inner}
            if self._halves:
                entry["halves"] = [self._half(forward, task, half) for half in (0, 1)]
            found.append(PromptFigures(entry, None, forward.gradient.tokens, tokens_as_rows(task)))
        return found

    def _half(self, forward: Forward, task: GradientTask, half: int) -> dict[str, Any] | None:
        part = half_of(task, half, self._settings)
        if part is None:
            return None
        inner = inner_of(forward, part, rows_of(task, half), self._settings)
        if inner is None:
            return None
        return {"gradient_norm": None, "inner": self._against.half_products(inner, half)}
