"""A gradient used where it lies on a GPU, parameter by parameter: its countsketch, its norm and its inner products.

A gradient may be freed as soon as it was added: what was launched before reads it before the memory is used again. Two modules
have the loops: `countsketch_triton.py` where a trial on the very device finds them right, else `countsketch_torch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cropi_tools import runtime
from cropi_tools.runtime.clock import starting
from cropi_tools.runtime.errors import first_line
from cropi_tools.sketches import countsketch_torch
from cropi_tools.sketches.kernel_trial import disagreement


def device_kernels(device: torch.device, kind: torch.dtype) -> ModuleType | None:
    """The module that sketches gradients of this floating type on this device; None for the CPU, where `countsketch_numba.py` does."""
    return None if device.type == "cpu" else _triton(device, kind) or countsketch_torch


def device_products(
    device: torch.device, kind: torch.dtype
) -> Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor] | None:
    """A function of a gradient [n] of this floating type and V means [n] of one parameter, all flat and contiguous on `device`.

    It gives the sum of squares and the inner product with each mean, float64 [1 + V] there, without waiting for the
    device. None where plain torch does that, as for float64, which the kernels would round.
    """
    kernels = _triton(device, kind) if kind != torch.float64 else None
    return None if kernels is None else kernels.products


@cache
def _triton(device: torch.device, kind: torch.dtype) -> ModuleType | None:
    """The Triton kernels, if they are right on this device for this type; tried out once a process."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return tried_out(_load_triton, device, kind)


def _load_triton() -> ModuleType:
    from cropi_tools.sketches import countsketch_triton

    return countsketch_triton


def tried_out(load: Callable[[], ModuleType], device: torch.device, kind: torch.dtype) -> ModuleType | None:
    """The kernels that `load` gives, if they agree with torch's on a device; None, and a line that says so, if not."""
    kernels, reason = None, None
    try:
        with starting():
            kernels = load()
            reason = disagreement(kernels, device, kind)
    except Exception as error:
        # A trial may fail in any way. Triton's own errors have a base class, but its compiler and driver also raise RuntimeError (no C
        # compiler, a device that it does not know), OSError (a cache that cannot be written), ValueError and whatever an import raises.
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason is None:
        return kernels
    format_name = str(kind).removeprefix("torch.")
    runtime.notify(f"{device}: gradients in {format_name} are sketched by torch, not by the Triton kernels: {reason}")
    return None


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
