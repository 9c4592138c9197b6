"""The documentation says what the commands say: help pages, links, and the lines of README, demo, recipes and guide that a shell can run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_help_pages_are_what_the_commands_print() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "update_help.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "run `make docs`"


def test_every_command_has_a_page_and_an_entry_point() -> None:
    import tomllib

    scripts = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    assert {page.stem for page in (ROOT / "docs" / "commands").glob("*.md")} == scripts
    assert len(scripts) == 10


def blocks(page: str, *titles: str) -> list[str]:
    """The lines in the fenced blocks of a page, or of its sections with these titles, in order; comment and blank lines left out."""
    text = (ROOT / page).read_text()
    if titles:
        sections = {part.split("\n", 1)[0].lstrip("# "): part for part in text.split("\n## ")}
        text = "".join(sections[title] for title in titles)
    fenced = "".join(text.split("```")[1::2])
    return [line for line in fenced.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *sorted(
            str(page.relative_to(ROOT)) for folder in ("docs", "examples") for page in ROOT.glob(f"{folder}/**/*.md")
        ),
    ],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """Files exist, and so do the headings that links name."""
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 90


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_quick_start_of_the_readme(real_policy: Path, tmp_path: Path) -> None:
    """In bash as it stands there, on the real model; then the four commands that it leaves out, on what it made."""
    setup, *lines = blocks("README.md", "Quick start: a real chat model by hand")
    assert setup == "make setup && source .venv/bin/activate"
    place = tmp_path / "runs" / "by-hand"
    place.mkdir(parents=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (place / "P0").symlink_to(real_policy)
    lines += [
        "cropi-verify train.rollouts.jsonl --verifier maths -o regraded.jsonl",
        "cropi-embed --model P0 train.jsonl -o train.features.safetensors",
        "cropi-project grads.zarr --dim 8192 -o small.zarr",
        "cropi-report P1 -o report.html",
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    used = {line.split()[0] for line in lines if line.startswith("cropi-")}
    assert used == {page.stem for page in (ROOT / "docs" / "commands").glob("*.md")}
    check_quick_start(place, done)
    shutil.rmtree(place)


def check_quick_start(place: Path, done: subprocess.CompletedProcess[str]) -> None:
    """It shows something: prompts as the model sees them, scores of live prompts, a selection of the best, a step that moves the policy."""
    assert "<|im_start|>assistant" in done.stderr
    graded, again = (read(place / name) for name in ("train.rollouts.jsonl", "regraded.jsonl"))
    assert [[s["reward"] for s in r["samples"]] for r in graded] == [[s["reward"] for s in r["samples"]] for r in again]
    scored = {record["id"]: record["scores"]["lcm"] for record in read(place / "scores.jsonl") if record["scores"]}
    live = {record["id"] for record in graded if len({sample["reward"] for sample in record["samples"]}) > 1}
    assert scored.keys() == live
    assert all(-1 <= score <= 1 for score in scored.values())
    selected = {record["id"] for record in read(place / "selected.jsonl")}
    assert selected == set(sorted(scored, key=scored.__getitem__)[-len(selected) :])
    steps = read(place / "P1" / "metrics.jsonl")
    assert len(steps) == 2
    assert all(0 < step["gradient_norm"] < 10 and abs(step["loss"]) < 1 for step in steps)
    assert all(step["behavior_gap"] < 1e-3 for step in steps)
    assert "lcm" in (place / "report.html").read_text()
    assert "lcm" in done.stdout


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)  # some forty commands, each a process
def test_documented_lines_run_as_they_stand(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo by hand, the recipes and the guide, one after another in one folder.

    Numbers are smaller and the policy has hardly learned anything, so a verifier that it satisfies half of the time takes the
    place of the prompts' own.
    """
    pipeline = blocks("examples/tiny/README.md", "By hand")
    assert pipeline[:2] == [
        "make setup && source .venv/bin/activate",
        "tiny=$PWD/examples/tiny; mkdir -p runs/tiny-by-hand; cd runs/tiny-by-hand",
    ]
    recipes = blocks(
        "docs/recipes.md",
        "Data",
        "Sampling and verifying",
        "Training",
        "Is the ranking worth anything?",
        "Cheaper influence",
        "Scoring a part of the pool",
    )
    guide = blocks("docs/guide.md")
    assert (len(pipeline), len(recipes), len(guide)) == (15, 26, 12)
    (tmp_path / "gsm8k.csv").write_text("question,final\nWhat is 1+1?,2\nWhat is 1+2?,3\n")
    (tmp_path / "mine.py").write_text((ROOT / "tests" / "parity.py").read_text())
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # where torchrun looks
    # vLLM has an environment and tests of its own, TensorBoard is no part of this one
    for line in pipeline[2:] + recipes + guide:
        if "--engine vllm" not in line:
            run(*shlex.split(smaller(line.replace("--track tensorboard ", "")), comments=True))
        if line.startswith("cropi-prompts recipe:"):
            forget_verifiers(tmp_path / line.split()[-1])
    assert len((tmp_path / "selected.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "P1" / "manifest.json").exists()
    assert not (tmp_path / "probe.zarr").exists()  # of a dry run


def smaller(line: str) -> str:
    """A documented line with smaller numbers, and with the verifier of `parity.py` where it samples."""
    for before, after in (
        ("$tiny", str(ROOT / "examples" / "tiny")),
        ("--size 70", "--size 2"),
        ("--size 40", "--size 4"),
        ("--size 120", "--size 2"),
        ("--size 900", "--size 4"),
        ("-o P0", "--steps 2 --mistake-steps 1 -o P0"),
        ("-n 16", "-n 4"),
        ("--ratio 0.1 -o part", "--ratio 0.7 -o part"),
        ("--steps 25 --batch 32", "--steps 2 --batch 2"),
        ("--steps 50", "--steps 2 --batch 2"),
    ):
        line = line.replace(before, after)
    if "cropi-rollout" in line or "cropi-train" in line:
        line = line.replace("--model", f"--verifier {ROOT / 'tests' / 'parity.py'}:reward --model", 1)
    return line


def forget_verifiers(path: Path) -> None:
    """Take the verifiers out of the prompts: none of theirs would ever be satisfied."""
    records = read(path)
    for record in records:
        record.pop("verifier", None)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
