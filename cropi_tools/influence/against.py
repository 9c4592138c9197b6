"""The mean gradients that cropi-grad takes exact inner products with, checked to belong to the same parameters, policy and objective.

Halves. A mean made with --halves holds the mean m over its n prompts and m1 over the n1 of its first half; the second half's is
m2 = (n m - n1 m1) / n2, so a product with m2 follows from those with m and m1, and m2 needs no place on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi_tools.data.errors import InputError
from cropi_tools.data.means import read_facts
from cropi_tools.influence.measure import Direction
from cropi_tools.influence.spec import Layout

_HALF = "/first half"  # in the names of directions


class Against:
    """Mean gradients by name, files by name. halves: the products of halves are wanted too, and the means must hold them."""

    def __init__(
        self,
        files: Mapping[str, str],
        layout: Layout,
        policy: str,
        objective: Mapping[str, Any],
        halves: bool = False,
    ) -> None:
        self.attributes: dict[str, dict[str, Any]] = {}
        self.directions: dict[str, Direction] = {}
        self.half_directions: dict[str, Direction] = {}
        self._prompts: dict[str, list[int]] = {}
        for name, path in files.items():
            facts = read_facts(path)
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
    if "norm" not in facts:
        raise InputError(f"{path}: is an unfinished mean; run the cropi-grad --mean that made it again")
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
