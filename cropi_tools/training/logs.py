"""The files that a run is watched by: metrics.jsonl, evaluations.jsonl, timings.jsonl; and the line on the terminal.

The first two are reproducible to the byte; times are kept apart from them. Each record also goes to the trackers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi_tools.data.jsonl import Record, dump_line
from cropi_tools.training.trackers import Tracker

LOGS = ("metrics.jsonl", "evaluations.jsonl", "timings.jsonl")


class Logs:
    """Writes into the folder `part`; None: nowhere (the other processes of a run).

    sizes: how many bytes of each file a resumed run's last commit counts; what was written after it is dropped, torn lines included.
    """

    def __init__(self, part: Path | None, sizes: Mapping[str, int], trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        self._streams = {}
        if part is None:
            return
        for name in LOGS:
            stream = open(part / name, "a", encoding="utf-8")
            stream.truncate(sizes.get(name, 0))
            stream.seek(0, os.SEEK_END)
            self._streams[name] = stream

    def write(self, name: str, record: Record) -> None:
        """Append a record to one of LOGS."""
        if name not in self._streams:
            return
        self._streams[name].write(dump_line(record) + "\n")
        self._streams[name].flush()
        for tracker in self._trackers:
            tracker.write(name.partition(".")[0], record)

    def sync(self) -> dict[str, int]:
        """Make everything durable; the size of each file, for the commit."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        return {name: stream.tell() for name, stream in self._streams.items()}

    def close(self) -> None:
        """Close files and trackers."""
        for stream in self._streams.values():
            stream.close()
        for tracker in self._trackers:
            tracker.close()


def live_note(figures: Mapping[str, Any], tokens_per_second: float) -> str:
    """A step's figures in a line; time left is the progress bar's own."""
    rate = f"{tokens_per_second / 1000:.1f}k" if tokens_per_second >= 1000 else f"{tokens_per_second:.0f}"
    return (
        f"reward {figures['reward']:.2f}  accuracy {figures['accuracy']:.2f}  entropy {figures['entropy']:.2f}  "
        f"KL {figures['kl']:.3f}  {rate} tokens/s"
    )
