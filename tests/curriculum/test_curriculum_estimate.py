"""`make estimate`: what a curriculum will take, added up from a few prompts that went through every command."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from curriculum_runs import ROOT
from real_curriculum import real_curriculum


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("curriculum_estimate", ROOT / "examples" / "estimate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_made_once_counts_once_and_scores_count_for_who_renews_them(script: ModuleType) -> None:
    cost: Any = script.Cost
    parts = script.Parts(
        training=cost(training=1, disk=4),
        sampling=cost(sampling=90, loading=3),
        scoring=cost(gradients=8, loading=1),
        targets=cost(sampling=10, loading=2),
        means=cost(gradients=2, loading=1),
        refreshing=cost(sampling=30),
    )
    assert parts.once(["full", "random"]) == cost()
    assert parts.once(["random", "learnability"]) == cost(sampling=90, loading=3)
    assert parts.arm("full", 3) == parts.arm("static", 3) == cost(training=3, disk=12)
    assert parts.arm("cropi", 3) == cost(sampling=60, gradients=20, training=3, loading=4, disk=12)
    asked = type("Asked", (), {"arms": "full cropi", "seeds": 2, "stages": 3})
    costs = script.rows(asked, parts)
    assert [name for name, _ in costs] == ["start, once for all arms", "full, a seed", "cropi, a seed", "all, 2 seeds"]
    assert costs[0][1] == cost(sampling=100, gradients=10, loading=7)
    assert costs[-1][1] == cost(sampling=220, gradients=50, training=12, loading=15, disk=48)
    # a stage that probes samples and scores a part, and no whole pool is sampled for it
    probing = parts._replace(share=0.5, refreshing=cost())
    assert probing.arm("cropi", 3) == cost(sampling=135, gradients=16, training=3, loading=26, disk=12)
    assert probing.once(["full", "cropi"]) == cost(sampling=10, gradients=2, loading=3)
    assert probing.once(["hardest", "cropi"]) == cost(sampling=100, gradients=2, loading=6)
    assert probing.once(["full", "cropi", "complete"]) == costs[0][1]
    assert probing.arm("complete", 3) == cost(gradients=20, training=3, loading=4, disk=12)
    assert script.table(costs)[-2].split()[-2:] == ["48", "B"]


@pytest.mark.slow
def test_it_says_what_an_arm_takes_and_writes_nothing(tmp_path: Path, policy_folder: Path) -> None:
    curriculum = real_curriculum(tmp_path, policy_folder)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        curriculum.words("--no-print-directory", "estimate"),
        env=curriculum.variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["sampling", "gradients", "scores", "training", "loading", "time", "tokens", "disk"]
    assert [line.split()[0].strip(",") for line in lines[1:-1]] == ["start", "cropi", "all"]
