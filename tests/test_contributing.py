"""What CONTRIBUTING.md shows works as it stands there: its files and changes, made in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_policy

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def build(title: str, root: Path) -> int:
    """Make the files and changes of a section in a copy of the package at `root`; how many there are."""
    shutil.copytree(ROOT / "cropi_tools", root / "cropi_tools", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"^```(python|diff) ?(.*?)\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL)
    for kind, name, content in blocks:
        if kind == "python":
            (root / name).write_text(content)
            continue
        for part in content.split("--- ")[1:]:
            name, *changes = re.split(r"\n@@\n", part.rstrip("\n"))
            for change in changes:
                apply(root / name, change.splitlines())
    return len(blocks)


def apply(path: Path, change: list[str]) -> None:
    """One change without line numbers: the lines that it keeps and removes stand together in the file, once."""
    before, after = ("".join(line[1:] + "\n" for line in change if line[0] != mark) for mark in "+-")
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} has {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after))


def command(root: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the copy."""
    program = f"from cropi_tools.cli.{name} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_section_has_been_tried() -> None:
    assert set(SECTIONS) == {"A verifier", "An engine", "A selection rule"}
    assert "docs/architecture.md" in TEXT
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_a_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cropi_tools.rewards import check_verifier, grade

    assert build("A verifier", tmp_path) == 1
    monkeypatch.chdir(tmp_path)
    check_verifier("mine.py:reward")
    record = {"id": "a", "prompt": "reverse abc", "answer": "cba", "source": "s"}
    assert grade(record, " abc", "mine.py:reward").reward == 1.0
    assert grade(record, "cba", "mine.py:reward").reward == 0.0


@pytest.mark.slow
def test_an_engine(policy_folder: Path, tmp_path: Path) -> None:
    assert build("An engine", tmp_path) == 2
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(3))
    verifier = f"{ROOT / 'tests' / 'parity.py'}:reward"
    line = ("--model", str(policy_folder), "p.jsonl", "-n", "40", "--max-tokens", "3", "--verifier", verifier)
    command(tmp_path, "rollout", *line, "--engine", "uniform", "-o", "r.jsonl")
    samples = [sample for record in records(tmp_path / "r.jsonl") for sample in record["samples"]]
    assert len(samples) == 120
    assert {sample["finish_reason"] for sample in samples} == {"stop", "length"}
    manifest = json.loads((tmp_path / "r.jsonl.manifest.json").read_text())
    assert manifest["options"]["engine"] == "uniform"
    # what it writes the other commands take
    command(tmp_path, "grad", "--model", str(policy_folder), "r.jsonl", "--mean", "-o", "m.safetensors")


def test_a_selection_rule(tmp_path: Path) -> None:
    assert build("A selection rule", tmp_path) == 1
    pool = tiny_policy.prompts(4)
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", pool)
    scores = [
        {"id": prompt["id"], "source": prompt["source"], "scores": {"t": 0.1}, "pass_rate": rate, "status": "ok"}
        for prompt, rate in zip(pool, (0.5, 0.125, 1.0, 0.25), strict=True)
    ]
    tiny_policy.write_jsonl(tmp_path / "s.jsonl", scores)
    line = ("s.jsonl", "--prompts", "p.jsonl", "--by", "easiest", "--ratio", "0.5", "-o", "out.jsonl")
    command(tmp_path, "select", *line)
    assert [(found["id"], found["score"]) for found in records(tmp_path / "out.jsonl")] == [("p2", 1.0), ("p0", 0.5)]
