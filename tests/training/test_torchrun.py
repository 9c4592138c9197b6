"""Several processes for real: torchrun, gloo, two of them on the CPU, against one process on the same prompts and seeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from safetensors.torch import load_file
from training_runs import PARITY, metrics

BIN = Path(sys.executable).parent
WORDS = ("--steps", 6, "--batch", 5, "-n", 4, "--max-tokens", 6, "--verifier", PARITY, "--learning-rate", "3e-3")
TERMS = ("--kl", 0.1, "--entropy", 0.01, "--save-every", 2, "--eval-every", 3, "--eval", "t=t.jsonl", "--device", "cpu")


def line(policy: object, *more: object) -> list[str]:
    return [str(word) for word in ("--model", policy, "p.jsonl", *WORDS, *TERMS, *more)]


def torchrun(words: list[str], folder: Path) -> subprocess.Popen[str]:
    program = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", str(BIN / "cropi-train")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*program, *words], cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    out, err = process.communicate(timeout=seconds)
    assert out == ""
    return process.returncode, err


def until_step(process: subprocess.Popen[str], part: Path, step: int) -> None:
    log, deadline = part / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(folder: Path) -> list[int]:
    """The processes of cropi-train that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                inside = Path(os.readlink(entry / "cwd")) == folder
            except OSError:
                continue
            if inside and len(command) > 1 and command[1].endswith(b"cropi-train"):
                found.append(int(entry.name))
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(7))
    tiny_policy.write_jsonl(tmp_path / "t.jsonl", tiny_policy.prompts(3, start=100))
    return tmp_path


def same_losses(found: Path, expected: Path) -> None:
    """Every figure of every step, and the weights, to the rounding of sums in another order."""
    one, two = metrics(found), metrics(expected)
    assert [record["step"] for record in one] == [record["step"] for record in two] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        for name in ("reward", "tokens_generated", "tokens_trained", "zero_variance_fraction"):
            assert mine[name] == theirs[name], name
        for name in ("gradient_norm", "entropy", "kl"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    weights = [load_file(folder / "model.safetensors") for folder in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])
    evaluations = [(folder / "evaluations.jsonl").read_text() for folder in (found, expected)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_are_one_and_either_goes_on_with_the_others_work(
    place: Path, run: Callable[..., Any], policy_folder: Path
) -> None:
    words = line(policy_folder)
    run("cropi-train", *words, "--quiet", "-o", "one")
    code, told = ended(torchrun([*words, "-o", "two"], place))
    assert code == 0, told
    assert told.count("two: trained for 6 steps") == 1, "one process speaks"
    same_losses(place / "two", place / "one")
    manifest = json.loads((place / "two" / "manifest.json").read_text())
    assert manifest["facts"]["processes"] == 2
    ledgers = [json.loads((place / name / "manifest.json").read_text())["ledger"] for name in ("one", "two")]
    for name in ("tokens_generated", "tokens_trained", "tokens_evaluated"):
        assert ledgers[0][name] == ledgers[1][name]

    # two processes, one of them killed: all end with an error, and one process goes on alone
    process = torchrun([*words, "-o", "down"], place)
    until_step(process, place / "down.part", 3)
    os.kill(workers(place)[-1], signal.SIGKILL)
    started = time.monotonic()
    code, told = ended(process)
    assert code != 0
    assert time.monotonic() - started < 40, "the others wait for nobody"
    assert workers(place) == []
    state = json.loads((place / "down.part" / "progress.json").read_text())["committed"]
    assert state["step"] in (2, 4)
    run("cropi-train", *words, "--quiet", "-o", "down")
    same_losses(place / "down", place / "one")

    # one process asked to stop, two go on
    alone = subprocess.Popen([str(BIN / "cropi-train"), *words, "--quiet", "-o", "up"], cwd=place)
    until_step(alone, place / "up.part", 2)  # type: ignore[arg-type]
    alone.terminate()
    assert alone.wait(60) in (0, 143)
    code, told = ended(torchrun([*words, "-o", "up"], place))
    assert code == 0, told
    same_losses(place / "up", place / "one")


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_the_rest_of_the_vocabulary_by_two_processes(place: Path, run: Callable[..., Any], policy_folder: Path) -> None:
    """Mini-batches, refills, a cap, adapters and recomputed activations; fewer prompts than processes in the last mini-batch."""
    pytest.importorskip("peft")
    more = ("--minibatch", 2, "--dynamic-sampling", 3, "--importance-cap", 2, "--mask-truncated")
    more = (*more, "--aggregation", "constant", "--advantage", "centered")
    more = (*more, "--tokens-per-pass", 30)  # so that the processes need different numbers of passes
    for name, words in (("full", ()), ("lora", ("--lora", 2, "--checkpoint-activations"))):
        given = line(policy_folder, *more, *words)
        run("cropi-train", *given, "--quiet", "-o", f"{name}-one")
        code, told = ended(torchrun([*given, "-o", f"{name}-two"], place))
        assert code == 0, told
        same_losses(place / f"{name}-two", place / f"{name}-one")
    # products in bfloat16 on both sides: parts stay float32, and the copies that sample agree with what is trained
    code, told = ended(torchrun([*line(policy_folder, "--dtype", "bfloat16"), "-o", "half"], place))
    assert code == 0, told
    assert all(0 < record["behavior_gap"] < 0.05 for record in metrics(place / "half"))
    assert {tensor.dtype for tensor in load_file(place / "half" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_asked_to_stop_all_save_together(place: Path, run: Callable[..., Any], policy_folder: Path) -> None:
    """torchrun passes TERM on; it may reach the processes at different moments of a step, with or without a checkpoint of the one before."""
    for number, every in enumerate((1, 500, 1)):
        name = f"two-{number}"
        process = torchrun([*line(policy_folder, "--steps", 500, "--save-every", every), "-o", name], place)
        until_step(process, place / f"{name}.part", 4 + number)
        process.terminate()
        code, told = ended(process)
        assert code != 0
        assert told.count("cropi-train: stopped by ") == 2, told
        state = json.loads((place / f"{name}.part" / "progress.json").read_text())["committed"]
        assert state["step"] >= 3
        assert (place / f"{name}.part" / f"checkpoint-{state['step']:06d}" / "model.safetensors").exists()


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_an_error_of_one_process_ends_all(place: Path, policy_folder: Path) -> None:
    """The first one opens the output and fails; another fails at a prompt that only it has. Nobody hangs."""
    (place / "taken").mkdir()
    code, told = ended(torchrun([*line(policy_folder), "-o", "taken"], place), 60)
    assert code != 0
    assert "taken: exists and was not written by this command" in told
    wrong = [word if word != PARITY else f"{PARITY.rpartition(':')[0]}:wrong_for_p1" for word in line(policy_folder)]
    code, told = ended(torchrun([*wrong, "-o", "two"], place), 60)
    assert code != 0
    assert "prompt 'p1" in told
