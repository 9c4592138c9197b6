"""The documentation says what the commands say: help pages, and the lines of the README that a shell can run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_help_pages_are_what_the_commands_print() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "update_help.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "run `make docs`"


def test_every_command_has_a_page_and_an_entry_point() -> None:
    import tomllib

    scripts = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    assert {page.stem for page in (ROOT / "docs" / "commands").glob("*.md")} == scripts
    assert len(scripts) == 8
