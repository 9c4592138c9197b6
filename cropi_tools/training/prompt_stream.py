"""Which prompts come next: an endless stream of epochs, each a new order by a seeded hash of the ids, whatever the order of the file.

A place in the stream is all there is to remember.
"""

from __future__ import annotations

from collections.abc import Sequence

from cropi_tools.data.jsonl import Record
from cropi_tools.engines.protocol import sample_seed


class PromptOrder:
    """The stream of `prompts` for a seed."""

    def __init__(self, prompts: Sequence[Record], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._orders: dict[int, list[Record]] = {}

    def at(self, place: int, count: int) -> list[tuple[int, Record]]:
        """`count` prompts from `place` on, each with its own place."""
        places = range(place, place + count)
        epochs = {place // len(self._prompts) for place in places}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in sorted(epochs)}
        return [(place, self._orders[place // len(self._prompts)][place % len(self._prompts)]) for place in places]

    def _order(self, epoch: int) -> list[Record]:
        return sorted(
            self._prompts, key=lambda record: (sample_seed(self._seed, "order", epoch, record["id"]), record["id"])
        )
