"""The loops over one parameter's gradient on a GPU, in Triton: its countsketch, and its norm with inner products.

Nothing depends on which program runs first: every program owns what it writes and adds in a fixed order, so the same
gradient gives the same bits each time. A program of the countsketch is one warp and owns a tile of the sketch, kept in
registers. Of the segments that reach the tile, sorted by where they begin, it adds a part one after another, each lane
what falls on its own coordinates. The lanes hash the signs of a segment once, and fetch each other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cropi_tools.sketches import countsketch_torch
from cropi_tools.sketches.countsketch_numba import WORD_STEP

# These decide the order of additions and with it the low bits of the results.
TILE = 512  # coordinates of the sketch that one program adds up
PROGRAMS = 8192  # of a large tensor, several rounds on any device
FEWEST = 4  # segments of a program at least: what it does besides them should not weigh
PRODUCT_BLOCK = 8192  # coordinates multiplied and added in float32 by one program; blocks are added in float64

_MIX_1, _MIX_2 = tl.constexpr(countsketch_torch.MIX_1), tl.constexpr(countsketch_torch.MIX_2)
_WORD_STEP = tl.constexpr(int(WORD_STEP))


class Plan(NamedTuple):
    """What of a tensor's segments never changes, on its device; segments in the order of their shifts."""

    keys: torch.Tensor  # int64 [segments]
    order: torch.Tensor  # int64 [segments]: which of the tensor's segments it is
    bounds: torch.Tensor  # int64 [tiles, 2]: the segments that reach a tile
    parts: int  # programs that share a tile


def new_sums(hash_dim: int, segment: int, device: torch.device) -> torch.Tensor:
    """The sums of a sketch that is not yet wrapped round, float32 [parts, whole tiles], not yet set."""
    tiles = -(-(hash_dim + segment) // TILE)
    return torch.empty(-(-PROGRAMS // tiles), tiles * TILE, dtype=torch.float32, device=device)


def plan(tensor_key: int, size: int, hash_dim: int, segment: int, device: torch.device) -> Plan:
    """The plan of a tensor of `size` coordinates with the given key."""
    keys = countsketch_torch.segment_keys(tensor_key, -(-size // segment))
    shifts, order = countsketch_torch.segment_shifts(keys, hash_dim).sort(stable=True)
    starts = torch.arange(-(-(hash_dim + segment) // TILE)) * TILE
    edges = torch.stack([starts - segment + 1, starts + TILE], -1)
    bounds = torch.searchsorted(shifts, edges)
    most = int((bounds[:, 1] - bounds[:, 0]).max())
    parts = min(-(-most // FEWEST), -(-PROGRAMS // len(starts)))
    return Plan(keys[order].to(device), order.to(device), bounds.to(device), parts)


def countsketch_add(gradient: torch.Tensor, plan: Plan, hash_dim: int, segment: int, sums: torch.Tensor) -> None:
    """Add the countsketch of one tensor [n], flat and contiguous, of any floating type, to `sums`."""
    with torch.cuda.device_of(gradient):
        _countsketch[(len(plan.bounds), plan.parts)](
            gradient,
            gradient.numel(),
            plan.keys,
            plan.order,
            plan.bounds,
            sums,
            hash_dim,
            SEGMENT=segment,
            TILE=TILE,
            num_warps=1,
        )


def products(gradient: torch.Tensor, means: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradient's sum of squares and its inner product with each mean, float64 [1 + means], on the device.

    All are flat and contiguous, of one size and of floating types.
    """
    blocks = -(-gradient.numel() // PRODUCT_BLOCK)
    out = torch.empty(blocks, 1 + len(means), dtype=torch.float32, device=gradient.device)
    with torch.cuda.device_of(gradient):
        _products[(blocks,)](gradient, tuple(means), gradient.numel(), out, BLOCK=PRODUCT_BLOCK, num_warps=8)
    return out.sum(0, dtype=torch.float64)


@triton.jit
def _mix64(state):  # type: ignore[no-untyped-def]
    state = (state ^ (state >> 30)) * _MIX_1
    state = (state ^ (state >> 27)) * _MIX_2
    return state ^ (state >> 31)


# With `sums` known to be aligned, each lane would own four coordinates in a row and read as far from its neighbors.
@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["gradient", "sums"])
def _countsketch(  # type: ignore[no-untyped-def]
    gradient, size, keys, order, bounds, sums, hash_dim, SEGMENT: tl.constexpr, TILE: tl.constexpr
):
    """Program (t, p) adds part p of the segments that reach tile t to its own sums."""
    tile = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    low = tl.load(bounds + 2 * tile)
    count = tl.load(bounds + 2 * tile + 1) - low
    lane = tl.arange(0, TILE)
    half = tl.arange(0, TILE // 16)  # halves of words of signs; of TILE // 32 + 1 that are needed, a power of two
    own = sums + (part * tl.num_programs(0) + tile) * TILE + lane
    total = tl.zeros((TILE,), tl.float32)
    for row in range(low + count * part // parts, low + count * (part + 1) // parts):
        key = tl.load(keys + row).to(tl.uint64)
        shift = ((key >> 32) * hash_dim) >> 32
        start = tl.load(order + row) * SEGMENT
        length = tl.minimum(size - start, SEGMENT).to(tl.int32)
        at = (tile * TILE - shift.to(tl.int64)).to(tl.int32)  # where the tile begins in the segment, if not before it
        first = at >> 5
        word = _mix64(key + (((first + half) >> 1) + 1).to(tl.uint64) * _WORD_STEP)
        halves = (word >> (((first + half) & 1) * 32).to(tl.uint64)).to(tl.uint32)
        place = at + lane
        signs = tl.gather(halves, (place >> 5) - first, 0) >> (place & 31).to(tl.uint32)
        inside = (place >= 0) & (place < length)
        values = tl.load(gradient + (start + at) + lane, mask=inside, other=0.0).to(tl.float32)
        total += tl.where((signs & 1) != 0, -values, values)
    tl.store(own, tl.load(own) + total)


@triton.jit(do_not_specialize=["size"])
def _products(gradient, means, size, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program b writes its block's sum of squares and its inner product with each mean to row b of `out`."""
    block = tl.program_id(0)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(gradient + place, mask=place < size, other=0.0).to(tl.float32)
    row = out + block * (len(means) + 1)
    tl.store(row, tl.sum(values * values, axis=0))
    for mean in tl.static_range(len(means)):
        others = tl.load(means[mean] + place, mask=place < size, other=0.0).to(tl.float32)
        tl.store(row + mean + 1, tl.sum(values * others, axis=0))
