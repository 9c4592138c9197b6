"""The synthetic runs of `synthetic_run.py`, made once a test session; tests that change a run make their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import synthetic_run as synthetic


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms, three seeds, two stages; not to be changed."""
    return synthetic.write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Where a test makes a run of its own."""
    return tmp_path / "own"
