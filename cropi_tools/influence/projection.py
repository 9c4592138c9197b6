"""Sketches: a gradient of P coordinates pressed into `dim` numbers that keep inner products, without bias.

This module is part of the file format: stores made anywhere must agree, so the projection is defined here to the last
bit and pinned by golden values in the tests. `kernels.py` computes it fast. Integers have 64 bits and wrap around.

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

sparse-jl (the paper's, with signs for Gaussians). Coordinate c of a tensor is kept when key(c) < floor(keep * 2^64),
each by itself and with the same chance in all parameters, and

    out[r] = sum over kept c of sign(c, r) * g[c] / sqrt(keep * dim)                    r = 0 .. dim - 1

with variance (1 + c^2 - 2 S) / dim + (1 / keep - 1) S, S = sum g_i^2 v_i^2: no `dim` removes the second term. Gaussian
entries are not offered: they cost a logarithm and a cosine for every pair of entries and vary more.

none. The float32 gradient itself, tensors in the order of the layout.

Additions are in float32, in an order that depends on the order of the calls but not on the number of threads.
Sources: arXiv 2510.26491, section on projection; the count sketch of Charikar, Chen and Farach-Colton (2002).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cropi_tools.data.errors import InputError, UsageError
from cropi_tools.influence.device import DeviceCountsketch, triton_kernels
from cropi_tools.influence.kernels import ITEM_STEP, PARALLEL_FROM, PARTIALS, countsketch_add, mix64, sparse_jl_add

Method = Literal["countsketch", "sparse-jl", "none"]

METHODS: tuple[str, ...] = get_args(Method)
VERSION = 1
LONGEST_SEGMENT = 2048
DIM_MULTIPLE = 64
LARGEST_DIM = 2**31


@dataclass(frozen=True)
class Layout:
    """The trained parameters in order: pairs of a name and a shape, tied weights once."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        if len({name for name, _ in self.entries}) != len(self.entries):
            raise InputError("the layout names a parameter twice; give every parameter one name, tied weights once")
        if self.size == 0:
            raise InputError("the layout has no coordinates; nothing would be trained")

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, Any]]) -> Self:
        """The layout of (name, tensor) pairs, as `model.named_parameters()` gives them."""
        return cls(tuple((name, tuple(int(length) for length in tensor.shape)) for name, tensor in parameters))

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each parameter lies in the flat vector of all coordinates."""
        result, start = {}, 0
        for name, shape in self.entries:
            result[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        return result

    @cached_property
    def size(self) -> int:
        """The number of coordinates of all parameters together, P."""
        return sum(math.prod(shape) for _, shape in self.entries)

    @cached_property
    def sha256(self) -> str:
        """The hash, in hexadecimal, of the layout's JSON without spaces."""
        return hashlib.sha256(json.dumps(self.to_json(), separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> list[list[Any]]:
        """A list of [name, [length, ...]]."""
        return [[name, list(shape)] for name, shape in self.entries]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The layout whose `to_json` is `value`; InputError if it is not one."""
        try:
            return cls(tuple((str(name), tuple(int(length) for length in shape)) for name, shape in value))
        except (TypeError, ValueError) as error:
            raise InputError(f"not a layout of parameters ({error}); the store's attributes are damaged") from error


@dataclass(frozen=True)
class ProjectionSpec:
    """All that decides a sketch. Two stores can be compared when their specs are equal.

    `layout` is the hash of the `Layout`; `keep` is of sparse-jl only, `segment` and `hash_dim` of countsketch only.
    Make one by `create`. Values out of range raise UsageError.
    """

    method: Method
    dim: int
    seed: int
    layout: str
    keep: float | None = None
    segment: int | None = None
    hash_dim: int | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown sketch {self.method!r}; choose from {', '.join(METHODS)}")
        if self.version != VERSION:
            raise UsageError(f"projection version {self.version} is unknown; this program writes version {VERSION}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed} is out of range; choose 0 to 2^63 - 1")
        if self.method == "sparse-jl":
            if self.keep is None or not 2**-53 <= self.keep <= 1:
                raise UsageError(f"sparse-jl keeps a share of the coordinates in (0, 1], not {self.keep}; set --keep")
        elif self.keep is not None:
            raise UsageError(f"keep belongs to sparse-jl; leave it out for {self.method}")
        if self.method != "none":
            _check_dim(self.dim)
        if self.method != "countsketch":
            if self.segment is not None or self.hash_dim is not None:
                raise UsageError(f"segment and hash_dim belong to countsketch; leave them out for {self.method}")
        else:
            if self.segment is None or self.hash_dim is None:
                raise UsageError("a countsketch needs segment and hash_dim; make its spec by ProjectionSpec.create")
            _check_dim(self.hash_dim)
            if self.hash_dim % self.dim or self.segment != min(LONGEST_SEGMENT, self.hash_dim):
                raise UsageError(f"dim {self.dim}, segment {self.segment}, hash_dim {self.hash_dim} do not go together")

    @classmethod
    def create(
        cls, method: str, layout: Layout, dim: int | None = None, seed: int = 0, keep: float | None = None
    ) -> Self:
        """The spec of a new sketch. `dim` is needed except by "none", which keeps all coordinates and has no seed."""
        if method == "none":
            if dim is not None and dim != layout.size:
                raise UsageError(f"sketch none keeps all {layout.size} coordinates; leave the dimension out")
            return cls("none", layout.size, 0, layout.sha256, keep)
        if dim is None:
            raise UsageError(f"sketch {method} needs a dimension")
        if method == "countsketch":
            return cls("countsketch", dim, seed, layout.sha256, keep, min(LONGEST_SEGMENT, dim), dim)
        return cls(cast(Method, method), dim, seed, layout.sha256, keep)  # an unknown method is refused there

    def folded(self, dim: int) -> ProjectionSpec:
        """The spec of this countsketch folded to `dim` dimensions; UsageError unless `dim` divides the present ones."""
        if self.method != "countsketch":
            raise UsageError(f"only a countsketch can be folded, not {self.method}; project the raw gradients again")
        _check_fold(self.dim, dim)
        return ProjectionSpec(**{**asdict(self), "dim": dim})

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary, the fields that do not apply left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The spec whose `to_json` is `value`; InputError if it is not one."""
        try:
            return cls(**value)
        except (TypeError, UsageError) as error:
            raise InputError(f"not a projection spec ({error}); the store is damaged or of another version") from error

    def difference(self, other: ProjectionSpec) -> str | None:
        """One phrase naming what differs ("dim 8192 against 4096, seed 0 against 1"), or None if nothing does."""
        phrases = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                if field.name == "layout":
                    mine, theirs = mine[:12], theirs[:12]
                phrases.append(f"{field.name} {mine} against {theirs}")
        return ", ".join(phrases) or None


class Sketcher:
    """Sketches one gradient at a time, parameter by parameter, as a backward pass delivers them.

    `begin`, then `add` for each parameter in any order, then `finish`. A parameter that is never added has a gradient
    of zero; one added twice counts as the sum, since a sketch is linear. Holds 8 * (hash_dim + segment) floats for
    countsketch, 8 * dim for sparse-jl, P for "none".

    Where `device.py` enables it, the countsketch of a gradient on a GPU is made there, equal to the CPU's up to the
    order of additions. Such a gradient is read in `finish`: it must stay as it is until then.
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
        elif spec.method == "sparse-jl":
            self._sums = np.empty((PARTIALS, spec.dim), np.float32)
        else:
            self._sums = np.empty((1, layout.size), np.float32)
        self._devices: dict[torch.device, DeviceCountsketch] = {}
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

        float32 and torch bfloat16 are read where they lie when contiguous; other floating types are converted to
        float32, and tensors of other devices are copied to the CPU first, except where the class says otherwise.
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
            self._sums[0, place] += (bits.astype(np.uint32) << np.uint32(32 - 8 * bits.itemsize)).view(np.float32)
        elif self.spec.method == "countsketch":
            countsketch_add(bits, self._keys[name], self._hash_dim, self._segment, self._sums)
        else:
            last_kept = np.uint64(int(self._keep * 2.0**64) - 1)
            sparse_jl_add(bits, self._keys[name], last_kept, self._sums)

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
            elif self.spec.method == "sparse-jl":
                result = sums * np.float32(1 / math.sqrt(self._keep * self.spec.dim))
            else:
                result = sums
        if not np.isfinite(result).all():
            raise InputError("the gradient is not finite; look for NaN or overflow in the policy's forward pass")
        return result

    def _device_sketch(self, gradient: torch.Tensor) -> DeviceCountsketch | None:
        """What sketches gradients on the device of this one, or None if they are copied to the CPU."""
        device = gradient.device
        kernels = triton_kernels(device) if self.spec.method == "countsketch" else None
        if kernels is not None and device not in self._devices:
            sizes = {name: place.stop - place.start for name, place in self.layout.places.items()}
            self._devices[device] = DeviceCountsketch(kernels, self._keys, sizes, self._hash_dim, self._segment, device)
        return self._devices.get(device)


def fold(rows: NDArray[Any], dim: int) -> NDArray[np.float32]:
    """Countsketches [..., d] folded to float32 [..., dim] by adding their blocks; UsageError unless dim divides d."""
    before = rows.shape[-1]
    _check_fold(before, dim)
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

    Both share OpenMP, and numba's first parallel call sets the number of threads of both: torch would compute the first prompt with
    one number and the others with another, and a resumed store could differ from an unbroken one in its low bits.
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
    """The flat gradient as bit patterns, uint16 for torch bfloat16 and uint32 (of float32) for all else."""
    if isinstance(gradient, torch.Tensor):
        flat = gradient.detach().reshape(-1)
        if flat.dtype == torch.bfloat16:
            packed: NDArray[np.uint16] = flat.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
            return packed
        gradient = flat.to("cpu", torch.float32).numpy()
    flat_values: NDArray[np.float32] = np.ascontiguousarray(gradient, np.float32).reshape(-1)
    return flat_values.view(np.uint32)


def _check_dim(dim: int) -> None:
    if not DIM_MULTIPLE <= dim <= LARGEST_DIM or dim % DIM_MULTIPLE:
        raise UsageError(f"dimension {dim} cannot be used; choose a multiple of {DIM_MULTIPLE} from 64 to 2^31")


def _check_fold(before: int, dim: int) -> None:
    _check_dim(dim)
    if before % dim:
        raise UsageError(f"{before} dimensions cannot be folded to {dim}; choose a divisor")
