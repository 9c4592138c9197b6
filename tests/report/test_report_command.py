"""cropi-report as a shell calls it: the table on stdout, page and picture as outputs that keep every promise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_run as synthetic

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    synthetic.write_run(folder)
    return folder


def test_table_and_json_on_stdout(run: Run, runs: Path) -> None:
    table = run("cropi-report", "demo")
    assert "CROPI" in table.stdout
    assert "vs random" in table.stdout
    assert table.stderr == ""
    figures = json.loads(run("cropi-report", "demo", "--json").stdout)
    assert figures["arms"]["cropi"]["target"]["mean"] == pytest.approx(0.718667, abs=1e-6)
    figures = json.loads(run("cropi-report", "demo", "--threshold", "0.5", "--json").stdout)
    assert figures["arms"]["cropi"]["speed"]["steps"]["threshold"] == figures["threshold"] == 0.5
    for wrong in ("0", "60", "-1", "nan"):
        assert "above 0, at most 1" in run("cropi-report", "demo", "--threshold", wrong, code=2).stderr


def test_page_and_picture_are_made_once_and_replaced_only_when_told(run: Run, runs: Path, tmp_path: Path) -> None:
    line = ("cropi-report", "demo", "-o", "report.html", "--png", "curves.png")
    run(*line)
    page, picture = (tmp_path / "report.html").read_bytes(), (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.html.manifest.json").read_text())["inputs"]["run 1"]["path"] == "demo"
    assert "report.html: up to date" in run(*line).stderr
    with open(runs / "cropi" / "1" / "1" / "policy" / "evaluations.jsonl", "a") as stream:
        stream.write("\n")
    refused = run(*line, "--quiet", code=1).stderr
    assert refused == "cropi-report: curves.png: exists, the contents of run 1; --force replaces it\n"
    assert ((tmp_path / "report.html").read_bytes(), (tmp_path / "curves.png").read_bytes()) == (page, picture)
    run(*line, "--force", "--baseline", "full")
    assert (tmp_path / "report.html").read_bytes() != page


def test_bad_input_in_one_line(run: Run, runs: Path, tmp_path: Path) -> None:
    for words, said in (
        (("absent",), "absent: no such"),
        (("demo", "-o", "absent/report.html"), "absent: no such folder"),
        (("demo", "demo"), "two run folders of this name"),
    ):
        done = run("cropi-report", *words, code=1)
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    broken = runs / "cropi" / "1" / "1" / "policy" / "evaluations.jsonl"
    broken.write_text('{"step": 0\n' + broken.read_text())
    assert "evaluations.jsonl:1" in run("cropi-report", "demo", code=1).stderr
    assert not list(tmp_path.glob("*.part*"))


def test_killed_and_run_again_gives_the_same_page(run: Run, runs: Path, tmp_path: Path) -> None:
    run("cropi-report", "demo", "-o", "whole.html")
    line = [str(Path(sys.executable).parent / "cropi-report"), "demo", "-o", "report.html"]
    for delay in (0.4, 0.8, 1.2):
        process = subprocess.Popen(
            line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "report.html").exists():
            break
    run("cropi-report", "demo", "-o", "report.html")
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "whole.html").read_bytes()
    shutil.rmtree(runs)
    run("cropi-report", "demo", code=1)
