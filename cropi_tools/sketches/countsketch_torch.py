"""The countsketch of `projection.py` in plain torch operations, for tensors of any device.

Torch has no fast sum at given places that adds in a fixed order, so none is used. The segments of a group are laid into
the rows of a buffer in such a way that no two overlap, which is a plain copy, and the rows are summed: the same
gradient gives the same bits each time. Sorted by where they begin, segments go to the rows in turn, and there are as
many rows as segments ever overlap; the buffer is then little larger than the group, for any dimension that is not much
larger. Torch's integers are signed and wrap around, and their right shifts repeat the sign: `mix64` masks that off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cropi_tools.sketches.countsketch_numba import ITEM_STEP, WORD, WORD_STEP

MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GROUP = 2**23  # coordinates laid out at a time, about 200 MB in all; part of the result's low bits, so fixed
HALF = WORD // 2  # signs in the low half of a word, and in the high one


class Plan(NamedTuple):
    """What of a tensor's segments never changes; 16 bytes a segment, on its device."""

    keys: torch.Tensor  # int64 [segments]
    places: torch.Tensor  # int64 [segments], in the buffer of the segment's group
    rows: list[int]  # of the buffer of each group


def new_sums(hash_dim: int, segment: int, device: torch.device) -> torch.Tensor:
    """The sums of a sketch that is not yet wrapped round, float32 [1, hash_dim + segment], not yet set."""
    return torch.empty(1, hash_dim + segment, dtype=torch.float32, device=device)


def plan(tensor_key: int, size: int, hash_dim: int, segment: int, device: torch.device) -> Plan:
    """The plan of a tensor of `size` coordinates with the given key."""
    keys = segment_keys(tensor_key, -(-size // segment))
    places, rows = [], []
    for shifts in segment_shifts(keys, hash_dim).split(GROUP // segment):
        ordered, order = shifts.sort(stable=True)
        rank = torch.arange(len(shifts))
        overlapping = int((torch.searchsorted(ordered, ordered + segment) - rank).max())
        places.append(shifts.index_add(0, order, rank % overlapping, alpha=hash_dim + segment))
        rows.append(overlapping)
    return Plan(keys.to(device), torch.cat(places).to(device), rows)


def countsketch_add(gradient: torch.Tensor, plan: Plan, hash_dim: int, segment: int, sums: torch.Tensor) -> None:
    """Add the countsketch of one tensor [n], flat and contiguous, of any floating type, to `sums`."""
    device, width, count = gradient.device, hash_dim + segment, GROUP // segment
    coordinates = torch.arange(segment, device=device)
    word_steps = torch.arange(1, segment // WORD + 1, device=device) * _signed(int(WORD_STEP))
    to_top = torch.arange(HALF - 1, -1, -1, dtype=torch.int32, device=device)
    parts = gradient.split(count * segment)
    groups = zip(parts, plan.keys.split(count), plan.places.split(count), plan.rows, strict=True)
    for part, keys, places, rows in groups:
        values = part.to(torch.float32)
        missing = len(keys) * segment - len(values)
        if missing:  # the end of the tensor, filled up with zeros
            values = torch.nn.functional.pad(values, (0, missing))
        halves = mix64(keys[:, None] + word_steps).view(torch.int32)  # the low half of each word first
        signs = (halves.reshape(-1, 1) << to_top).bitwise_and_(-(2**31))
        signed = signs.bitwise_xor_(values.view(torch.int32).view(-1, HALF)).view(torch.float32)
        buffer = torch.zeros(rows * width, dtype=torch.float32, device=device)
        buffer[(places[:, None] + coordinates).view(-1)] = signed.view(-1)
        sums += buffer.view(rows, width).sum(0)


def segment_keys(tensor_key: int, segments: int) -> torch.Tensor:
    """The keys of a tensor's segments, int64 [segments], on the CPU."""
    return mix64(torch.arange(1, segments + 1) * _signed(int(ITEM_STEP)) + _signed(tensor_key))


def segment_shifts(keys: torch.Tensor, hash_dim: int) -> torch.Tensor:
    """Where in the sketch the segments with these keys begin, int64 [segments]."""
    return (_shifted(keys, 32) * hash_dim) >> 32  # below 2^63, so never negative


def mix64(state: torch.Tensor) -> torch.Tensor:
    """The hash of `projection.py` of every element, int64."""
    state = (state ^ _shifted(state, 30)) * _signed(MIX_1)
    state = (state ^ _shifted(state, 27)) * _signed(MIX_2)
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, places: int) -> torch.Tensor:
    """A logical right shift."""
    return (state >> places) & ((1 << 64 - places) - 1)


def _signed(value: int) -> int:
    """The number of 64 bits that int64 holds in the same bits."""
    return value - (value >> 63 << 64)
