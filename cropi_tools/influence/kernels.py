"""The inner loops of the sketches, in numba. What they compute is defined in `projection.py`; here it is made fast.

Three things carry the speed of the countsketch, which reads a gradient nearly as fast as a plain sum does. The block of
32 coordinates under one half-word of signs is written as vector instructions in LLVM's language: left to vectorise by
itself, the compiler widens 32-bit integers to 64 bits and checks for aliasing at every block. The gradient is asked for
16 KiB ahead, into the second-level cache: the processor's own prefetcher loses its way, because the accumulator is read
and written at random in between. And bfloat16 is widened in the register, so that half the bytes are read.

Additions are grouped by `PARTIALS` ranges of every tensor, each with its own accumulator, whatever the number of
threads: the result has the same bits on one core and on sixty-four. No flag lets the compiler assume finite values.
Small tensors stay on the calling thread: waking the others costs microseconds on an idle machine and a scheduler's
time slice, milliseconds, on a busy one.

Under NUMBA_DISABLE_JIT=1 the kernels run as plain numpy, slowly; the two vector instructions then have a numpy form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

PARTIALS = 8  # accumulators a sketch is summed in; part of the result's low bits, so fixed
LANES = 32  # coordinates under one half-word of signs
WORD = 2 * LANES
GROUP = 8  # rows of the dense projection that share one pass over the accumulator
PREFETCH_BYTES = 16384
PARALLEL_FROM = 2**18  # coordinates of a tensor from which more than one thread is used

# Plain numbers are signed to numba, and signed with unsigned makes a float: every constant of the hash is unsigned.
U = np.uint64
ITEM_STEP = U(0x9E3779B97F4A7C15)  # from one segment (or coordinate) of a tensor to the next
WORD_STEP = U(0xD1342543DE82EF95)  # from one word of signs to the next
_MIX_1, _MIX_2 = U(0xBF58476D1CE4E5B9), U(0x94D049BB133111EB)
_ONE, _27, _30, _31, _32 = U(1), U(27), U(30), U(31), U(32)
_LOW_HALF = U(0xFFFFFFFF)
_EXPONENT = np.uint32(0x7F800000)  # all ones in infinities and NaN


@njit(inline="always")  # type: ignore[misc,unused-ignore]
def mix64(state: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64: a bijection of 64 bits in which every input bit reaches every output bit."""
    state = (state ^ (state >> _30)) * _MIX_1
    state = (state ^ (state >> _27)) * _MIX_2
    return state ^ (state >> _31)


if config.DISABLE_JIT:  # type: ignore[attr-defined,unused-ignore]
    _SHIFTS = np.arange(LANES - 1, -1, -1, dtype=np.uint32)

    def _negated(values: Any, half: Any) -> Any:
        return (values ^ ((np.uint32(half) << _SHIFTS) & np.uint32(0x80000000))).view(np.float32)

    def add_block(row: NDArray[np.float32], at: Any, bits: NDArray[Any], first: int, half: np.uint32) -> None:
        """row[at + l] += sign(l) * value[first + l] for 32 lanes l; the sign is minus where bit l of `half` is set."""
        widened = bits[first : first + LANES].astype(np.uint32) << np.uint32(32 - 8 * bits.itemsize)
        row[at : at + LANES] += _negated(widened, half)

    def add_group(row: NDArray[np.float32], at: int, values: NDArray[np.uint32], halves: NDArray[np.uint32]) -> None:
        """row[at + l] += sum over q of sign(q, l) * values[q] for 32 lanes l; signs from bit l of `halves[q]`."""
        for value, half in zip(values, halves, strict=True):
            row[at : at + LANES] += _negated(np.full(LANES, value), half)

else:
    _I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    _INTEGERS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(ir.FloatType(), LANES)

    def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        return context.make_array(kind)(context, builder, value).data

    def _all_lanes(builder: Any, scalar: Any) -> Any:
        undefined = ir.Constant(_INTEGERS, ir.Undefined)
        first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_INTEGERS, [0] * LANES))

    def _signed(builder: Any, values: Any, half: Any) -> Any:
        """The 32 float bit patterns `values`, those negated whose bit of the scalar `half` is set."""
        to_top = ir.Constant(_INTEGERS, [LANES - 1 - lane for lane in range(LANES)])
        top = ir.Constant(_INTEGERS, [0x80000000] * LANES)
        signs = builder.and_(builder.shl(_all_lanes(builder, half), to_top), top)
        return builder.bitcast(builder.xor(values, signs), _FLOATS)

    @intrinsic  # type: ignore[misc,unused-ignore]
    def add_block(typing: Any, row: Any, at: Any, bits: Any, first: Any, half: Any) -> Any:
        """row[at + l] += sign(l) * value[first + l] for 32 lanes l; the sign is minus where bit l of `half` is set."""
        width = bits.dtype.bitwidth

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row_value, at_value, bits_value, first_value, half_value = arguments
            source = builder.gep(_data(context, builder, signature.args[2], bits_value), [first_value])
            packed = ir.VectorType(ir.IntType(width), LANES).as_pointer()
            values = builder.load(builder.bitcast(source, packed), align=width // 8)
            if width == 16:
                values = builder.shl(builder.zext(values, _INTEGERS), ir.Constant(_INTEGERS, [16] * LANES))
            target = builder.gep(_data(context, builder, signature.args[0], row_value), [at_value])
            target = builder.bitcast(target, _FLOATS.as_pointer())
            total = builder.fadd(builder.load(target, align=4), _signed(builder, values, half_value))
            builder.store(total, target, align=4)

            kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTES], kind)
            read, second_level, data = (ir.Constant(_I32, number) for number in (0, 2, 1))
            start = builder.bitcast(source, _BYTES)
            for line in range(0, LANES * width // 8, 64):  # past the end of the array too: a prefetch cannot fault
                ahead = builder.gep(start, [ir.Constant(_I64, PREFETCH_BYTES + line)])
                builder.call(prefetch, [ahead, read, second_level, data])
            return context.get_dummy_value()

        return types.void(row, types.int64, bits, types.int64, types.uint32), generate

    @intrinsic  # type: ignore[misc,unused-ignore]
    def add_group(typing: Any, row: Any, at: Any, values: Any, halves: Any) -> Any:
        """row[at + l] += sum over q of sign(q, l) * values[q] for 32 lanes l; signs from bit l of `halves[q]`."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row_value, at_value, values_value, halves_value = arguments
            target = builder.gep(_data(context, builder, signature.args[0], row_value), [at_value])
            target = builder.bitcast(target, _FLOATS.as_pointer())
            values_data = _data(context, builder, signature.args[2], values_value)
            halves_data = _data(context, builder, signature.args[3], halves_value)
            total = builder.load(target, align=4)
            for member in range(GROUP):
                place = [ir.Constant(_I64, member)]
                value = builder.load(builder.gep(values_data, place), align=4)
                half = builder.load(builder.gep(halves_data, place), align=4)
                total = builder.fadd(total, _signed(builder, _all_lanes(builder, value), half))
            builder.store(total, target, align=4)
            return context.get_dummy_value()

        return types.void(row, types.int64, values, halves), generate


def _countsketch(
    bits: NDArray[Any], tensor_key: np.uint64, hash_dim: int, segment: int, partials: NDArray[np.float32]
) -> None:
    size = bits.size
    segments = (size + segment - 1) // segment
    for part in prange(PARTIALS):
        row = partials[part]
        tail = np.zeros(WORD, bits.dtype)  # used once, since only the last segment of a tensor can be short
        for index in range(segments * part // PARTIALS, segments * (part + 1) // PARTIALS):
            key = mix64(tensor_key + U(index + 1) * ITEM_STEP)
            shift = np.int64(((key >> _32) * U(hash_dim)) >> _32)
            first = index * segment
            length = min(segment, size - first)
            whole = length // WORD
            for word in range(whole):
                signs = mix64(key + U(word + 1) * WORD_STEP)
                add_block(row, shift + WORD * word, bits, first + WORD * word, np.uint32(signs & _LOW_HALF))
                add_block(row, shift + WORD * word + LANES, bits, first + WORD * word + LANES, np.uint32(signs >> _32))
            rest = length - WORD * whole
            if rest > 0:  # the end of the tensor, filled up with zeros
                tail[:rest] = bits[first + WORD * whole : first + length]
                signs = mix64(key + U(whole + 1) * WORD_STEP)
                add_block(row, shift + WORD * whole, tail, 0, np.uint32(signs & _LOW_HALF))
                add_block(row, shift + WORD * whole + LANES, tail, LANES, np.uint32(signs >> _32))


@njit  # type: ignore[misc,unused-ignore]
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
            value = np.uint32(np.uint32(bits[place]) << np.uint32(32 - 8 * bits.itemsize))
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


_countsketch_serial, _countsketch_parallel = njit(_countsketch), njit(parallel=True)(_countsketch)
_sparse_jl_serial, _sparse_jl_parallel = njit(_sparse_jl), njit(parallel=True)(_sparse_jl)


def countsketch_add(
    bits: NDArray[Any], tensor_key: np.uint64, hash_dim: int, segment: int, partials: NDArray[np.float32]
) -> None:
    """Add the countsketch of one tensor to `partials` [PARTIALS, hash_dim + segment], float32, not yet wrapped round.

    `bits` [n] are the bit patterns of the flat tensor: uint32 for float32, uint16 for bfloat16.
    """
    kernel = _countsketch_parallel if bits.size >= PARALLEL_FROM else _countsketch_serial
    with np.errstate(over="ignore"):  # without the compiler the hash wraps around in numpy, which warns
        kernel(bits, tensor_key, hash_dim, segment, partials)


def sparse_jl_add(
    bits: NDArray[Any], tensor_key: np.uint64, last_kept: np.uint64, partials: NDArray[np.float32]
) -> None:
    """Add the kept coordinates of one tensor, each times its row of signs, to `partials` [PARTIALS, dim], unscaled.

    A coordinate is kept when its key is at most `last_kept`, and also when it is not finite, so that no NaN stays
    unseen. `bits` as in `countsketch_add`. The matrix of signs never exists: eight of its rows are hashed at a time,
    while they are added.
    """
    kernel = _sparse_jl_parallel if bits.size >= PARALLEL_FROM else _sparse_jl_serial
    with np.errstate(over="ignore"):
        kernel(bits, tensor_key, last_kept, partials)
