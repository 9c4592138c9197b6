"""The inner loop of the countsketch in numba, and what all sketches share: the hash and the reading of a gradient.

What is computed is defined in `projection.py`; here it is made fast. Three things carry the speed of the countsketch,
which reads a gradient nearly as fast as a plain sum does. The block of 32 coordinates under one half-word of signs is
written as vector instructions in LLVM's language: left to vectorise by itself, the compiler widens 32-bit integers to
64 bits and checks for aliasing at every block. The gradient is asked for twice ahead of its use, 16 KiB into the
second-level cache and 1 KiB into the first: the processor's own prefetcher loses its way, because the accumulator is
read and written at random in between. And bfloat16 and float16 are widened in the register, so that half the bytes are
read.

A gradient comes as bit patterns, and their type says what they are: uint32 of float32, uint16 of bfloat16, int16 of
float16.

Additions are grouped by `PARTIALS` ranges of every tensor, each with its own accumulator, whatever the number of
threads: the result has the same bits on one core and on sixty-four. No flag lets the compiler assume finite values.
Small tensors stay on the calling thread: waking the others costs microseconds on an idle machine and a scheduler's
time slice, milliseconds, on a busy one.

Under NUMBA_DISABLE_JIT=1 the kernels run as plain numpy, slowly; the vector instructions then have a numpy form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cropi_tools.runtime.compiling import kernel

PARTIALS = 8  # accumulators a sketch is summed in; part of the result's low bits, so fixed
LANES = 32  # coordinates under one half-word of signs
WORD = 2 * LANES
GROUP = 8  # rows of a dense projection that share one pass over the accumulator
FAR_BYTES, NEAR_BYTES = 16384, 1024  # how far ahead the gradient is fetched into the second-level and the first cache
PARALLEL_FROM = 2**18  # coordinates of a tensor from which more than one thread is used

# Plain numbers are signed to numba, and signed with unsigned makes a float: every constant of the hash is unsigned.
U = np.uint64
ITEM_STEP = U(0x9E3779B97F4A7C15)  # from one segment (or coordinate) of a tensor to the next
WORD_STEP = U(0xD1342543DE82EF95)  # from one word of signs to the next
_MIX_1, _MIX_2 = U(0xBF58476D1CE4E5B9), U(0x94D049BB133111EB)
_27, _30, _31, _32 = U(27), U(30), U(31), U(32)
_LOW_HALF = U(0xFFFFFFFF)


@kernel(inline="always")
def mix64(state: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64: a bijection of 64 bits in which every input bit reaches every output bit."""
    state = (state ^ (state >> _30)) * _MIX_1
    state = (state ^ (state >> _27)) * _MIX_2
    return state ^ (state >> _31)


def widen(bits: NDArray[Any]) -> NDArray[np.uint32]:
    """The same values as bit patterns of float32, in the same shape; `bits` as the module says."""
    if bits.dtype == np.int16:
        return bits.view(np.float16).astype(np.float32).view(np.uint32)
    return bits.astype(np.uint32) << np.uint32(32 - 8 * bits.itemsize)


if config.DISABLE_JIT:  # type: ignore[attr-defined,unused-ignore]
    _SHIFTS = np.arange(LANES - 1, -1, -1, dtype=np.uint32)

    def _negated(values: Any, half: Any) -> Any:
        return (values ^ ((np.uint32(half) << _SHIFTS) & np.uint32(0x80000000))).view(np.float32)

    def add_block(row: NDArray[np.float32], at: Any, bits: NDArray[Any], first: int, half: np.uint32) -> None:
        """row[at + l] += sign(l) * value[first + l] for 32 lanes l; the sign is minus where bit l of `half` is set."""
        row[at : at + LANES] += _negated(widen(bits[first : first + LANES]), half)

    def value_at(bits: NDArray[Any], place: int) -> np.uint32:
        """The bit pattern, as float32, of one coordinate."""
        return np.uint32(widen(bits[place : place + 1])[0])

    def add_group(row: NDArray[np.float32], at: int, values: NDArray[np.uint32], halves: NDArray[np.uint32]) -> None:
        """row[at + l] += sum over q of sign(q, l) * values[q] for 32 lanes l; signs from bit l of `halves[q]`."""
        for value, half in zip(values, halves, strict=True):
            row[at : at + LANES] += _negated(np.full(LANES, value), half)

else:
    _I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    _INTEGERS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(ir.FloatType(), LANES)

    def _widened(builder: Any, kind: Any, packed: Any, lanes: int) -> Any:
        """The float32 bit patterns of `packed`, one number or a vector of numbers of the gradient's type `kind`."""
        if kind.bitwidth == 32:
            return packed

        def shape(element: Any) -> Any:
            return element if lanes == 1 else ir.VectorType(element, lanes)

        if kind.signed:  # float16
            return builder.bitcast(
                builder.fpext(builder.bitcast(packed, shape(ir.HalfType())), shape(ir.FloatType())), shape(_I32)
            )
        sixteen = ir.Constant(_I32, 16) if lanes == 1 else ir.Constant(shape(_I32), [16] * lanes)
        return builder.shl(builder.zext(packed, shape(_I32)), sixteen)

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
            loaded = builder.load(builder.bitcast(source, packed), align=width // 8)
            values = _widened(builder, bits.dtype, loaded, LANES)
            target = builder.gep(_data(context, builder, signature.args[0], row_value), [at_value])
            target = builder.bitcast(target, _FLOATS.as_pointer())
            total = builder.fadd(builder.load(target, align=4), _signed(builder, values, half_value))
            builder.store(total, target, align=4)

            kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTES], kind)
            read, data = ir.Constant(_I32, 0), ir.Constant(_I32, 1)
            start = builder.bitcast(source, _BYTES)
            for distance, closeness in ((FAR_BYTES, 2), (NEAR_BYTES, 3)):
                level = ir.Constant(_I32, closeness)
                for line in range(0, LANES * width // 8, 64):  # past the end of the array too: a prefetch cannot fault
                    ahead = builder.gep(start, [ir.Constant(_I64, distance + line)])
                    builder.call(prefetch, [ahead, read, level, data])
            return context.get_dummy_value()

        return types.void(row, types.int64, bits, types.int64, types.uint32), generate

    @intrinsic  # type: ignore[misc,unused-ignore]
    def value_at(typing: Any, bits: Any, place: Any) -> Any:
        """The bit pattern, as float32, of one coordinate."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = builder.gep(_data(context, builder, signature.args[0], arguments[0]), [arguments[1]])
            return _widened(builder, bits.dtype, builder.load(source, align=bits.dtype.bitwidth // 8), 1)

        return types.uint32(bits, types.int64), generate

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


_countsketch_serial, _countsketch_parallel = kernel(_countsketch), kernel(_countsketch, parallel=True)


def countsketch_add(
    bits: NDArray[Any], tensor_key: np.uint64, hash_dim: int, segment: int, partials: NDArray[np.float32]
) -> None:
    """Add the countsketch of one tensor to `partials` [PARTIALS, hash_dim + segment], float32, not yet wrapped round.

    `bits` [n] are the bit patterns of the flat tensor, of a type as the module says.
    """
    kernel = _countsketch_parallel if bits.size >= PARALLEL_FROM else _countsketch_serial
    with np.errstate(over="ignore"):  # without the compiler the hash wraps around in numpy, which warns
        kernel(bits, tensor_key, hash_dim, segment, partials)
