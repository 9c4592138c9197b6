"""Which coordinates a sketch is made of and what decides it: the layout of the parameters and the spec of a projection.

What a spec means, to the last bit, is defined in `projection.py`. Here are its fields, their ranges, and how two specs
are compared; all of it is written into stores and read back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, Self, cast, get_args

from cropi_tools.runtime.errors import InputError, UsageError

Method = Literal["countsketch", "sjlt", "sparse-jl", "sparse-gaussian", "none"]

METHODS: tuple[str, ...] = get_args(Method)
SPARSE: tuple[str, ...] = ("sparse-jl", "sparse-gaussian")  # the methods that keep a share of the coordinates
VERSION = 1
LONGEST_SEGMENT = 2048
NONZEROS = 4  # places to which sjlt adds a coordinate
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

    `layout` is the hash of the `Layout`; `keep` is of sparse-jl and sparse-gaussian only, `segment` and `hash_dim` of
    countsketch, `nonzeros` (always 4) of sjlt. Make one by `create`. Values out of range raise UsageError.
    """

    method: Method
    dim: int
    seed: int
    layout: str
    keep: float | None = None
    segment: int | None = None
    hash_dim: int | None = None
    nonzeros: int | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown sketch {self.method!r}; choose from {', '.join(METHODS)}")
        if self.version != VERSION:
            raise UsageError(f"projection version {self.version} is unknown; this program writes version {VERSION}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed} is out of range; choose 0 to 2^63 - 1")
        if self.method in SPARSE:
            if self.keep is None or not 2**-53 <= self.keep <= 1:
                raise UsageError(
                    f"{self.method} keeps a share of the coordinates in (0, 1], not {self.keep}; set --keep"
                )
        elif self.keep is not None:
            raise UsageError(f"keep belongs to {' and '.join(SPARSE)}; leave it out for {self.method}")
        if self.nonzeros != (NONZEROS if self.method == "sjlt" else None):
            raise UsageError(f"nonzeros is {NONZEROS} for sjlt and left out for all else, not {self.nonzeros}")
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
        """The spec of a new sketch.

        `dim` is needed except by "none", which keeps all coordinates and has no seed. `keep` is the share of the
        coordinates kept, needed by sparse-jl and sparse-gaussian and refused for all else.
        """
        if method == "none":
            if dim is not None and dim != layout.size:
                raise UsageError(f"sketch none keeps all {layout.size} coordinates; leave the dimension out")
            return cls("none", layout.size, 0, layout.sha256, keep)
        if dim is None:
            raise UsageError(f"sketch {method} needs a dimension")
        if method == "countsketch":
            return cls("countsketch", dim, seed, layout.sha256, keep, min(LONGEST_SEGMENT, dim), dim)
        if method == "sjlt":
            return cls("sjlt", dim, seed, layout.sha256, keep, nonzeros=NONZEROS)
        return cls(cast(Method, method), dim, seed, layout.sha256, keep)  # an unknown method is refused there

    def folded(self, dim: int) -> ProjectionSpec:
        """The spec of this countsketch folded to `dim` dimensions; UsageError unless `dim` divides the present ones."""
        if self.method != "countsketch":
            raise UsageError(f"only a countsketch can be folded, not {self.method}; project the raw gradients again")
        check_fold(self.dim, dim)
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


def check_fold(before: int, dim: int) -> None:
    """UsageError unless a sketch of `before` dimensions can be folded to `dim`."""
    _check_dim(dim)
    if before % dim:
        raise UsageError(f"{before} dimensions cannot be folded to {dim}; choose a divisor")


def _check_dim(dim: int) -> None:
    if not DIM_MULTIPLE <= dim <= LARGEST_DIM or dim % DIM_MULTIPLE:
        raise UsageError(f"dimension {dim} cannot be used; choose a multiple of {DIM_MULTIPLE} from 64 to 2^31")
