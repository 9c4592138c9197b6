"""The sketches once more, coordinate by coordinate in Python integers and float64, written from the definition."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

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
