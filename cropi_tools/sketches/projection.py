"""Sketches: a gradient of P coordinates pressed into `dim` numbers that keep inner products, without bias.

This module is part of the file format: stores made anywhere must agree, so the projection is defined here to the last
bit and pinned by golden values in the tests. `kernels.py` and `sparse_kernels.py` compute it fast, `spec.py` holds what
decides it. Integers have 64 bits and wrap around.

Hash. mix64(z) is the finaliser of SplitMix64:

    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;  z ^ (z >> 31)

Keys. A trained parameter is a tensor with a name, flattened in C order; one used twice counts once, by its first name.

    seed_key   = mix64(seed + ITEM_STEP)                              ITEM_STEP = 0x9E3779B97F4A7C15
    tensor_key = mix64(seed_key ^ BLAKE2b(name in UTF-8, 8 bytes, read little-endian))
    key(i)     = mix64(tensor_key + (i + 1) * ITEM_STEP)              i: a segment or a coordinate of the tensor, from 0
    word(i, w) = mix64(key(i) + (w + 1) * WORD_STEP)                  WORD_STEP = 0xD1342543DE82EF95
    sign(i, j) = minus where bit (j mod 64), the lowest being bit 0, of word(i, j div 64) is set, else plus

countsketch (the default). Every tensor is cut into segments of `segment` coordinates; no segment spans two tensors and
the last one of a tensor may be short. For coordinate j of segment i, with shift(i) = ((key(i) >> 32) * hash_dim) >> 32,

    out[((j + shift(i)) mod hash_dim) mod dim] += sign(i, j) * g[i * segment + j]

`hash_dim` is the `dim` the sketch was made with and `segment` is min(2048, hash_dim); both stay when it is folded to a
divisor of `dim` by adding its blocks, so a folded sketch is what the folded spec gives directly. The inner product of
the sketches of unit vectors g and v with cosine c has variance (1 + c^2 - 2 sum g_i^2 v_i^2) / dim, or less. Folded to
fewer dimensions than a segment has coordinates, those of one segment at a distance of `dim` always share a place,
instead of once in `dim` times: gradients in which few channels dominate then lose more than the formula says.

sjlt. Every coordinate goes to s = 4 places (`nonzeros`), one in each quarter of the sketch. For coordinate c of a
tensor and quarter b = 0 .. s - 1, let h(c, b) be the low (b even) or the high (b odd) 32 bits of word(c, b div 2). Then

    out[b * dim / s + (((h mod 2^31) * (dim / s)) >> 31)] += g[c] / sqrt(s)       minus instead where bit 31 of h is set

Each quarter is a count sketch of dim / s numbers and they are independent, so the variance is (1 + c^2 - 2 S) / dim,
with S = sum g_i^2 v_i^2: the countsketch's. What more places buy is thinner tails, where few coordinates dominate.

sparse-jl (the paper's, with signs for Gaussians). Coordinate c of a tensor is kept when key(c) < floor(keep * 2^64),
each by itself and with the same chance in all parameters, and

    out[r] = sum over kept c of sign(c, r) * g[c] / sqrt(keep * dim)                    r = 0 .. dim - 1

with variance (1 + c^2 - 2 S) / dim + (1 / keep - 1) S: no `dim` removes the second term.

sparse-gaussian (the paper's). The same coordinates are kept, and sign(c, r) gives way to

    entry(c, r) = T[bits 16 * (r mod 4) to 16 * (r mod 4) + 15 of word(c, r div 4)]
    T[q]        = float32(Q[q] / sqrt(mean of Q^2)),    Q[q] = quantile of the normal distribution at (q + 1/2) / 2^16

computed in float64. The entries have mean 0, variance 1 and fourth moment 2.9992 (3 is the normal's), and none is
larger than 4.325. The variance is (1 + c^2 + 2 (1 / keep - 1) S) / dim + (1 / keep - 1) S: never less than with signs,
and the kernel takes over ten times as long. It is there to repeat the paper as it stands.

none. The float32 gradient itself, tensors in the order of the layout.

Products and additions are in float32, each rounded by itself, in an order that depends on the order of the calls but
not on the number of threads. For all but countsketch and none the factor before the sum is applied last, in float32.
Sources: arXiv 2510.26491, section on projection; the count sketch of Charikar, Chen and Farach-Colton (2002); the
sparse Johnson-Lindenstrauss transform in blocks of Kane and Nelson (2014).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.countsketch_numba import ITEM_STEP, PARALLEL_FROM, PARTIALS, countsketch_add, mix64, widen
from cropi_tools.sketches.device import DeviceCountsketch, device_kernels
from cropi_tools.sketches.sparse_numba import sjlt_add, sparse_gaussian_add, sparse_jl_add
from cropi_tools.sketches.spec import NONZEROS, SPARSE, Layout, ProjectionSpec, check_fold


class Sketcher:
    """Sketches one gradient at a time, parameter by parameter, as a backward pass delivers them.

    `begin`, then `add` for each parameter in any order, then `finish`. A parameter that is never added has a gradient
    of zero; one added twice counts as the sum, since a sketch is linear. Holds 8 * (hash_dim + segment) floats for
    countsketch, P for "none", 8 * dim for all else.

    The countsketch of a gradient on a GPU is made there, equal to the CPU's up to the order of additions. A gradient may
    be changed or freed after `add`.
    """

    def __init__(self, spec: ProjectionSpec, layout: Layout) -> None:
        if spec.layout != layout.sha256:
            raise InputError(
                f"the projection was made for other parameters (layout {spec.layout[:12]}, here {layout.sha256[:12]})"
                "; use the policy the store was made with"
            )
        self.spec = spec
        self.layout = layout
        self._hash_dim, self._segment, self._keep = spec.hash_dim or 0, spec.segment or 0, spec.keep or 1.0
        self._keys = {name: _tensor_key(spec.seed, name) for name in layout.places}
        if spec.method == "countsketch":
            self._sums = np.empty((PARTIALS, self._hash_dim + self._segment), np.float32)
        elif spec.method == "none":
            self._sums = np.empty((1, layout.size), np.float32)
        else:
            self._sums = np.empty((PARTIALS, spec.dim), np.float32)
        self._devices: dict[tuple[torch.device, ModuleType], DeviceCountsketch] = {}
        if any(place.stop - place.start >= PARALLEL_FROM for place in layout.places.values()):
            _start_threads()
        self.begin()

    def begin(self) -> None:
        """Start a new gradient, forgetting what was added to the last one."""
        self._sums.fill(0)
        for sketch in self._devices.values():
            sketch.begin()

    def add(self, name: str, gradient: NDArray[Any] | torch.Tensor) -> None:
        """Add the gradient of the parameter `name`, in any shape of its size.

        float32, float16 and torch bfloat16 are read where they lie when contiguous; other floating types are converted
        to float32, and tensors of other devices are copied to the CPU first, except where the class says otherwise.
        InputError for an unknown name, a wrong size or a type that is not floating.
        """
        place = self.layout.places.get(name)
        if place is None:
            raise InputError(f"{name} is not among the trained parameters of this projection")
        size, expected = math.prod(gradient.shape), place.stop - place.start
        if size != expected:
            raise InputError(f"the gradient of {name} has {size} coordinates, {expected} expected")
        floating = gradient.is_floating_point() if isinstance(gradient, torch.Tensor) else gradient.dtype.kind == "f"
        if not floating:
            raise InputError(f"the gradient of {name} is of type {gradient.dtype}; a floating type is expected")
        if isinstance(gradient, torch.Tensor) and (sketch := self._device_sketch(gradient)) is not None:
            sketch.add(name, gradient)
            return
        bits = _bits(gradient)
        if self.spec.method == "none":
            self._sums[0, place] += widen(bits).view(np.float32)
        elif self.spec.method == "countsketch":
            countsketch_add(bits, self._keys[name], self._hash_dim, self._segment, self._sums)
        elif self.spec.method == "sjlt":
            sjlt_add(bits, self._keys[name], self._sums)
        else:
            add = sparse_jl_add if self.spec.method == "sparse-jl" else sparse_gaussian_add
            add(bits, self._keys[name], np.uint64(int(self._keep * 2.0**64) - 1), self._sums)

    def finish(self) -> NDArray[np.float32]:
        """The sketch of what was added since `begin`, float32 [dim], a new array.

        InputError if a value is not finite: the gradient held NaN or infinity, or its sum overflows.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, in words
            sums = self._sums.sum(axis=0, dtype=np.float32)
            for sketch in self._devices.values():
                sums += sketch.total()
            if self.spec.method == "countsketch":
                result, beyond = sums[: self._hash_dim], sums[self._hash_dim :]
                result[: beyond.size] += beyond
                result = fold(result, self.spec.dim)
            elif self.spec.method in SPARSE:
                result = sums * np.float32(1 / math.sqrt(self._keep * self.spec.dim))
            elif self.spec.method == "sjlt":
                result = sums * np.float32(1 / math.sqrt(NONZEROS))
            else:
                result = sums
        if not np.isfinite(result).all():
            raise InputError("the gradient is not finite; look for NaN or overflow in the policy's forward pass")
        return result

    def _device_sketch(self, gradient: torch.Tensor) -> DeviceCountsketch | None:
        """What sketches gradients on the device of this one, or None if they are copied to the CPU."""
        kernels = device_kernels(gradient.device, gradient.dtype) if self.spec.method == "countsketch" else None
        if kernels is None:
            return None
        place = gradient.device, kernels
        if place not in self._devices:
            self._devices[place] = DeviceCountsketch(
                kernels, self._keys, self._hash_dim, self._segment, gradient.device
            )
        return self._devices[place]


def fold(rows: NDArray[Any], dim: int) -> NDArray[np.float32]:
    """Countsketches [..., d] folded to float32 [..., dim] by adding their blocks; UsageError unless dim divides d."""
    before = rows.shape[-1]
    check_fold(before, dim)
    folded: NDArray[np.float32] = rows.reshape(*rows.shape[:-1], before // dim, dim).sum(axis=-2, dtype=np.float32)
    return folded


def sketch_vector(
    spec: ProjectionSpec, layout: Layout, tensors: Mapping[str, NDArray[Any] | torch.Tensor]
) -> NDArray[np.float32]:
    """The sketch [dim] of one gradient given as its tensors by name; a missing parameter counts as zero."""
    sketcher = Sketcher(spec, layout)
    for name, tensor in tensors.items():
        sketcher.add(name, tensor)
    return sketcher.finish()


def project_rows(spec: ProjectionSpec, layout: Layout, rows: NDArray[Any]) -> NDArray[np.float32]:
    """The sketches [n, dim] of raw gradients [n, P], each row the tensors in the order of the layout."""
    if rows.ndim != 2 or rows.shape[1] != layout.size:
        raise InputError(f"raw gradients of shape {rows.shape} do not fit a layout of {layout.size} coordinates")
    sketcher = Sketcher(spec, layout)
    result = np.empty((len(rows), spec.dim), np.float32)
    for row, target in zip(rows, result, strict=True):
        sketcher.begin()
        for name, place in layout.places.items():
            sketcher.add(name, row[place])
        target[:] = sketcher.finish()
    return result


@cache
def _start_threads() -> None:
    """Start the kernels' threads now and leave torch the number it has.

    Both share OpenMP, and numba's first parallel call sets the number of threads of both: torch would compute the first
    prompt with one number and the others with another, and a resumed store could differ from an unbroken one in its low
    bits.
    """
    threads = torch.get_num_threads()
    # the first size for which the kernel runs in parallel
    zeros = np.zeros(PARALLEL_FROM, np.uint32)
    with np.errstate(over="ignore"):
        countsketch_add(zeros, np.uint64(0), 64, 64, np.zeros((PARTIALS, 128), np.float32))
    torch.set_num_threads(threads)


def _tensor_key(seed: int, name: str) -> np.uint64:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        seed_key = np.uint64(mix64(np.uint64(seed) + ITEM_STEP))
        return np.uint64(mix64(seed_key ^ np.uint64(int.from_bytes(digest, "little"))))


def _bits(gradient: NDArray[Any] | torch.Tensor) -> NDArray[Any]:
    """The flat gradient as bit patterns: uint16 of bfloat16, int16 of float16, uint32 of all else as float32."""
    if isinstance(gradient, torch.Tensor):
        flat = gradient.detach().reshape(-1)
        if flat.dtype == torch.bfloat16:
            packed: NDArray[np.uint16] = flat.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
            return packed
        if flat.dtype != torch.float16:
            flat = flat.to(torch.float32)
        gradient = flat.cpu().numpy()
    kind, pattern = (np.float16, np.int16) if gradient.dtype == np.float16 else (np.float32, np.uint32)
    values: NDArray[Any] = np.ascontiguousarray(gradient, kind).reshape(-1)
    return values.view(pattern)
