"""Which texts were met before, in 24 bytes and less a text: a hash table of 128-bit digests, whatever the texts' lengths.

Two of n different texts share a digest with a probability of n^2 / 2^129: 1.5e-27 at a million, 1.5e-21 at a thousand million.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from struct import Struct

_halves = Struct("<QQ").unpack
_SMALLEST = 1024  # slots; a power of two, as every later size


class Seen:
    """A set of texts; with `notes`, each text keeps a number of 63 bits it was added with.

    At most three quarters of the slots are taken, then their number doubles: 21 to 43 bytes a text, 32 to 64 with notes.
    """

    def __init__(self, notes: bool = False) -> None:
        self._notes: array[int] | None = array("q", bytes(8 * _SMALLEST)) if notes else None
        self._high = array("Q", bytes(8 * _SMALLEST))  # 0: the slot is free
        self._low = array("Q", bytes(8 * _SMALLEST))
        self._mask = _SMALLEST - 1
        self._room = _SMALLEST * 3 // 4
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, text: str) -> bool:
        return self._high[self._slot(*_digest(text))] != 0

    def note(self, text: str) -> int | None:
        """The number the text was added with; None when it was not."""
        assert self._notes is not None, "made without notes"
        slot = self._slot(*_digest(text))
        return self._notes[slot] if self._high[slot] else None

    def add(self, text: str, note: int = 0) -> bool:
        """Add a text; whether it is new. The note of one that is not stays."""
        high, low = _digest(text)
        slot, highs = self._slot(high, low), self._high
        if highs[slot]:
            return False
        highs[slot], self._low[slot] = high, low
        if self._notes is not None:
            self._notes[slot] = note
        self._count += 1
        if self._count > self._room:
            self._grow()
        return True

    def _slot(self, high: int, low: int) -> int:
        """Where the digest stands, or the free slot where it belongs."""
        highs, lows, mask = self._high, self._low, self._mask
        slot = low & mask
        while (found := highs[slot]) and (found != high or lows[slot] != low):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        highs, lows, notes = self._high, self._low, self._notes
        size = 2 * len(highs)
        self._high, self._low = array("Q", bytes(8 * size)), array("Q", bytes(8 * size))
        self._mask, self._room = size - 1, size * 3 // 4
        if notes is not None:
            self._notes = array("q", bytes(8 * size))
        for place, high in enumerate(highs):
            if high:
                slot = self._slot(high, lows[place])
                self._high[slot], self._low[slot] = high, lows[place]
                if notes is not None:
                    assert self._notes is not None
                    self._notes[slot] = notes[place]


def _digest(text: str) -> tuple[int, int]:
    """Two numbers of 64 bits, the first of them not 0."""
    high, low = _halves(blake2b(text.encode(), digest_size=16).digest())
    return high or 1, low


def short_digest(text: str) -> int:
    """31 bits that tell texts apart but for one pair in 2^31."""
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


def hash64(text: str) -> int:
    """A number of 64 bits that follows from the text alone: its BLAKE2b with 8 bytes of output, read big-endian."""
    # surrogatepass: JSON may hold lone surrogates, and an id is hashed as it stands
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
