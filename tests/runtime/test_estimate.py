"""How much of the work a probe does, and what it takes for the time of an item."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cropi_tools import runtime
from cropi_tools.runtime.estimate import Estimate, evenly, measured


@pytest.mark.parametrize(
    ("items", "each", "first", "parts"),
    [
        (64, 0.01, 0.0, [1, 64]),  # all fit
        (64, 0.01, 60.0, [1, 1, 64]),  # what is compiled at first tells nothing
        (64, 1.0, 0.0, [1, 2, 4, 8]),  # 2 + 4 + 8 seconds: 16 more are too many
        (64, 30.0, 0.0, [1, 1]),
        (1, 0.01, 3.0, [1, 1]),
        (0, 1.0, 0.0, [0]),
    ],
)
def test_as_much_as_there_is_time_for(
    items: int, each: float, first: float, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, done = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def run(part: Sequence[int]) -> int:
        now[0] += len(part) * each + (0 if done else first)
        done.append(len(part))
        assert list(part) == sorted(set(part))
        return len(part)

    found = measured(range(items), run)
    assert done == parts
    assert found.items == found.result == parts[-1]
    assert found.seconds == pytest.approx(parts[-1] * each)
    assert found.seconds * found.share(items) == pytest.approx(items * each)


def test_a_probe_says_nothing_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def run(part: Sequence[int]) -> None:
        runtime.notify("trained for 2 steps")

    measured([1, 2, 3], run)
    runtime.notify("after")
    assert capsys.readouterr().err == "after\n"


def test_numbers_are_spread_evenly() -> None:
    assert list(evenly(10, 3)) == [0, 4, 8]
    assert list(evenly(2, 5)) == [0, 1]
    assert list(evenly(0, 5)) == []


def test_the_lines_of_an_estimate() -> None:
    lines = Estimate("3 prompts", 90.0, 2e6, "1 prompt that was sampled", 1.0, 500, notes=["more"]).lines()
    assert lines[:3] == ["3 prompts, about 500 tokens", "time:   90.0 s, loading apart", "disk:   2 MB"]
    assert lines[4:] == ["more", "from 1 prompt that was sampled, in 1 s; nothing was written"]
