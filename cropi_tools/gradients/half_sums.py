"""What cropi-grad --mean --halves adds up besides the mean: the first half of the prompts, and sketches of small groups of each half.

The groups are there to be resampled. All prompts of a pool are scored with the same validation prompts, so the noise of these does not average
out over the pool, and an interval that leaves it out finds agreement where there is none. A mean over every group at full precision would
multiply memory and file by their number; what is wanted is the spread of their inner products, for which a sketch is enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cropi_tools.data.means import read_groups, read_tensors
from cropi_tools.gradients.accumulator import squared_norm
from cropi_tools.gradients.splitting import GROUPS, place_of
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec

DIM = 32768  # of the groups' sketches: cosines to about .006

Tensors = dict[str, torch.Tensor]


def groups_spec(layout: Layout) -> ProjectionSpec:
    """How groups are sketched, whatever the sketch of the store."""
    return ProjectionSpec.create("countsketch", layout, DIM, seed=0)


class HalfSums:
    """Running sums over the prompts of a mean. counts: prompts of each group, [half][group]; live: those of a half with a gradient."""

    def __init__(self, total: Tensors, layout: Layout) -> None:
        self.first = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
        self.sketches = torch.zeros(2, GROUPS, DIM)
        self.counts = [[0] * GROUPS, [0] * GROUPS]
        self.live = [0, 0]
        self._layout, self._spec = layout, groups_spec(layout)
        self._sketchers: list[Sketcher] = []

    def restore(self, path: Any, saved: Mapping[str, Any]) -> None:
        """Go on from a saved part and what `state` said of it."""
        for name, tensor in read_tensors(path, half=True).items():
            self.first[name].copy_(tensor)
        sketches = read_groups(path)
        assert sketches is not None  # saved with the sums
        self.sketches.copy_(sketches.view_as(self.sketches))
        self.counts, self.live = saved["counts"], saved["live"]

    def state(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors."""
        return {"counts": self.counts, "live": self.live}

    def begin(self, count: int) -> None:
        """Start the gradients of `count` prompts."""
        while len(self._sketchers) < count:
            self._sketchers.append(Sketcher(self._spec, self._layout))
        for sketcher in self._sketchers[:count]:
            sketcher.begin()

    def add(self, name: str, number: int, prompt_id: str, row: torch.Tensor) -> None:
        """One parameter's gradient of the prompt `number` of those begun, flat."""
        if place_of(prompt_id).half == 0:
            self.first[name].view(-1).add_(row)
        self._sketchers[number].add(name, row)

    def end(self, ids: Sequence[str], live: Sequence[str]) -> None:
        """The prompts `ids` are done, those of `live`, begun in this order, with a gradient."""
        for number, prompt_id in enumerate(live):
            half, group = place_of(prompt_id)
            self.sketches[half, group] += torch.from_numpy(self._sketchers[number].finish())
            self.live[half] += 1
        for prompt_id in ids:
            half, group = place_of(prompt_id)
            self.counts[half][group] += 1

    def finish(self, mean: Tensors) -> tuple[dict[str, Any], torch.Tensor]:
        """Facts on the halves, and the sketches of the groups that have prompts, first those of the first half; `first` becomes its mean.

        InputError: a half has no gradient.
        """
        ones, others = (sum(counts) for counts in self.counts)
        if not all(self.live):
            raise InputError(
                f"of the {ones + others} prompts, those of one half ({others if self.live[0] else ones}, told by a hash of their ids) give no "
                "gradient, so there is nothing to compare; take more validation prompts, or leave --halves out"
            )
        for tensor in self.first.values():
            tensor /= ones
        prompts = ones + others
        norms = [
            math.sqrt(math.fsum(squared_norm(tensor) for tensor in self.first.values())),
            math.sqrt(
                math.fsum(squared_norm((prompts * mean[name] - ones * self.first[name]) / others) for name in mean)
            ),
        ]
        held = [[group for group, count in enumerate(counts) if count] for counts in self.counts]
        facts = {
            "prompts": [ones, others],
            "live": self.live,
            "norms": norms,
            "groups": [len(groups) for groups in held],
            "projection": self._spec.to_json(),
        }
        return facts, torch.cat([self.sketches[half, groups] for half, groups in enumerate(held)])
