"""A gradient used where it lies on a GPU, parameter by parameter: its countsketch, its norm and its inner products.

A gradient may be freed as soon as it was added: what was launched before reads it before the memory is used again. Two modules
have the loops: `countsketch_triton.py`, and `countsketch_torch.py` where that is switched off or Triton is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cropi_tools.sketches import countsketch_torch

# The Triton kernels agree with the CPU's in Triton's interpreter (tests/gpu/interpret.py) but have never run on a GPU.
# They stay off until `pytest -m gpu tests/gpu` has passed on one.
ENABLED = False


def device_kernels(device: torch.device) -> ModuleType | None:
    """The module that sketches tensors of this device; None for the CPU, where `kernels.py` does."""
    return None if device.type == "cpu" else _triton(device) or countsketch_torch


def device_products(
    device: torch.device,
) -> Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor] | None:
    """A function of a gradient [n] and V means [n] of one parameter, all flat and contiguous on `device`.

    It gives the sum of squares and the inner product with each mean, float64 [1 + V] there, without waiting for the
    device. None where plain torch does that.
    """
    kernels = _triton(device)
    return None if kernels is None else kernels.products


def _triton(device: torch.device) -> ModuleType | None:
    if not ENABLED or device.type != "cuda" or find_spec("triton") is None:
        return None
    from cropi_tools.sketches import countsketch_triton

    return countsketch_triton


class DeviceCountsketch:
    """The countsketch of gradients on one device, added in a fixed order: the same calls give the same bits.

    kernels: what `device_kernels` gave; tensor_keys: by name.
    """

    def __init__(
        self,
        kernels: ModuleType,
        tensor_keys: Mapping[str, np.uint64],
        hash_dim: int,
        segment: int,
        device: torch.device,
    ) -> None:
        self._kernels, self._keys, self._device = kernels, tensor_keys, device
        self._hash_dim, self._segment = hash_dim, segment
        self._plans: dict[str, Any] = {}
        self._sums = kernels.new_sums(hash_dim, segment, device)
        self.begin()

    def begin(self) -> None:
        """Start a new gradient."""
        self._sums.zero_()

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add the gradient of one tensor, of a floating type and always the same size."""
        flat = gradient.detach().reshape(-1).contiguous()
        if flat.numel() == 0:
            return
        if name not in self._plans:
            key, size = int(self._keys[name]), flat.numel()
            self._plans[name] = self._kernels.plan(key, size, self._hash_dim, self._segment, self._device)
        self._kernels.countsketch_add(flat, self._plans[name], self._hash_dim, self._segment, self._sums)

    def total(self) -> NDArray[np.float32]:
        """The sketch, float32 [hash_dim + segment] on the CPU, not yet wrapped round; waits for the device."""
        found: NDArray[np.float32] = self._sums.sum(0)[: self._hash_dim + self._segment].cpu().numpy()
        return found
