"""The mean gradients that cropi-grad takes exact inner products with, checked to belong to the same parameters, policy and objective.

Halves. A mean made with --halves holds the mean m over its n prompts and m1 over the n1 of its first half; the second half's is
m2 = (n m - n1 m1) / n2, so a product with m2 follows from those with m and m1, and m2 needs no place on disk. It also holds sketches of
the sums over groups of a half's prompts (`half_sums.py`; means of older versions do not), whose products with a sketched gradient tell how far
a product with the half depends on which prompts are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cropi_tools.data.means import check_whole, read_finished, read_groups
from cropi_tools.gradients.accumulator import Direction
from cropi_tools.gradients.half_sums import groups_spec
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.spec import Layout, ProjectionSpec

_HALF = "/first half"  # in the names of directions


class Against:
    """Mean gradients by name, files by name. halves: the products of halves are wanted too, and the means must hold them.

    groups: their groups are wanted as well, where all means hold some; the attribute says how to sketch the gradients that
    `group_products` takes, or None where there are none.
    """

    def __init__(
        self,
        files: Mapping[str, str],
        layout: Layout,
        policy: str,
        objective: Mapping[str, Any],
        halves: bool = False,
        groups: bool = True,
    ) -> None:
        self.attributes: dict[str, dict[str, Any]] = {}
        self.directions: dict[str, Direction] = {}
        self.half_directions: dict[str, Direction] = {}
        self.groups: ProjectionSpec | None = None
        self._prompts: dict[str, list[int]] = {}
        self._groups: dict[str, list[NDArray[np.float32]]] = {}
        for name, path in files.items():
            facts = read_finished(path, "layout", "policy", "objective", "content")
            check_mean(path, facts, layout, policy, objective)
            self.attributes[name] = {"norm": facts["norm"], "sha256": facts["content"]}
            self.directions[name] = Direction(path)
            if halves:
                if "halves" not in facts:
                    raise InputError(f"{path}: holds no halves; make it with cropi-grad --mean --halves")
                self.attributes[name]["halves"] = facts["halves"]["norms"]
                self._prompts[name] = facts["halves"]["prompts"]
                self.half_directions[name] = self.directions[name]
                self.half_directions[name + _HALF] = Direction(path, half=True)
                if groups:
                    self._read_groups(name, path, facts["halves"], layout)
        if self._groups and len(self._groups) == len(files):
            self.groups = groups_spec(layout)
            for name, attributes in self.attributes.items():
                attributes["groups"] = [len(part) for part in self._groups[name]]

    def _read_groups(self, name: str, path: str, halves: Mapping[str, Any], layout: Layout) -> None:
        sketches = read_groups(path)
        spec = groups_spec(layout)
        if sketches is None or halves.get("projection") != spec.to_json():
            return
        counts = halves.get("groups", [])
        if sketches.dtype != torch.float32 or sketches.shape != (sum(counts), spec.dim):
            raise InputError(f"{path}: its groups are not those of its header; the mean is damaged, make it again")
        parts = sketches.split(counts)
        self._groups[name] = [part.numpy() / prompts for part, prompts in zip(parts, halves["prompts"], strict=True)]

    def group_products(self, sketch: NDArray[np.float32], half: int) -> dict[str, list[float]]:
        """What each group of half 0 or 1 adds to the product of a gradient with that half's mean, from the gradient's sketch."""
        return {name: [float(f"{x:.6g}") for x in parts[half] @ sketch] for name, parts in self._groups.items()}

    def half_products(self, inner: Mapping[str, float], half: int) -> dict[str, float]:
        """The products with the mean over half 0 or 1 of the validation prompts, from those with `half_directions`."""
        if half == 0:
            return {name: inner[name + _HALF] for name in self.directions}
        found = {}
        for name, (first, second) in self._prompts.items():
            found[name] = ((first + second) * inner[name] - first * inner[name + _HALF]) / second
        return found


def check_mean(path: str, facts: Mapping[str, Any], layout: Layout, policy: str, objective: Mapping[str, Any]) -> None:
    """InputError when a mean gradient cannot be compared with gradients of this policy and objective."""
    if facts["layout"] != layout.sha256:
        raise InputError(
            f"{path}: is a mean over other parameters than are used here; make it with the same --model, --params and --lora"
        )
    if facts["policy"] != policy:
        raise InputError(f"{path}: is a mean gradient of another policy; make it with the same --model")
    if facts["objective"] != objective:
        names = [
            key for key in {**facts["objective"], **objective} if facts["objective"].get(key) != objective.get(key)
        ]
        differs = ", ".join(f"{key} {facts['objective'].get(key)}, now {objective.get(key)}" for key in names)
        raise InputError(f"{path}: is a mean of another objective ({differs})")
    check_whole(path, facts)
