"""The documentation says what the commands say: help pages, and the lines of the README that a shell can run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_policy

ROOT = Path(__file__).parent.parent


def test_help_pages_are_what_the_commands_print() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "update_help.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "run `make docs`"


def test_every_command_has_a_page_and_an_entry_point() -> None:
    import tomllib

    scripts = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    assert {page.stem for page in (ROOT / "docs" / "commands").glob("*.md")} == scripts
    assert len(scripts) == 9


@pytest.mark.slow
def test_the_readme_pipeline_runs_line_by_line(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines as they stand, with smaller numbers, a random policy as P0, and a verifier that it satisfies half of the time."""
    sections = (ROOT / "README.md").read_text().split("\n## ")
    lines = []
    for title, count in (
        ("The pipeline by hand", 9),
        ("Data, engines, verifiers", 7),
        ("Training", 4),
        ("Can the ranking be trusted", 7),
    ):
        (section,) = [text for text in sections if text.startswith(title)]
        block = [line for line in section.split("```")[1].splitlines() if line]
        assert len(block) == count
        lines += block
    tiny_policy.save(tmp_path / "P0")
    tiny_policy.write_jsonl(tmp_path / "test.jsonl", tiny_policy.prompts(4))
    (tmp_path / "gsm8k.csv").write_text("question,final\nWhat is 1+1?,2\nWhat is 1+2?,3\n")
    (tmp_path / "mine.py").write_text((ROOT / "tests" / "parity.py").read_text())
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # where torchrun looks
    # vLLM has an environment and tests of its own, TensorBoard is no part of this one
    for line in (line.replace("--track tensorboard ", "") for line in lines if "--engine vllm" not in line):
        for before, after in (
            ("--size 500", "--size 24"),
            ("--size 80", "--size 8"),
            ("-n 32", "-n 4"),
            ("--steps 50", "--steps 2 --batch 2"),
        ):
            line = line.replace(before, after)
        if "cropi-rollout" in line or "cropi-train" in line:
            line = line.replace("--max-tokens 32", "--max-tokens 4")
            if "--verifier" not in line:
                line = line.replace(
                    "--model", f"--verifier {ROOT / 'tests' / 'parity.py'}:reward --max-tokens 4 --model"
                )
        run(*shlex.split(line, comments=True))
    selected = (tmp_path / "selected.jsonl").read_text().splitlines()
    assert len(selected) == 2
    assert (tmp_path / "P1" / "manifest.json").exists()
