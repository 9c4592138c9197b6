"""verl's own code, run in a process that puts the packages of `make setup-peers` before ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("CROPI_PEERS", HERE.parents[1] / ".venv-peers"))


def _call(script: str, packages: str, home: Path, words: tuple[object, ...]) -> Any:
    environment = {
        **os.environ,
        "PYTHONPATH": packages,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, words)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def peers() -> Path:
    """The folder of packages that has verl."""
    if not (PEERS / "verl").is_dir():
        pytest.fail(f"{PEERS} holds no verl; make setup-peers")
    return PEERS


@pytest.fixture
def verl(tmp_path: Path, peers: Path) -> Callable[..., Any]:
    """Call a function of verl_side.py; the value it prints."""
    return lambda *words: _call("verl_side.py", str(peers), tmp_path, words)


@pytest.fixture
def verl_config(tmp_path: Path, peers: Path) -> Callable[..., Any]:
    """Call a function of verl_config.py, without this package, which its environment need not have; the value it prints."""
    return lambda *words: _call("verl_config.py", str(peers), tmp_path, words)


@pytest.fixture
def trl(tmp_path: Path) -> Callable[..., Any]:
    """Call trl_side.py; the value it prints."""
    return lambda *words: _call("trl_side.py", "", tmp_path, words)
