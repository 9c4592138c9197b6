"""Halves and groups by hash: what they do not depend on, and that they are even."""

from __future__ import annotations

from hashlib import blake2b

import pytest

from cropi_tools.gradients.splitting import GROUPS, place_of, samples_of


def number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def test_the_hash_is_the_documented_one() -> None:
    for name in ("p1", "grüße", ""):
        assert place_of(name) == (number(f"halves:{name}") % 2, number(f"halves:{name}") // 2 % GROUPS)
        assert (0 in samples_of(name, 8, 0)) == (number(f"halves:{name}:0") % 2 == 0)
    place_of("\ud800")  # half of a surrogate pair, as JSON can hold


@pytest.mark.parametrize("count", range(1, 18))
def test_samples_are_shared_out_evenly_and_stay_where_they_are(count: int) -> None:
    for name in (f"p{n}" for n in range(50)):
        halves = [samples_of(name, count, half) for half in (0, 1)]
        assert sorted(halves[0] + halves[1]) == list(range(count))
        assert abs(len(halves[0]) - len(halves[1])) == count % 2
        for half, longer in enumerate(samples_of(name, count + 3, half) for half in (0, 1)):
            assert [k for k in longer if k < count] == halves[half]


def test_halves_and_groups_are_even_over_prompts_and_places() -> None:
    """Neither prompts nor sample numbers lean to a half: 4000 coins, five standard deviations."""
    places = [place_of(f"p{n}") for n in range(4000)]
    assert abs(sum(place.half for place in places) - 2000) < 160
    for group in range(GROUPS):
        assert abs(sum(place.group == group for place in places) - 125) < 55
    for sample in range(8):
        assert abs(sum(sample in samples_of(f"p{n}", 8, 0) for n in range(4000)) - 2000) < 160
