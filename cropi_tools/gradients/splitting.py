"""Which half a prompt or a sample belongs to (cropi-grad --halves), and which group of validation prompts is resampled together.

By a hash with a fixed seed, of the prompt's id and, for samples, their number: neither the order of a file nor what else it holds moves
anything to another half. The number hashed is BLAKE2b with 8 bytes of output, read big-endian, over "halves:ID" for a prompt and
"halves:ID:PAIR" for samples 2 PAIR and 2 PAIR + 1, of which one goes to either half.
"""

from __future__ import annotations

from typing import NamedTuple

from cropi_tools.data.digest_set import hash64

GROUPS = 32  # of validation prompts in each half, at most


class Place(NamedTuple):
    """Of a validation prompt: its half, 0 or 1, and its group in that half, 0 to GROUPS - 1."""

    half: int
    group: int


def place_of(prompt_id: str) -> Place:
    """Half and group of a validation prompt."""
    number = hash64(f"halves:{prompt_id}")
    return Place(number & 1, (number >> 1) % GROUPS)


def samples_of(prompt_id: str, count: int, half: int) -> list[int]:
    """The numbers of those of a prompt's `count` samples that are in a half, in order.

    Of samples 0 and 1 one is in each half, of 2 and 3 alike, ...: halves differ by one sample at most, and taking the first samples alone
    moves none.
    """
    found = []
    for pair in range((count + 1) // 2):
        number = 2 * pair + ((hash64(f"halves:{prompt_id}:{pair}") & 1) ^ half)
        if number < count:
            found.append(number)
    return found
