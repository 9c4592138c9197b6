"""The files that a run is watched by: metrics.jsonl, evaluations.jsonl, timings.jsonl, with --against influence.jsonl; and the live line.

All but the timings are reproducible to the byte. Each record also goes to the trackers, but for those of influence.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi_tools.data.jsonl import Record, dump_line
from cropi_tools.data.jsonl_output import open_cut
from cropi_tools.runtime.errors import CropiError, InputError
from cropi_tools.training.trackers import Tracker

LOGS = ("metrics.jsonl", "evaluations.jsonl", "timings.jsonl")
INFLUENCE = "influence.jsonl"


class Logs:
    """Writes into the folder `part`; None: nowhere (the other processes of a run). As a context it tells the trackers how the run ended.

    sizes: how many bytes of each file a resumed run's last commit counts; what was written after it is dropped, torn lines included.
    influence: whether INFLUENCE is one of the files. InputError: a file is shorter than that.
    """

    def __init__(
        self, part: Path | None, sizes: Mapping[str, int], trackers: Sequence[Tracker] = (), influence: bool = False
    ) -> None:
        self._part, self._trackers = part, trackers
        self._streams = {}
        if part is None:
            return
        try:
            for name in (*LOGS, INFLUENCE) if influence else LOGS:
                self._streams[name] = open_cut(part / name, sizes.get(name, 0), part)
        except InputError:
            self.close(failed=True)
            raise

    def write(self, name: str, record: Record) -> None:
        """Append a record to one of the files; a number that is not finite, which JSON lacks, as null. CropiError: the disk is full."""
        if self._part is None:
            return
        with self._told(name):
            self._streams[name].write(dump_line({key: _finite(value) for key, value in record.items()}) + "\n")
            self._streams[name].flush()
        for tracker in self._trackers if name != INFLUENCE else ():
            tracker.write(name.partition(".")[0], record)

    def sync(self) -> dict[str, int]:
        """Make everything durable; the size of each file, for the commit."""
        for name, stream in self._streams.items():
            with self._told(name):
                stream.flush()
                os.fsync(stream.fileno())
        return {name: stream.tell() for name, stream in self._streams.items()}

    def close(self, failed: bool = False) -> None:
        """Close files and trackers; failed: the run did not come to its end."""
        for stream in self._streams.values():
            # what counts was synced; what a full disk did not take is tried again here, for nothing
            with contextlib.suppress(OSError):
                stream.close()
        for tracker in self._trackers:
            tracker.close(failed)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *told: object) -> None:
        self.close(failed=kind is not None)

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """An error of the disk names the file."""
        try:
            yield
        except OSError as error:
            assert self._part is not None
            raise CropiError(
                f"{self._part / name}: cannot be written ({error.strerror}); make room, then the same command resumes"
            ) from None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def live_note(figures: Mapping[str, Any], tokens_per_second: float) -> str:
    """A step's figures in a line; time left is the progress bar's own. KL is not known where nothing was trained on."""
    trained = figures["tokens_trained"]
    entropy = f"{figures['entropy']:.2f}" if trained or figures["entropy"] else "-"
    kl = f"{figures['kl']:.3f}" if trained else "-"
    rate = f"{tokens_per_second / 1000:.1f}k" if tokens_per_second >= 1000 else f"{tokens_per_second:.0f}"
    return f"reward {figures['reward']:.2f}  accuracy {figures['accuracy']:.2f}  entropy {entropy}  KL {kl}  {rate} tokens/s"
