"""The compact set against Python's own, and what it costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cropi_tools.data import digest_set
from cropi_tools.data.digest_set import Seen, short_digest


@given(st.lists(st.text(max_size=3), max_size=60))
def test_the_same_answers_as_a_set_and_a_dictionary(texts: list[str]) -> None:
    ours, notes, plain, first = Seen(), Seen(notes=True), set[str](), dict[str, int]()
    for place, text in enumerate(texts):
        assert (text in ours) == (text in plain)
        assert ours.add(text) == (text not in plain)
        assert notes.add(text, place) == (text not in first)
        plain.add(text)
        first.setdefault(text, place)
        assert notes.note(text) == first[text]
        assert len(ours) == len(notes) == len(plain)


def test_growing_keeps_every_text_and_its_note() -> None:
    notes = Seen(notes=True)
    for place in range(20_000):
        assert notes.add(f"text {place}", place)
    assert all(notes.note(f"text {place}") == place for place in range(20_000))
    assert not any(f"other {place}" in notes for place in range(20_000))
    assert notes.note("other") is None


def test_crowded_slots_are_passed_over(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Digests that all want the same slot, and some that differ in one half alone."""
    digests = {f"{high},{low}": (high, low << 40) for high in range(1, 40) for low in range(40)}
    monkeypatch.setattr(digest_set, "_digest", digests.__getitem__)
    crowded = Seen()
    for text in list(digests)[::2]:
        assert crowded.add(text)
    assert [text in crowded for text in digests] == [place % 2 == 0 for place in range(len(digests))]


def test_memory_is_that_of_the_table() -> None:
    """However long the texts: 16 bytes a slot, and at least three eighths of the slots taken."""
    ids = Seen()
    for place in range(50_000):
        ids.add(f"{place}" * 50)
    slots = len(ids._high)
    assert ids._high.itemsize + ids._low.itemsize == 16
    assert 50_000 * 4 / 3 <= slots <= 50_000 * 8 / 3


def test_short_digests_tell_texts_apart() -> None:
    found = {short_digest(str(number)) for number in range(10_000)}
    assert len(found) == 10_000
    assert all(0 <= value < 2**31 for value in found)
