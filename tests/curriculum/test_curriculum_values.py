"""Values of a CONFIG, or of make's command line, that can only be mistakes: make ends with one line before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from curriculum_runs import BookkeptCurriculum

MISTAKES = (
    *(f"{name}={value}" for name in ("STAGES", "GPUS") for value in ("abc", "0", "-1", "1.5", "1 2", "01", "x1")),
    *("STEPS=x", "SAMPLES=0", "VALID_SAMPLES=-4", "MAX_TOKENS=1k"),
    *("FORCE=yes", "FORCE=force", "FORCE=--force --force", "CARRY=all", "ARMS=cropy", "ARMS=cropi randm", "SEEDS=1 b"),
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_value_is_told_before_anything_starts(mistake: str, tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    done = curriculum.make(mistake, code=2)
    assert done.stderr.count("\n") == 1
    assert f"*** {mistake}: " in done.stderr
    assert curriculum.asked() == []
    assert not curriculum.run.exists()


@pytest.mark.parametrize("value", ["STAGES=1", "STAGES= 2 ", "FORCE=", "FORCE=--force", "CARRY=full", "SEEDS=10 2"])
def test_what_is_no_mistake_goes_on(value: str, tmp_path: Path) -> None:
    assert BookkeptCurriculum(tmp_path).make("-n", value).stdout
