"""The loops over a gradient on a GPU, in Triton: the countsketch, and a norm with inner products.

`device.py` prepares what they read. Both go over all tensors of a gradient in one launch. A tensor is known by its
distance from one of them, the anchor, in whole runs of RUN coordinates: as multiples of RUN, addresses are known to be
aligned, and loads are 16 bytes wide.

Nothing depends on which program runs first: every program owns what it writes and adds in a fixed order, so the same
gradient gives the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cropi_tools.influence.device import RUN

SUMMED_AT_ONCE = 4096  # coordinates a program of the sketch loads before it adds them: many bytes on their way
PRODUCT_BLOCK = 8192  # coordinates multiplied and added in float32 by one program; blocks are added in float64


@triton.jit
def _countsketch(  # type: ignore[no-untyped-def]
    anchor,
    addresses,
    lengths,
    shifts,
    words,
    signs,
    bounds,
    sums,
    parts,
    tiles,
    ROWS: tl.constexpr,
    TILE_RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Program (c, p) adds part p of the segments that reach cell c = remainder * tiles + tile to its own sums."""
    cell = tl.program_id(0)
    part = tl.program_id(1)
    low = tl.load(bounds + 2 * cell)
    count = tl.load(bounds + 2 * cell + 1) - low
    first = low + count * part // parts
    last = low + count * (part + 1) // parts
    run = tl.arange(0, TILE_RUNS)
    lane = tl.arange(0, RUN)
    place = (cell % tiles) * TILE_RUNS + run
    total = tl.zeros((ROWS, TILE_RUNS, RUN), tl.float32)
    row = first + tl.arange(0, ROWS)
    address = tl.load(addresses + row, mask=row < last, other=0)
    length = tl.load(lengths + row, mask=row < last, other=0)
    shift = tl.load(shifts + row, mask=row < last, other=0)
    word = tl.load(words + row, mask=row < last, other=0)
    for start in range(first, last, ROWS):
        # where the next segments lie is asked for before these are read, so that no load waits for another
        row = start + ROWS + tl.arange(0, ROWS)
        next_address = tl.load(addresses + row, mask=row < last, other=0)
        next_length = tl.load(lengths + row, mask=row < last, other=0)
        next_shift = tl.load(shifts + row, mask=row < last, other=0)
        next_word = tl.load(words + row, mask=row < last, other=0)
        at = place[None, :] - shift[:, None]
        inside = (at >= 0) & (at < length[:, None])
        runs = (address[:, None] + at) * RUN
        places = runs[:, :, None] + lane[None, None, :]
        values = tl.load(anchor + places, mask=inside[:, :, None], other=0.0).to(tl.float32)
        bits = tl.load(signs + (word[:, None] + at), mask=inside, other=0)
        minus = ((bits[:, :, None] >> lane[None, None, :]) & 1) != 0
        total += tl.where(minus, -values, values)
        address, length, shift, word = next_address, next_length, next_shift, next_word
    if last > first:
        own = sums + ((part * tl.num_programs(0) + cell).to(tl.int64) * TILE_RUNS + run[:, None]) * RUN + lane[None, :]
        tl.store(own, tl.load(own) + tl.sum(total, axis=0))


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    anchor,
    offsets,
    sizes,
    mean_anchor,
    mean_offsets,
    tensors,
    starts,
    out,
    tensor_count,
    MEANS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """Program b writes its block's sum of squares and its inner product with each mean to row b of `out`."""
    block = tl.program_id(0)
    tensor = tl.load(tensors + block)
    start = tl.load(starts + block)
    place = start * RUN + tl.arange(0, BLOCK)
    inside = place < tl.load(sizes + tensor) * RUN
    values = tl.load(anchor + (tl.load(offsets + tensor) * RUN + place), mask=inside, other=0.0).to(tl.float32)
    tl.store(out + block * (MEANS + 1), tl.sum(values * values, axis=0))
    for mean in tl.static_range(MEANS):
        offset = tl.load(mean_offsets + mean * tensor_count + tensor) * RUN
        others = tl.load(mean_anchor + (offset + place), mask=inside, other=0.0)
        tl.store(out + block * (MEANS + 1) + mean + 1, tl.sum(values * others, axis=0))


def countsketch(
    anchor: torch.Tensor,
    addresses: torch.Tensor,
    lengths: torch.Tensor,
    shifts: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    bounds: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Add the signed segments to `sums` [parts, RUN remainders, tiles, coordinates of a tile], float32.

    The segments are in the order of their shift's remainder by RUN, then of its whole runs. Of each: `addresses`
    (int64, in runs from the anchor), `lengths` (int32, runs; 0 for one to be left out), `shifts` (int32, whole runs), and
    in `words` (int64) the place of its first word in `signs`, which has one int32 a run. bounds [cells, 2], int32: the
    segments that may reach a cell of `sums`.
    """
    parts, remainders, tiles, width = sums.shape
    with torch.cuda.device(anchor.device):
        _countsketch[(remainders * tiles, parts)](
            anchor,
            addresses,
            lengths,
            shifts,
            words,
            signs,
            bounds,
            sums,
            parts,
            tiles,
            ROWS=SUMMED_AT_ONCE // width,
            TILE_RUNS=width // RUN,
            RUN=RUN,
            num_warps=8,
        )


def products(
    anchor: torch.Tensor,
    offsets: torch.Tensor,
    sizes: torch.Tensor,
    mean_anchor: torch.Tensor,
    mean_offsets: torch.Tensor,
    tensors: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """The gradient's sum of squares and its inner products with the means, float64 [means + 1], on the device.

    offsets [tensors] and mean_offsets [means, tensors]: int64, runs from the anchors. sizes [tensors]: int64, runs, 0
    where there is no gradient. A block is PRODUCT_BLOCK coordinates of `tensors` (int32) from the run `starts` (int64).
    """
    means = len(mean_offsets)
    out = torch.empty(len(tensors), means + 1, dtype=torch.float32, device=anchor.device)
    with torch.cuda.device(anchor.device):
        _products[(len(tensors),)](
            anchor,
            offsets,
            sizes,
            mean_anchor,
            mean_offsets,
            tensors,
            starts,
            out,
            mean_offsets.shape[1],
            MEANS=means,
            BLOCK=PRODUCT_BLOCK,
            RUN=RUN,
            num_warps=8,
        )
    return out.sum(0, dtype=torch.float64)
