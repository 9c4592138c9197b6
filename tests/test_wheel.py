"""What others get: a wheel that needs nothing of the repository, and what a package says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import yaml

from cropi_tools import __version__

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_the_project_says_of_itself_agrees() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (cited["title"], cited["version"], cited["license"]) == (PROJECT["name"], __version__, PROJECT["license"])
    assert PROJECT["version"] == __version__
    (paper,) = cited["references"]
    number = "2510.26491"
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert number in paper["url"]
    assert number in (ROOT / "README.md").read_text()
    assert cited["authors"][0]["name"] in (ROOT / "LICENSE").read_text()
    assert all((ROOT / name).exists() for name in PROJECT["license-files"])


def called(*words: object, cwd: Path, **environment: str) -> str:
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env={**known, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git keeps, so that nothing is left in the repository."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "cropi_tools", source / "cropi_tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "--disable-pip-version-check")
    called(
        sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", made, ".", cwd=source
    )
    (found,) = made.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel, which sees the packages of this one but not this repository."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    # before it sees them: else pip would find cropi-tools among them, and replace it there
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", python)
    called(sys.executable, *pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    (site,) = (home / "lib").glob("python*/site-packages")
    # folders that a .pth file names have their own .pth files ignored, with which an editable install begins
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return home / "bin"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        (metadata,) = (packed.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    ignored = ("__pycache__", ".pyc")
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cropi_tools").rglob("*")
        if path.is_file() and not any(part in str(path) for part in ignored)
    }
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert "cropi_tools/py.typed" in ours
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: MIT" in metadata
    assert set(re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)) >= {"huggingface_hub>=0.34"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pipeline_of_all_commands_runs_without_the_repository(elsewhere: Path, tmp_path: Path) -> None:
    where = called(elsewhere / "python", "-c", "import cropi_tools; print(cropi_tools.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(elsewhere.parent)
    programs = {path.name for path in elsewhere.glob("cropi-*")}
    assert programs == set(PROJECT["scripts"])
    tiny_policy.save(tmp_path / "P0")
    for name, count, start in (("pool", 8, 0), ("more", 4, 8)):
        tiny_policy.write_jsonl(tmp_path / f"{name}.raw.jsonl", tiny_policy.prompts(count, start))
    shutil.copy(ROOT / "tests" / "parity.py", tmp_path / "mine.py")
    sampled = "-n 8 --max-tokens 4 --verifier mine.py:reward"
    (tmp_path / "run" / "random" / "1" / "1").mkdir(parents=True)
    lines = f"""
        cropi-prompts more.raw.jsonl -o valid.jsonl
        cropi-prompts pool.raw.jsonl --exclude valid.jsonl -o train.jsonl
        cropi-rollout --model P0 train.jsonl {sampled} -o train.rollouts.jsonl
        cropi-rollout --model P0 valid.jsonl {sampled} -o valid.rollouts.jsonl
        cropi-verify valid.rollouts.jsonl --verifier exact -o graded.jsonl
        cropi-grad --model P0 valid.rollouts.jsonl --mean -o mean.safetensors
        cropi-grad --model P0 train.rollouts.jsonl --against target=mean.safetensors --sketch none -o grads.zarr
        cropi-embed --model P0 train.jsonl -o features.safetensors
        cropi-project grads.zarr --dim 64 -o sketch.zarr
        cropi-score grads.zarr -o scores.jsonl
        cropi-select scores.jsonl --prompts train.jsonl --ratio 0.5 -o selected.jsonl
        cropi-train --model P0 selected.jsonl --steps 2 --batch 2 --eval t=valid.jsonl {sampled} -o run/random/1/1/policy
        cropi-report run -o report.html --png curves.png
    """.split("\n")
    for words in (line.split() for line in lines if line.strip()):
        called(elsewhere / words[0], *words[1:], cwd=tmp_path)
        programs.discard(words[0])
    assert not programs
    assert (tmp_path / "report.html").stat().st_size > 1000
    manifest = json.loads((tmp_path / "run/random/1/1/policy/manifest.json").read_text())
    assert manifest["revision"] is None
    assert manifest["versions"]["cropi-tools"] == __version__
