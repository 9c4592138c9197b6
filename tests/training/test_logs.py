"""The three files that a run is watched by, and its line on the terminal."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.data.jsonl import Record
from cropi_tools.runtime.errors import CropiError, InputError
from cropi_tools.training.logs import LOGS, Logs, live_note
from cropi_tools.training.trackers import Tracker


class Noted(Tracker):
    """A tracker that remembers."""

    name = "noted"

    def __init__(self) -> None:
        self.records: list[tuple[str, Record]] = []
        self.closed: list[bool] = []

    def write(self, kind: str, record: Record) -> None:
        self.records.append((kind, record))

    def _show(self, *given: Any) -> None: ...

    def _close(self, failed: bool) -> None:
        self.closed.append(failed)


def test_records_after_the_commit_are_dropped_torn_lines_too(tmp_path: Path) -> None:
    logs = Logs(tmp_path, {})
    logs.write("metrics.jsonl", {"step": 1})
    sizes = logs.sync()
    logs.write("metrics.jsonl", {"step": 2})
    logs.write("timings.jsonl", {"step": 2})
    logs.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "lo')
    again = Logs(tmp_path, sizes)
    again.write("metrics.jsonl", {"step": 2})
    again.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "timings.jsonl").read_text() == ""


def test_a_new_run_takes_nothing_over(tmp_path: Path) -> None:
    """Killed before its first commit: nothing of it counts."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    Logs(tmp_path, {}).close()
    assert [(tmp_path / name).read_text() for name in LOGS] == ["", "", ""]


def test_a_file_that_lost_what_was_saved_is_named(tmp_path: Path) -> None:
    """It would be filled up with zero bytes otherwise."""
    logs = Logs(tmp_path, {})
    logs.write("evaluations.jsonl", {"step": 0})
    sizes = logs.sync()
    logs.close()
    (tmp_path / "evaluations.jsonl").write_text("")
    with pytest.raises(InputError, match=r"evaluations\.jsonl: has 0 bytes, 12 were saved.*remove .* to start again"):
        Logs(tmp_path, sizes)
    assert (tmp_path / "evaluations.jsonl").read_bytes() == b""


def test_processes_that_do_not_write_leave_no_file(tmp_path: Path) -> None:
    logs = Logs(None, {})
    logs.write("metrics.jsonl", {"step": 1})
    assert logs.sync() == {}
    logs.close()
    assert not any((tmp_path / name).exists() for name in LOGS)


def test_another_name_is_an_error(tmp_path: Path) -> None:
    logs = Logs(tmp_path, {})
    with pytest.raises(KeyError):
        logs.write("metric.jsonl", {"step": 1})
    logs.close()


def test_trackers_get_every_record(tmp_path: Path) -> None:
    noted = Noted()
    with Logs(tmp_path, {}, [noted]) as logs:
        for name in LOGS:
            logs.write(name, {"step": 3, "value": 0.5})
    assert noted.records == [(kind, {"step": 3, "value": 0.5}) for kind in ("metrics", "evaluations", "timings")]
    assert noted.closed == [False]


def test_trackers_are_told_that_a_run_broke_off(tmp_path: Path) -> None:
    noted = Noted()
    with pytest.raises(CropiError), Logs(tmp_path, {}, [noted]):
        raise CropiError("the engine failed")
    assert noted.closed == [True]


def test_a_number_that_is_none_leaves_json_whole(tmp_path: Path) -> None:
    """The step that diverged is the one to look at: its line must be there, and readable."""
    with Logs(tmp_path, {}) as logs:
        logs.write("metrics.jsonl", {"step": 7, "loss": 0.5, "behavior_kl": math.inf, "entropy": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 7, "loss": 0.5, "behavior_kl": None, "entropy": None}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes, by the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_names_the_file_and_the_commit_stays_good(full_disk: None, tmp_path: Path) -> None:
    noted = Noted()
    logs = Logs(tmp_path, {}, [noted])
    logs.write("metrics.jsonl", {"step": 1})
    sizes = logs.sync()
    with pytest.raises(CropiError, match=r"metrics\.jsonl: cannot be written \(File too large\); make room"):
        logs.write("metrics.jsonl", {"step": 2, "text": "x" * 200})
    logs.close(failed=True)
    assert noted.records == [("metrics", {"step": 1})]
    assert noted.closed == [True]
    again = Logs(tmp_path, sizes)
    again.write("metrics.jsonl", {"step": 2})
    again.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_live_line() -> None:
    figures = {"reward": 0.5, "accuracy": 0.25, "entropy": 2.0, "kl": 0.001, "tokens_trained": 9}
    assert live_note(figures, 12345.0) == "reward 0.50  accuracy 0.25  entropy 2.00  KL 0.001  12.3k tokens/s"
    assert live_note(figures, 12.4).endswith(" 12 tokens/s")
    nothing = {**figures, "entropy": 0.0, "kl": 0.0, "tokens_trained": 0}
    assert live_note(nothing, 12.4) == "reward 0.50  accuracy 0.25  entropy -  KL -  12 tokens/s"
