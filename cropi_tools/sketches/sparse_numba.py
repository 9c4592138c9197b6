"""The inner loops of the sketches that hash every coordinate by itself: sjlt, sparse-jl and sparse-gaussian, in numba.

What they compute is defined in `projection.py`. The random matrix never exists: its rows are hashed while they are
added. Gradients, accumulators and threads are as in `countsketch_numba.py`: the same bits whatever the number of threads.

sjlt costs two hashes and four additions at random places a coordinate, several times a countsketch. The other two cost
`dim` additions for every coordinate kept: for sparse-jl 32 signs at a time, for sparse-gaussian a look-up each, several
times more.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from cropi_tools.runtime.compiling import kernel
from cropi_tools.sketches import countsketch_numba
from cropi_tools.sketches.countsketch_numba import (
    GROUP,
    ITEM_STEP,
    LANES,
    PARTIALS,
    WORD,
    WORD_STEP,
    U,
    add_group,
    mix64,
    value_at,
)
from cropi_tools.sketches.spec import NONZEROS

CHUNK = 256  # coordinates (of sjlt) or words (of sparse-gaussian) hashed at a time
TABLE_SIZE = 2**16

_16, _31, _32, _48 = U(16), U(31), U(32), U(48)
_LOW_HALF, _SIGN, _BUCKET, _ENTRY = U(0xFFFFFFFF), U(0x80000000), U(0x7FFFFFFF), U(0xFFFF)
_EXPONENT = np.uint32(0x7F800000)  # all ones in infinities and NaN


@cache
def normal_table() -> NDArray[np.float32]:
    """The 2^16 equally likely values of an entry of sparse-gaussian, ascending, float32 [65536].

    Quantiles of the normal distribution at the middles of 2^16 equal steps of probability, divided by their root mean
    square. Read-only.
    """
    normal = NormalDist()
    lower = [normal.inv_cdf((step + 0.5) / TABLE_SIZE) for step in range(TABLE_SIZE // 2)]
    scale = math.sqrt(math.fsum(value * value for value in lower) / len(lower))
    half = np.array([value / scale for value in lower], np.float32)
    table = np.concatenate([half, -half[::-1]])
    table.flags.writeable = False
    return table


@kernel
def _add_rows(
    row: NDArray[np.float32],
    keys: NDArray[np.uint64],
    values: NDArray[np.uint32],
    low: NDArray[np.uint32],
    high: NDArray[np.uint32],
) -> None:
    for word in range(row.size // WORD):
        for member in range(GROUP):
            signs = mix64(keys[member] + U(word + 1) * WORD_STEP)
            low[member] = np.uint32(signs & _LOW_HALF)
            high[member] = np.uint32(signs >> _32)
        add_group(row, WORD * word, values, low)
        add_group(row, WORD * word + LANES, values, high)


def _sparse_jl(bits: NDArray[Any], tensor_key: np.uint64, last_kept: np.uint64, partials: NDArray[np.float32]) -> None:
    size = bits.size
    for part in prange(PARTIALS):
        row = partials[part]
        keys = np.zeros(GROUP, np.uint64)
        values = np.zeros(GROUP, np.uint32)
        low = np.zeros(GROUP, np.uint32)
        high = np.zeros(GROUP, np.uint32)
        filled = 0
        for place in range(size * part // PARTIALS, size * (part + 1) // PARTIALS):
            key = mix64(tensor_key + U(place + 1) * ITEM_STEP)
            value = value_at(bits, place)
            if key <= last_kept or (value & _EXPONENT) == _EXPONENT:
                keys[filled] = key
                values[filled] = value
                filled += 1
                if filled == GROUP:
                    _add_rows(row, keys, values, low, high)
                    filled = 0
        if filled > 0:
            values[filled:] = 0  # the bits of 0.0: the rest of the group adds nothing
            _add_rows(row, keys, values, low, high)


def _sparse_gaussian(
    bits: NDArray[Any],
    tensor_key: np.uint64,
    last_kept: np.uint64,
    table: NDArray[np.float32],
    partials: NDArray[np.float32],
) -> None:
    size = bits.size
    for part in prange(PARTIALS):
        row = partials[part]
        words = np.zeros(CHUNK, np.uint64)
        pattern = np.zeros(1, np.uint32)
        value = pattern.view(np.float32)
        for place in range(size * part // PARTIALS, size * (part + 1) // PARTIALS):
            key = mix64(tensor_key + U(place + 1) * ITEM_STEP)
            pattern[0] = value_at(bits, place)
            if key <= last_kept or (pattern[0] & _EXPONENT) == _EXPONENT:
                for first in range(0, row.size // 4, CHUNK):
                    count = min(CHUNK, row.size // 4 - first)
                    for word in range(count):
                        words[word] = mix64(key + U(first + word + 1) * WORD_STEP)
                    for word in range(count):
                        at = 4 * (first + word)
                        row[at] += table[words[word] & _ENTRY] * value[0]
                        row[at + 1] += table[(words[word] >> _16) & _ENTRY] * value[0]
                        row[at + 2] += table[(words[word] >> _32) & _ENTRY] * value[0]
                        row[at + 3] += table[words[word] >> _48] * value[0]


def _sjlt(bits: NDArray[Any], tensor_key: np.uint64, partials: NDArray[np.float32]) -> None:
    size = bits.size
    for part in prange(PARTIALS):
        row = partials[part]
        block = row.size // NONZEROS
        places = np.zeros((CHUNK, NONZEROS), np.uint32)
        patterns = np.zeros((CHUNK, NONZEROS), np.uint32)
        values = patterns.view(np.float32)
        end = size * (part + 1) // PARTIALS
        for first in range(size * part // PARTIALS, end, CHUNK):
            count = min(CHUNK, end - first)
            for index in range(count):
                key = mix64(tensor_key + U(first + index + 1) * ITEM_STEP)
                pattern = value_at(bits, first + index)
                for pair in range(NONZEROS // 2):
                    word = mix64(key + U(pair + 1) * WORD_STEP)
                    for half in range(2):
                        draw = (word >> (_32 * U(half))) & _LOW_HALF
                        bucket = ((draw & _BUCKET) * U(block)) >> _31
                        places[index, 2 * pair + half] = np.uint32(U((2 * pair + half) * block) + bucket)
                        patterns[index, 2 * pair + half] = pattern ^ np.uint32(draw & _SIGN)
            for index in range(count):
                for member in range(NONZEROS):
                    row[places[index, member]] += values[index, member]


_sjlt_serial, _sjlt_parallel = kernel(_sjlt), kernel(_sjlt, parallel=True)
_sparse_jl_serial, _sparse_jl_parallel = kernel(_sparse_jl), kernel(_sparse_jl, parallel=True)
_sparse_gaussian_serial, _sparse_gaussian_parallel = kernel(_sparse_gaussian), kernel(_sparse_gaussian, parallel=True)


def sjlt_add(bits: NDArray[Any], tensor_key: np.uint64, partials: NDArray[np.float32]) -> None:
    """Add the sjlt of one tensor to `partials` [PARTIALS, dim], float32, unscaled; `bits` [n] as in `countsketch_numba.py`."""
    kernel = _sjlt_parallel if bits.size >= countsketch_numba.PARALLEL_FROM else _sjlt_serial
    with np.errstate(over="ignore"):  # without the compiler the hash wraps around in numpy, which warns
        kernel(bits, tensor_key, partials)


def sparse_jl_add(
    bits: NDArray[Any], tensor_key: np.uint64, last_kept: np.uint64, partials: NDArray[np.float32]
) -> None:
    """Add the kept coordinates of one tensor, each times its row of signs, to `partials` [PARTIALS, dim], unscaled.

    A coordinate is kept when its key is at most `last_kept`, and also when it is not finite, so that no NaN stays
    unseen. `bits` [n] as in `countsketch_numba.py`. Eight rows of signs are hashed at a time, while they are added.
    """
    kernel = _sparse_jl_parallel if bits.size >= countsketch_numba.PARALLEL_FROM else _sparse_jl_serial
    with np.errstate(over="ignore"):
        kernel(bits, tensor_key, last_kept, partials)


def sparse_gaussian_add(
    bits: NDArray[Any], tensor_key: np.uint64, last_kept: np.uint64, partials: NDArray[np.float32]
) -> None:
    """As `sparse_jl_add`, with entries of `normal_table` for signs."""
    kernel = _sparse_gaussian_parallel if bits.size >= countsketch_numba.PARALLEL_FROM else _sparse_gaussian_serial
    with np.errstate(over="ignore"):
        kernel(bits, tensor_key, last_kept, normal_table(), partials)
