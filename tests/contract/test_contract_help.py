"""Help answers at once and loads nothing heavy; mistakes in the options are named."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_table import COMMANDS, HEAVY
from shell import Shell, real

MODULES = """
import sys
from cropi_tools.cli.{name} import main
sys.argv = ["cropi-{name}", "--help"]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def test_the_table_knows_every_command() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert {f"cropi-{name}" for name in COMMANDS} == set(project["project"]["scripts"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_loads_nothing_heavy(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", MODULES.format(name=name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"Usage: cropi-{name}" in done.stdout
    example = done.stdout.partition("Example:")[2].strip()
    assert example.startswith(f"cropi-{name} "), "no worked example in the help"
    assert HEAVY & {module.partition(".")[0] for module in done.stderr.split()} == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_takes_less_than_150_milliseconds(name: str, tmp_path: Path) -> None:
    # processor time, which other work on the machine does not add to; the best of several, which caches do not either
    spent = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        real([f"cropi-{name}", "--help"], tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if spent[-1] < 0.15:
            return
    pytest.fail(f"{min(spent) * 1000:.0f} ms")


@pytest.mark.parametrize("name", COMMANDS)
def test_version_and_unknown_options(name: str, shell: Shell, tmp_path: Path) -> None:
    assert shell([f"cropi-{name}", "--version"], tmp_path).stdout.startswith("cropi-tools ")
    done = shell([f"cropi-{name}", "--no-such-option"], tmp_path, code=2)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len([line for line in done.errors if "--no-such-option" in line]) == 1
    assert f"cropi-{name} -h" in done.stderr or f"cropi-{name} --help" in done.stderr
    assert os.listdir(tmp_path) == []
