"""Where there is no terminal: a line soon, then one now and then, with the tokens of a step that takes long. And what an interruption tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from naive_policy import policy

from cropi_tools import runtime
from cropi_tools.engines.generating import GENERATE, WITHOUT_CACHE
from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.runtime import signals
from cropi_tools.runtime.errors import Interrupted


def test_a_line_soon_and_then_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with runtime.progress("rollouts", 40) as shown:
        for second in range(100):
            now = 1000.0 + second
            runtime.count_tokens(5)
            if second == 50:
                shown.advance(8, "accuracy 0.500")
    assert capsys.readouterr().err.splitlines() == [
        "rollouts: 0/40, 55 tokens in hand",
        "rollouts: 0/40, 205 tokens in hand",
        "rollouts: 8/40, accuracy 0.500, 100 tokens in hand",
    ]
    runtime.count_tokens(5)  # nobody listens


@pytest.mark.parametrize("way", ["loop", GENERATE, WITHOUT_CACHE], ids=str)
def test_an_engine_counts_every_token_once(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(runtime, "count_tokens", counted.append)
    engine = TransformersEngine(policy(), loop=way == "loop")
    engine.settings(Sampling(4, 1.0))  # what is tried out counts as well
    counted.clear()
    if way != "loop":
        monkeypatch.setattr("cropi_tools.engines.transformers_engine.way_to_sample", lambda *_: way)
    torch.manual_seed(0)
    found = engine.sample([Request([1, 2, 3], seed) for seed in range(40)], Sampling(30, 1.0))
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    assert sum(counted) == sum(len(answer.token_ids) for answer in found)
    assert max(counted) <= 40


@pytest.mark.parametrize(
    ("done", "told"),
    [(256, "kept 256 of 1,800 responses; the same command resumes"), (0, "nothing finished yet")],
)
def test_an_interruption_says_what_is_kept(done: int, told: str) -> None:
    runtime.keeps_of(done, 1800, "responses")
    try:
        with pytest.raises(Interrupted, match=f"^stopped by a signal; {told}$"):
            signals.stop_now()
    finally:
        runtime.keeps(None)
