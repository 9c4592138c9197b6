"""`cropi-train --engine verl` from a shell, with a program that plays verl: what it is handed, what comes back, how it ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
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
from cropi_tools.runtime.errors import InputError
from cropi_tools.verl_backend import run

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
        (0, "test", 0.0),
        (2, "test", 0.02),
        (4, "test", 0.04),
        (5, "test", 0.05),
    ]
    assert {(line["prompts"], line["samples"]) for line in lines(folder / "evaluations.jsonl")} == {(3, 1)}
    timings = [tuple(line.values()) for line in lines(folder / "timings.jsonl")]
    assert timings == [(step, 1.0, 2.0, 0.0 if step in (1, 3) else 0.5) for step in range(1, 6)]
    kept, own = (json.loads((place / "config.json").read_text()) for place in (folder, chat_policy))
    assert kept == {**own, "dtype": "float32"}, "verl's says bfloat16, and what its run was told"
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


def started(words: list[object], folder: Path) -> subprocess.Popen[str]:
    """cropi-train as a process of its own, when the program that plays verl has come to where it waits."""
    program = [Path(sys.executable).parent / "cropi-train", *words, "-o", "P1"]
    process = subprocess.Popen([str(word) for word in program], cwd=folder, stderr=subprocess.PIPE, text=True)
    log, deadline = folder / "P1.part" / "verl" / "verl.log", time.monotonic() + 60
    while not (log.exists() and "waiting" in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def kill(process: subprocess.Popen[str]) -> int:
    """Kill cropi-train alone; the group of the program that plays verl, which goes on."""
    (left,) = subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()
    process.kill()
    process.communicate(timeout=30)
    return int(left)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR2, 143), (signal.SIGINT, 130)])
def test_it_stops_with_verl_and_goes_on_from_verls_checkpoint(
    number: signal.Signals,
    code: int,
    run: Callable[..., Any],
    words: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_VERL", "hang")
    process = started(words, tmp_path)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == code
    assert "stopped by SIGUSR2" in told or number != signal.SIGUSR2
    monkeypatch.setenv("FAKE_VERL", "")
    done = run("cropi-train", *words, "-o", "P1")
    assert "begins after step 2" in done.stderr
    found = lines(tmp_path / "P1" / "metrics.jsonl")
    assert [(line["step"], line["reward"]) for line in found] == [(step, step / 10) for step in range(1, 6)]
    assert [line["step"] for line in lines(tmp_path / "P1" / "evaluations.jsonl")] == [0, 2, 4, 5]


def test_verl_that_outlived_its_command_is_not_joined_by_another(
    run: Callable[..., Any], words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VERL", "hang")
    left = kill(started(words, tmp_path))
    try:
        done = run("cropi-train", *words, "-o", "P1", code=1)
        assert "P1.part/verl: verl of an earlier try still runs there; wait for it or stop it" in done.stderr
    finally:
        os.killpg(left, signal.SIGTERM)
    monkeypatch.setenv("FAKE_VERL", "")
    assert "begins after step 2" in run("cropi-train", *words, "-o", "P1").stderr


def test_a_verifier_that_fails_ends_verl(
    run: Callable[..., Any], words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl itself would log a line and train on the rest. The verifier is found from wherever verl runs."""
    (tmp_path / "mine.py").write_text(
        "def reward(data_source, solution_str, ground_truth, extra_info=None):\n    1 / 0\n"
    )
    monkeypatch.setenv("FAKE_VERL", "verifier")
    done = run("cropi-train", *words, "--verifier", "mine.py:reward", "-o", "P1", code=1)
    assert "mine.py:reward, prompt 'p1'" in done.stderr
    assert "division by zero" in done.stderr
    assert "(in verl, whose output is in P1.part/verl/verl.log)" in done.stderr


def test_verl_that_hears_nothing_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VERL", "stubborn")
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.3)
    pids: list[int] = []
    real = subprocess.Popen

    def failing(*words: Any, **options: Any) -> Any:
        process = real(*words, **options)
        pids.append(process.pid)
        deadline = time.monotonic() + 30
        while "waiting" not in (tmp_path / run.LOG).read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (tmp_path / run.FAILED).write_text("the verifier is gone")
        return process

    monkeypatch.setattr(run.subprocess, "Popen", failing)
    line = [str(FAKE), "-m", "verl.trainer.main_ppo", f"trainer.default_local_dir={tmp_path}"]
    with pytest.raises(InputError, match="the verifier is gone"):
        run.run(line, tmp_path)
    with pytest.raises(ProcessLookupError):
        os.killpg(pids[0], 0)


def test_an_end_before_the_last_step_is_no_policy(
    run: Callable[..., Any], words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VERL", "early")
    done = run("cropi-train", *words, "-o", "P1", code=1)
    assert "verl ended well, but its last checkpoint is of step 4 of 5" in done.stderr
    assert not (tmp_path / "P1").exists()


def test_what_is_trained_is_not_trained_again(
    run: Callable[..., Any],
    words: list[object],
    chat_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after verl's last step, or between taking its policy over and the end."""
    monkeypatch.setenv("FAKE_VERL", "hang")
    os.killpg(kill(started(words, tmp_path)), signal.SIGKILL)
    part = tmp_path / "P1.part"
    checkpoints = part / "verl" / "checkpoints"
    (checkpoints / "global_step_2").rename(checkpoints / "global_step_5")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("5")
    monkeypatch.setenv("FAKE_VERL", "fail")
    shutil.copytree(part, tmp_path / "P2.part")
    run("cropi-train", *words, "-o", "P1")
    state = json.loads((tmp_path / "P2.part" / "progress.json").read_text())
    state["committed"]["ledger"] = {"tokens_generated": 7}
    (tmp_path / "P2.part" / "progress.json").write_text(json.dumps(state))
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(chat_policy / name, tmp_path / "P2.part" / name)
    shutil.rmtree(tmp_path / "P2.part" / "verl")
    run("cropi-train", *words, "-o", "P2")
    assert json.loads((tmp_path / "P2" / "manifest.json").read_text())["ledger"]["tokens_generated"] == 7


def test_prompts_that_verl_cannot_take_are_refused(
    run: Callable[..., Any], words: list[object], tmp_path: Path
) -> None:
    begun = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "It is"}]
    record = {"id": "q", "prompt": begun, "answer": "2", "source": "s"}
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", [*tiny_policy.prompts(6), record])
    assert "prompt 'q' ends with the beginning of its response" in run("cropi-train", *words, "-o", "P1", code=1).stderr
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", [*tiny_policy.prompts(6), {**record, "prompt": "?", "answer": None}])
    assert "prompt 'q'" in run("cropi-train", *words, "-o", "P1", code=1).stderr


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
        (("--schedule", "linear"), "--schedule"),
        (("--lora", "4"), "--lora"),
        (("--batch", "7"), "--batch 7: verl drops an incomplete batch, and there are 6 prompts"),
        (("--track", "wandb"), "trackers of its own"),
        (("--collapse", "0.1"), "--engine verl cannot follow --collapse"),
        (("--device", "cpu"), "--engine verl cannot follow --device"),
        (("--verl-option", "trainer.nnodes"), "expected KEY=VALUE"),
    ],
)
def test_what_verl_has_not_is_refused_by_name(
    more: tuple[str, ...], said: str, run: Callable[..., Any], words: list[object]
) -> None:
    assert said in run("cropi-train", *words, *more, "-o", "P1", code=2).stderr


def test_a_policy_without_a_chat_template_is_refused(
    run: Callable[..., Any], words: list[object], policy_folder: Path
) -> None:
    plain = ["--model", policy_folder, *words[2:]]
    assert "has no chat template" in run("cropi-train", *plain, "-o", "P1", code=1).stderr
