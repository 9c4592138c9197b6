"""Shells are told every option of a command, at once."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command_table import COMMANDS, HEAVY

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from cropi_tools.cli.{name} import main
sys.argv = ["cropi-{name}"]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def asked(name: str, words: str, place: int) -> subprocess.CompletedProcess[str]:
    """What bash asks when Tab is pressed on the word at `place` of the words."""
    question = {f"_CROPI_{name.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name)],
        env={**os.environ, **question},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_completed_and_nothing_heavy_is_loaded(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = asked(name, f"cropi-{name} -", 1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    page = (
        (ROOT / "docs" / "commands" / f"cropi-{name}.md").read_text().split("\nInput and output:\n")[1].split("```")[0]
    )
    options = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", page, re.MULTILINE))
    assert len(options) > 5
    assert options <= set(done.stdout.split())
    assert HEAVY & {module.partition(".")[0] for module in done.stderr.split()} == set()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_values_are_completed_too() -> None:
    done = asked("train", "cropi-train --preset d", 2)
    assert done.stdout.split() == ["dapo", "dr_grpo"]


@pytest.mark.slow
def test_the_documented_lines_switch_completion_on(tmp_path: Path) -> None:
    """bash itself, with the lines of the documentation in it."""
    block = (ROOT / "docs" / "install.md").read_text().split("## Completion")[1].split("```")[1]
    script = f"""{block}
for name in prompts rollout verify grad embed project score select train report; do complete -p cropi-$name; done
COMP_WORDS=(cropi-select --ra) COMP_CWORD=1; _cropi_select_completion cropi-select; echo "${{COMPREPLY[@]}}"
"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    *known, reply = done.stdout.splitlines()
    assert len(known) == len(COMMANDS), done.stderr
    assert reply == "--ratio"
