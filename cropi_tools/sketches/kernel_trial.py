"""Whether the kernels for one kind of GPU agree with plain torch, tried out on the very device before they are trusted.

A kernel is compiled where it runs, for that device and its compiler's version, so that it was right elsewhere proves little. The trial takes
small gradients of every size that has a branch of its own: none, one, fewer than a segment, an odd number just beyond one, more than several
tiles, segments and blocks; beginning at an aligned address and beside one; into few and many dimensions. Not reached are tensors of 2^31
coordinates, whose places need other integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from cropi_tools.sketches import countsketch_torch
from cropi_tools.sketches.spec import LONGEST_SEGMENT

TENSORS = (
    (0, 0),
    (1, 3),
    (31, 0),
    (2049, 1),
    (20_001, 0),
    (20_001, 3),
)  # coordinates, and how far from an aligned address
DIMS = (64, 192, 4096, 65536)
MEANS = (0, 1, 3)
# Relative to the norms. Float32 sums of so few coordinates are off by less than 1e-6; all coordinates lie between 1 and 2, so that one
# left out, or with the wrong sign, makes 2e-5 of the largest product, and more of any sketch.
TOLERANCE = 5e-6
_KEY = 0x5851F42D4C957F2D  # of no meaning


def disagreement(kernels: ModuleType, device: torch.device, kind: torch.dtype) -> str | None:
    """Where `kernels` differ from torch on gradients of a floating type on a device, in words; None: nowhere.

    Raises whatever the kernels raise.
    """
    for number, (size, moved) in enumerate(TENSORS):
        gradient = _values(size, moved, number, device, kind)
        for dim in DIMS:
            found, again = _sketch(kernels, gradient, dim), _sketch(kernels, gradient, dim)
            if not torch.equal(found, again):
                return f"a sketch of {size} coordinates in {dim} dimensions is another each time"
            expected = _sketch(countsketch_torch, gradient, dim)
            if not float((found - expected).norm()) <= TOLERANCE * float(expected.norm()):
                return f"a sketch of {size} coordinates in {dim} dimensions is not that of torch"
        for count in MEANS:
            means = [_values(size, mean, 10 + mean, device, torch.float32) for mean in range(count)]
            if not _right_products(kernels.products(gradient, means), gradient, means):
                return f"products of {size} coordinates with {count} means are not those of torch"
    return None


def _values(count: int, moved: int, seed: int, device: torch.device, kind: torch.dtype) -> torch.Tensor:
    """So many numbers between 1 and 2 with random signs, that begin `moved` coordinates behind an aligned address."""
    draw = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (count + moved,), generator=draw) - 1
    return (signs * (1 + torch.rand(count + moved, generator=draw))).to(device, kind)[moved:]


def _sketch(kernels: ModuleType, gradient: torch.Tensor, dim: int) -> torch.Tensor:
    """The countsketch of two tensors with the same coordinates, not yet wrapped round, in float64."""
    segment = min(LONGEST_SEGMENT, dim)
    sums = kernels.new_sums(dim, segment, gradient.device).zero_()
    for key in (_KEY, _KEY + 1) if len(gradient) else ():
        plan = kernels.plan(key, len(gradient), dim, segment, gradient.device)
        kernels.countsketch_add(gradient, plan, dim, segment, sums)
    total: torch.Tensor = sums.sum(0)[: dim + segment].double()
    return total


def _right_products(found: torch.Tensor, gradient: torch.Tensor, means: Sequence[torch.Tensor]) -> bool:
    wide = [one.double() for one in (gradient, *means)]
    expected = torch.stack([wide[0] @ one for one in wide])
    allowed = TOLERANCE * torch.stack([wide[0].norm() * one.norm() for one in wide])
    return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())
