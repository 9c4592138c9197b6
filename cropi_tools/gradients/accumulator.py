"""What is taken from gradients while they are in memory: norms, exact inner products with mean gradients, sketches.

Gradients come parameter by parameter, one prompt's or several prompts' at once, and are not kept. Mean gradients are float32 tensors mapped
from their files and read where they are needed; on a GPU they are kept there if they leave half of its free memory to the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cropi_tools.data.means import read_tensors
from cropi_tools.gradients.preconditioner import Preconditioner
from cropi_tools.policy.logprobs import at_least_float32
from cropi_tools.sketches.device import device_products
from cropi_tools.sketches.projection import Sketcher
from cropi_tools.sketches.spec import Layout, ProjectionSpec

_BLOCK = 1 << 16  # coordinates in one float32 sum on a CPU; blocks are added in double
_DEVICE_BLOCK = 1 << 24  # on a GPU, where launching costs more than memory


class Measured(NamedTuple):
    """Of one gradient: its squared norm, its inner product with each mean, its sketch (float32 [dim]) if one is made."""

    square: float
    inner: dict[str, float]
    sketch: Any


class Direction:
    """A mean gradient on disk, by parameter. half: the mean over the first half of its prompts, which one made with --halves holds."""

    _scaling: Preconditioner | None = None

    def __init__(self, path: str | Path, half: bool = False) -> None:
        self._tensors = read_tensors(path, half)

    def keep_on(self, device: torch.device) -> None:
        """Hold the tensors on a device from now on."""
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}

    def scale_by(self, scaling: Preconditioner) -> None:
        """Multiply by the factors of a preconditioner from now on, whenever a part is asked for."""
        self._scaling = scaling

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def get(self, name: str, device: torch.device) -> torch.Tensor | None:
        """The part of a parameter, flat float32 on `device`; None where the mean has none."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        part = tensor.reshape(-1).to(device)
        return part if self._scaling is None else part * self._scaling.scale(name)


def keep_on_device(directions: Mapping[str, Direction], device: torch.device) -> None:
    """Hold mean gradients on a GPU from now on, if they leave half of its free memory to the rest."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if 2 * sum(direction.bytes for direction in directions.values()) < free:
            for direction in directions.values():
                direction.keep_on(device)


class Measure:
    """Measures `count` gradients at a time: `begin`, `add` for each parameter, `finish`.

    spec: of the sketch to make, or None for none. directions: mean gradients by name. scaling: gradients are scaled by it first; means
    already are. Each parameter is added once: the norm of a sum is not the sum of norms.
    """

    def __init__(
        self,
        layout: Layout,
        spec: ProjectionSpec | None,
        directions: Mapping[str, Direction],
        device: torch.device,
        scaling: Preconditioner | None = None,
    ) -> None:
        self._layout, self._spec, self._directions, self._device = layout, spec, dict(directions), device
        self._scaling = scaling
        self._sketchers: list[Sketcher] = []
        # of each gradient, parts of its squared norm and products: tensors [1 + directions], on the device until `finish`
        self._sums: list[list[torch.Tensor]] = []
        keep_on_device(self._directions, device)

    def begin(self, count: int = 1) -> None:
        """Start `count` new gradients."""
        while self._spec is not None and len(self._sketchers) < count:
            self._sketchers.append(Sketcher(self._spec, self._layout))
        for sketcher in self._sketchers[:count]:
            sketcher.begin()
        self._sums = [[] for _ in range(count)]

    def add(self, name: str, gradients: torch.Tensor) -> None:
        """Add one parameter's gradients, [count, ...] in any shape of its size."""
        rows = gradients.reshape(len(self._sums), -1)
        if self._scaling is not None:
            rows = rows * self._scaling.scale(name)
        means = [direction.get(name, self._device) for direction in self._directions.values()]
        for sums, row in zip(self._sums, rows, strict=True):
            sums += self._products(row, means)
        if self._spec is not None:
            for sketcher, row in zip(self._sketchers, rows, strict=False):
                sketcher.add(name, row)

    def _products(self, row: torch.Tensor, means: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor]:
        """Of one parameter's gradient: its squared norm and its product with each mean, block by block."""
        whole = [mean for mean in means if mean is not None]
        fused = device_products(row.device, row.dtype)
        if fused is not None and len(whole) == len(means):
            yield fused(row, whole)
            return
        yield from block_products(row, means)

    def finish(self) -> list[Measured]:
        """The figures of each gradient; InputError if a sketch is not finite."""
        found = []
        for place, sums in enumerate(self._sums):
            square, *inner = torch.stack(sums).double().sum(0).tolist() if sums else [0.0] * (1 + len(self._directions))
            row = self._sketchers[place].finish() if self._spec is not None else None
            found.append(Measured(square, dict(zip(self._directions, inner, strict=True)), row))
        return found


def block_products(row: torch.Tensor, means: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    """Of a flat gradient: its squared norm and its product with each mean, block by block; these are to be added up in double."""
    size = _BLOCK if row.device.type == "cpu" else _DEVICE_BLOCK
    for start in range(0, len(row), size):
        block = at_least_float32(row[start : start + size])
        parts = [None if mean is None else mean[start : start + size].to(block.dtype) for mean in means]
        yield torch.stack([torch.dot(block, block), *(_dot(block, part) for part in parts)])


def _dot(block: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
    return block.new_zeros(()) if part is None else torch.dot(block, part)


def squared_norm(tensor: torch.Tensor) -> float:
    """Sum of squares, to about float32's own precision whatever the size.

    `torch.dot` adds up in float32: on an embedding of 230 million coordinates that loses 3 %. Here it does so block by block, and blocks
    are added in double.
    """
    return inner_product(tensor, tensor)


def inner_product(first: torch.Tensor, second: torch.Tensor) -> float:
    """The inner product of two tensors of the same size, as precise as `squared_norm`."""
    blocks = zip(first.reshape(-1).split(_BLOCK), second.reshape(-1).split(_BLOCK), strict=True)
    wide = torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
    return math.fsum(float(torch.dot(one.to(wide), other.to(wide))) for one, other in blocks)
