"""`cropi-train --engine verl` from a shell, with a program that plays verl: what it is handed, what comes back, how it ends."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.data.policies import policy_files, tokenizer_digest
from cropi_tools.policy.loading import load_policy

FAKE = Path(__file__).parent.parent / "fake_verl.py"
LINE = (
    "--steps",
    5,
    "--batch",
    4,
    "-n",
    4,
    "--max-tokens",
    8,
    "--verifier",
    "exact",
    "--save-every",
    2,
    "--eval-every",
    2,
)


@pytest.fixture
def words(tmp_path: Path, chat_policy: Path) -> list[object]:
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(6))
    tiny_policy.write_jsonl(tmp_path / "t.jsonl", tiny_policy.prompts(3, start=50))
    evaluation = ("--eval", "test=t.jsonl", "--engine", "verl", "--verl-python", FAKE)
    return ["--model", chat_policy, "p.jsonl", *LINE, *evaluation]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_policy_comes_back(run: Callable[..., Any], words: list[object], chat_policy: Path, tmp_path: Path) -> None:
    done = run("cropi-train", *words, "--verl-option", "trainer.n_gpus_per_node=2", "-o", "P1")
    assert "begins after step 0" in done.stderr
    assert done.stdout == ""
    folder = tmp_path / "P1"
    assert {path.name for path in policy_files(folder)} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert tokenizer_digest(folder) == tokenizer_digest(chat_policy)
    load_policy(str(folder), "cpu")
    assert not (folder / "verl").exists()
    assert [(line["step"], line["reward"], line["tokens_generated"]) for line in lines(folder / "metrics.jsonl")] == [
        (step, step / 10, 64) for step in range(1, 6)
    ]
    assert {line["entropy"] for line in lines(folder / "metrics.jsonl")} == {1.5}
    assert [(line["step"], line["set"], line["accuracy"]) for line in lines(folder / "evaluations.jsonl")] == [
        (2, "test", 0.02),
        (4, "test", 0.04),
    ]
    assert [(line["seconds_sampling"], line["seconds_update"]) for line in lines(folder / "timings.jsonl")] == [
        (1.0, 2.0)
    ] * 5
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == 5
    assert manifest["ledger"]["tokens_generated"] == 320
    assert "trainer.n_gpus_per_node=2" in manifest["facts"]["command"]
    assert json.loads((folder / "training.json").read_text())["engine"] == "verl"
    again = run("cropi-train", *words, "--verl-option", "trainer.n_gpus_per_node=2", "-o", "P1")
    assert "up to date" in again.stderr
    other = run("cropi-train", *words, "-o", "P1", code=1)
    assert "verl" in other.stderr


def test_a_dry_run_prints_the_command_and_does_nothing(
    run: Callable[..., Any], words: list[object], tmp_path: Path
) -> None:
    done = run("cropi-train", *words, "--dry-run", "-o", "P1")
    command = shlex.split(done.stdout)
    assert command[:3] == [str(FAKE), "-m", "verl.trainer.main_ppo"]
    assert "data.train_batch_size=4" in command
    assert f"trainer.default_local_dir={tmp_path}/P1.part/verl/checkpoints" in command
    assert not (tmp_path / "P1.part").exists()


def test_a_failure_says_what_verl_said_and_the_same_command_goes_on(
    run: Callable[..., Any], words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VERL", "fail")
    failed = run("cropi-train", *words, "--quiet", "-o", "P1", code=1)
    assert "verl ended with exit code 3; its output is in P1.part/verl/verl.log" in failed.stderr
    assert "OutOfMemoryError: worker died" in failed.stderr
    monkeypatch.setenv("FAKE_VERL", "nothing")
    assert "left no checkpoint" in run("cropi-train", *words, "--quiet", "-o", "P1", code=1).stderr
    monkeypatch.setenv("FAKE_VERL", "")
    run("cropi-train", *words, "--quiet", "-o", "P1")
    assert (tmp_path / "P1" / "manifest.json").exists()


def test_it_stops_with_verl_and_goes_on_from_verls_checkpoint(
    run: Callable[..., Any], words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VERL", "hang")
    program = [Path(sys.executable).parent / "cropi-train", *words, "-o", "P1"]
    process = subprocess.Popen([str(word) for word in program], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "P1.part" / "verl" / "verl.log", time.monotonic() + 60
    while not (log.exists() and "waiting" in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped by SIGUSR2" in told
    monkeypatch.setenv("FAKE_VERL", "")
    done = run("cropi-train", *words, "-o", "P1")
    assert "begins after step 2" in done.stderr
    assert [line["step"] for line in lines(tmp_path / "P1" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_an_environment_without_verl_is_told_before_anything_is_run(
    run: Callable[..., Any], words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VERL", "missing")
    done = run("cropi-train", *words, "-o", "P1", code=1)
    assert "No module named 'verl'" in done.stderr
    assert not (tmp_path / "P1.part").exists()
    gone = [word if word != FAKE else "/nowhere/python" for word in words]
    assert "cannot be run (No such file or directory)" in run("cropi-train", *gone, "-o", "P1", code=1).stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--mask-truncated",), "--mask-truncated"),
        (("--schedule", "linear"), "--schedule linear"),
        (("--lora", "4"), "--lora"),
        (("--batch", "7"), "--batch 7: verl drops an incomplete batch, and there are 6 prompts"),
        (("--track", "wandb"), "trackers of its own"),
        (("--verl-option", "trainer.nnodes"), "expected KEY=VALUE"),
    ],
)
def test_what_verl_has_not_is_refused_by_name(
    more: tuple[str, ...], said: str, run: Callable[..., Any], words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("cropi-train", *words, *more, "-o", "P1", code=1 if more == ("--track", "wandb") else 2)
    assert said in done.stderr or "needs the package wandb" in done.stderr


def test_a_policy_without_a_chat_template_is_refused(
    run: Callable[..., Any], words: list[object], policy_folder: Path
) -> None:
    plain = ["--model", policy_folder, *words[2:]]
    assert "has no chat template" in run("cropi-train", *plain, "-o", "P1", code=1).stderr
