"""The learning curve against TRL's own GRPOTrainer, both as benchmarks/grpo_curve.py runs them: same start, same prompts, same settings.

The task is one that is learned within a dozen steps, single-digit sums by a policy that was taught half of them wrong. There three seeds tell
much: a run's mean reward varies by .01 between seeds of either trainer, and a rate half as large costs .085.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, SEEDS = 12, 3
MARGIN = 0.03  # of the mean reward from the second step on; three to four times what such a difference varies by


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the benchmark reads it: P0 and data/pool.jsonl."""
    folder = tmp_path_factory.mktemp("sums")
    sums = [(a, b) for a in range(10) for b in range(10)]
    lines = [
        {"id": f"{a}+{b}", "prompt": f"S{a}+{b}=", "answer": str(a + b), "source": "sum", "verifier": "exact"}
        for a, b in sums
    ]
    pool = folder / "data" / "pool.jsonl"
    pool.parent.mkdir()
    pool.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [pool, "-o", folder / "P0", "--steps", 60, "--mistake-steps", 20]
    subprocess.run([sys.executable, ROOT / "examples" / "tiny" / "warmup.py", *map(str, words)], check=True)
    return folder


@pytest.mark.slow
def test_the_learning_curve_is_trls(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grpo_curve

    def rewards(name: str, rate: float = grpo_curve.RATE, seeds: int = SEEDS) -> tuple[float, float]:
        """Of the first step, and the mean from the second on: means over seeds."""
        monkeypatch.setattr(grpo_curve, "RATE", rate)
        train = grpo_curve.trl if name == "trl" else grpo_curve.ours
        curves = [train(demo, tmp_path / f"{name}-{rate}-{seed}", seed, STEPS) for seed in range(seeds)]
        assert {len(curve) for curve in curves} == {STEPS}
        return statistics.mean(curve[0] for curve in curves), statistics.mean(v for c in curves for v in c[1:])

    first, own = rewards("ours")
    other_first, other = rewards("trl")
    assert abs(first - other_first) < 0.1  # of 32 prompts each, before any update
    assert min(own - first, other - other_first) > 0.2  # both learn
    assert abs(own - other) < MARGIN, (own, other)
    # and the margin would tell trainers apart
    _, slower = rewards("ours", grpo_curve.RATE / 2, seeds=1)
    assert own - slower > MARGIN
