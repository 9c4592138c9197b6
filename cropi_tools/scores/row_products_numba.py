"""Inner products of float16 rows with a few float32 vectors, in numba, near the speed at which the rows are read.

Widening to memory and multiplying there would move every number three times, and a matrix product with six columns runs at a fraction of
what one with hundreds does. So four rows are widened in registers and multiplied with three vectors there: twelve sums at once keep the
processor's multipliers busy, and need no more registers than there are. Vectors are taken a tile at a time, to stay in the cache.

numba knows no float16 on a CPU; one conversion instruction is put in by hand. Sums may be reordered, but no flag lets the compiler assume
finite values: NaN in a row must come out as NaN. Under NUMBA_DISABLE_JIT=1 the kernels run as plain numpy, slowly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cropi_tools.runtime.compiling import kernel

TILE = 8192  # coordinates; three vectors of it are 96 KiB of the second-level cache
ROWS, VECTORS = 4, 3
_REORDERED = {"reassoc", "nsz", "contract"}

if config.DISABLE_JIT:  # type: ignore[attr-defined,unused-ignore]

    def _widened(bits: Any) -> Any:
        """The float16 with these bits."""
        return np.float32(np.uint16(bits).view(np.float16))

else:

    @intrinsic  # type: ignore[misc,unused-ignore]
    def _widened(typing: Any, bits: Any) -> Any:
        """The float16 with these bits."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

        return types.float32(types.uint16), generate


@kernel(nogil=True)
def widen(source: NDArray[np.uint16], target: NDArray[np.float32]) -> None:
    """target[j] = the float16 whose bits are source[j]."""
    for place in range(source.size):
        target[place] = _widened(source[place])


@kernel(nogil=True, fastmath=_REORDERED)
def _four_by_three(row0: Any, row1: Any, row2: Any, row3: Any, one: Any, two: Any, three: Any) -> Any:
    """The twelve inner products of four rows of float16 bits with three vectors, by vector."""
    a0 = a1 = a2 = a3 = np.float32(0)
    b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = np.float32(0)
    for place in range(one.size):
        w0, w1, w2, w3 = _widened(row0[place]), _widened(row1[place]), _widened(row2[place]), _widened(row3[place])
        x, y, z = one[place], two[place], three[place]
        a0 += w0 * x
        a1 += w1 * x
        a2 += w2 * x
        a3 += w3 * x
        b0 += w0 * y
        b1 += w1 * y
        b2 += w2 * y
        b3 += w3 * y
        c0 += w0 * z
        c1 += w1 * z
        c2 += w2 * z
        c3 += w3 * z
    return (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3)


@kernel(nogil=True)
def few_products(bits: NDArray[np.uint16], vectors: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """out[n, v] = the inner product of row n with vector v, summed in float32.

    bits: float16 rows as uint16 [N, d], N >= 1; vectors: float32 [V, d], V >= 1; out: float32 [N, V].
    """
    count, dim = bits.shape
    sets = len(vectors)
    out[:] = 0
    for first in range(0, count, ROWS):
        for start in range(0, dim, TILE):
            stop = min(start + TILE, dim)
            for one in range(0, sets, VECTORS):
                # where fewer are left, the last one is taken again and its products are left out
                found = _four_by_three(
                    bits[first, start:stop],
                    bits[min(first + 1, count - 1), start:stop],
                    bits[min(first + 2, count - 1), start:stop],
                    bits[min(first + 3, count - 1), start:stop],
                    vectors[one, start:stop],
                    vectors[min(one + 1, sets - 1), start:stop],
                    vectors[min(one + 2, sets - 1), start:stop],
                )
                for row in range(min(ROWS, count - first)):
                    for vector in range(min(VECTORS, sets - one)):
                        out[first + row, one + vector] += found[vector][row]
