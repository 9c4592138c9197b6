"""The figures of a batch of prompts: what collect.py writes into the store.

By backward passes: gradients, whose norm, inner products and sketch are measured while they are in memory. `forward_estimates.py` has the
other way. Both give the same for the two halves of a prompt's samples (`splitting.py`), if asked, each half with advantages of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from cropi_tools.gradients.accumulator import Measure, Measured
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, PromptGradient, prepare
from cropi_tools.gradients.reference import Consume
from cropi_tools.gradients.splitting import samples_of
from cropi_tools.gradients.targets import Against
from cropi_tools.runtime.errors import InputError


class PromptFigures(NamedTuple):
    """Of one prompt: its index entry with everything measured, its sketch if one is made, tokens that went through the policy, and how
    many that were with a row for every sample, the prompt in each.
    """

    entry: dict[str, Any]
    sketch: Any
    tokens: int
    tokens_as_rows: int


class GradientPath(Protocol):
    """A way to compute gradients: one prompt at a time (gradients.py), or several (fast_gradients.py)."""

    parameters: list[tuple[str, torch.nn.Parameter]]

    def room_for(self, tasks: Sequence[GradientTask], task: GradientTask) -> bool: ...

    def compute(self, tasks: Sequence[GradientTask], consume: Consume) -> list[PromptGradient]: ...


class Figures(Protocol):
    """What collect.py needs."""

    def room_for(self, tasks: Sequence[GradientTask], task: GradientTask) -> bool: ...

    def of(self, tasks: Sequence[GradientTask]) -> list[PromptFigures]: ...


class BackwardEstimates:
    """Estimates from gradients. halves: measures the inner products of half-gradients, with the sketch of `Against.groups`, or None."""

    def __init__(
        self,
        path: GradientPath,
        settings: GradientSettings,
        measure: Measure,
        against: Against,
        halves: Measure | None = None,
    ) -> None:
        self._path, self._settings, self._measure, self._against, self._halves = (
            path,
            settings,
            measure,
            against,
            halves,
        )
        self.room_for = path.room_for

    def of(self, tasks: Sequence[GradientTask]) -> list[PromptFigures]:
        """The estimates of a batch of tasks. InputError: a gradient that is not finite."""
        if not tasks:
            return []
        gradients, measured = self._run(tasks, self._measure)
        found = []
        for task, gradient, figures in zip(tasks, gradients, measured, strict=True):
            entry = {**gradient.entry, "gradient_norm": math.sqrt(figures.square), "inner": figures.inner}
            if figures.square == 0.0:
                entry = {**gradient.entry, "status": "zero-gradient"}
            check_finite(task, [figures.square, *figures.inner.values()])
            sketch = figures.sketch if figures.square else None
            found.append(PromptFigures(entry, sketch, gradient.tokens, tokens_as_rows(task)))
        if self._halves is not None:
            self._add_halves(tasks, found)
        return found

    def _run(self, tasks: Sequence[GradientTask], measure: Measure) -> tuple[list[PromptGradient], list[Measured]]:
        measure.begin(len(tasks))
        gradients = self._path.compute(tasks, measure.add)
        try:
            return gradients, measure.finish()
        except InputError as error:
            ids = ", ".join(f"'{task.rollout.id}'" for task in tasks)
            raise InputError(f"prompt {ids}: {error}") from None

    def _add_halves(self, tasks: Sequence[GradientTask], found: list[PromptFigures]) -> None:
        results: list[list[Any]] = [[None, None] for _ in tasks]
        assert self._halves is not None
        for half in (0, 1):
            some = [(place, part) for place, task in enumerate(tasks) if (part := half_of(task, half, self._settings))]
            if not some:
                continue
            # half the samples are fewer tokens, so they fit where the whole did
            gradients, measured = self._run([part for _, part in some], self._halves)
            for (place, part), gradient, figures in zip(some, gradients, measured, strict=True):
                check_finite(part, [figures.square, *figures.inner.values()])
                if figures.square:
                    inner = self._against.half_products(figures.inner, half)
                    results[place][half] = {"gradient_norm": math.sqrt(figures.square), "inner": inner}
                    if figures.sketch is not None:
                        results[place][half]["groups"] = self._against.group_products(figures.sketch, half)
                whole = found[place]
                found[place] = whole._replace(
                    tokens=whole.tokens + gradient.tokens, tokens_as_rows=whole.tokens_as_rows + tokens_as_rows(part)
                )
        for estimate, halves in zip(found, results, strict=True):
            estimate.entry["halves"] = halves


def tokens_as_rows(task: GradientTask) -> int:
    """Tokens of the prompt and a response, over all responses."""
    return len(task.responses) * len(task.prompt) + task.tokens


def half_of(task: GradientTask, half: int, settings: GradientSettings) -> GradientTask | None:
    """The task of half the samples, 0 or 1; None when these give no gradient."""
    samples = [task.rollout.samples[number] for number in rows_of(task, half)]
    part = prepare(task.rollout._replace(samples=samples), settings) if samples else None
    return part if isinstance(part, GradientTask) else None


def rows_of(task: GradientTask, half: int) -> list[int]:
    """The numbers of the samples in half 0 or 1."""
    return samples_of(task.rollout.id, len(task.responses), half)


def check_finite(task: GradientTask, values: Iterable[float]) -> None:
    """InputError naming the prompt when a figure is not finite."""
    if not all(map(math.isfinite, values)):
        raise InputError(f"prompt '{task.rollout.id}': its gradient is not finite; try --dtype float32")
