"""The sketches once more, coordinate by coordinate in Python integers and float64, written from the definition."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

MASK = 2**64 - 1
ITEM_STEP = 0x9E3779B97F4A7C15
WORD_STEP = 0xD1342543DE82EF95


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def tensor_key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    return mix64(mix64((seed + ITEM_STEP) & MASK) ^ int.from_bytes(digest, "little"))


def item_key(key: int, item: int) -> int:
    return mix64((key + (item + 1) * ITEM_STEP) & MASK)


def sign(key: int, place: int) -> int:
    word = mix64((key + (place // 64 + 1) * WORD_STEP) & MASK)
    return -1 if word >> (place % 64) & 1 else 1


def countsketch(
    tensors: Mapping[str, NDArray[np.float32]], seed: int, dim: int, hash_dim: int, segment: int
) -> NDArray[np.float64]:
    out = np.zeros(dim)
    for name, tensor in tensors.items():
        for place, value in enumerate(tensor.reshape(-1).tolist()):
            index, offset = divmod(place, segment)
            key = item_key(tensor_key(seed, name), index)
            shift = ((key >> 32) * hash_dim) >> 32
            out[((offset + shift) % hash_dim) % dim] += sign(key, offset) * value
    return out


def is_kept(seed: int, name: str, place: int, keep: float) -> bool:
    return item_key(tensor_key(seed, name), place) < int(keep * 2**64)


def sparse_jl(tensors: Mapping[str, NDArray[np.float32]], seed: int, dim: int, keep: float) -> NDArray[np.float64]:
    out = np.zeros(dim)
    for name, tensor in tensors.items():
        for place, value in enumerate(tensor.reshape(-1).tolist()):
            if is_kept(seed, name, place, keep):
                key = item_key(tensor_key(seed, name), place)
                for row in range(dim):
                    out[row] += sign(key, row) * value
    return out / math.sqrt(keep * dim)


def sjlt(tensors: Mapping[str, NDArray[np.float32]], seed: int, dim: int, nonzeros: int) -> NDArray[np.float64]:
    out = np.zeros(dim)
    block = dim // nonzeros
    for name, tensor in tensors.items():
        for place, value in enumerate(tensor.reshape(-1).tolist()):
            key = item_key(tensor_key(seed, name), place)
            for member in range(nonzeros):
                word = mix64((key + (member // 2 + 1) * WORD_STEP) & MASK)
                draw = word >> (32 * (member % 2)) & (2**32 - 1)
                bucket = draw % 2**31 * block >> 31
                out[member * block + bucket] += -value if draw >> 31 else value
    return out / math.sqrt(nonzeros)


def quantiles() -> NDArray[np.float64]:
    """The values of an entry of sparse-gaussian, before they are rounded to float32."""
    middles = ndtri((np.arange(2**16) + 0.5) / 2**16)
    return np.asarray(middles / math.sqrt(math.fsum(middles**2) / 2**16))


def sparse_gaussian(
    tensors: Mapping[str, NDArray[np.float32]], seed: int, dim: int, keep: float
) -> NDArray[np.float64]:
    out = np.zeros(dim)
    table = quantiles().astype(np.float32).tolist()
    for name, tensor in tensors.items():
        for place, value in enumerate(tensor.reshape(-1).tolist()):
            if is_kept(seed, name, place, keep):
                key = item_key(tensor_key(seed, name), place)
                for row in range(dim):
                    word = mix64((key + (row // 4 + 1) * WORD_STEP) & MASK)
                    out[row] += table[word >> 16 * (row % 4) & 0xFFFF] * value
    return out / math.sqrt(keep * dim)
