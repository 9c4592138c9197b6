"""cropi-train from a shell: presets and what they resolve to, the reference by name, what a resume refuses, signals."""

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
from training_runs import PARITY

from cropi_tools.cli import train as command
from cropi_tools.training import run as training_run
from cropi_tools.training.inputs import reference_folder
from cropi_tools.training.presets import PRESETS

BASE = ("--steps", 2, "--batch", 2, "-n", 3, "--max-tokens", 4, "--verifier", PARITY, "--learning-rate", "1e-3")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(5))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, policy_folder: Path, prompts: Path, tmp_path: Path) -> Callable[..., Any]:
    """What the command would train, without training."""

    def job(*words: object) -> Any:
        found: list[Any] = []
        line = ("cropi-train", "--model", policy_folder, prompts, *words, "-o", tmp_path / "P1")
        monkeypatch.setattr(sys, "argv", [str(word) for word in line])
        monkeypatch.setattr(training_run, "train", lambda options, *others: found.append(options))
        with pytest.raises(SystemExit) as end:
            command.main()
        assert end.value.code == 0
        return found[0]

    return job


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_fills_in_what_is_not_given(preset: str, asked: Callable[..., Any], policy_folder: Path) -> None:
    """Given options win, also where they are the same as the default."""
    options = asked(*BASE, "--preset", preset, "--clip", "0.2", "--entropy", "0.0", "--no-mask-truncated")
    given = {"clip": (0.2, 0.2), "entropy": 0.0, "mask_truncated": False, "learning_rate": 1e-3}
    given |= {"batch": 2, "samples": 3, "max_tokens": 4}
    for name, value in {**PRESETS[preset], **given}.items():
        assert getattr(options, name) == value, name
    reference = str(policy_folder) if PRESETS[preset]["kl"] > 0 else None
    assert reference_folder(options) == reference, "no KL term, no reference"


@pytest.mark.parametrize("wanted", [False, True])
def test_partial_credit_goes_with_verifiers_that_give_it(
    wanted: bool, asked: Callable[..., Any], run: Callable[..., Any], policy_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ("--steps", 1, "--verifier", "reasoning-gym")
    assert asked(*words, *(["--partial-credit"] if wanted else [])).partial_credit is wanted
    line = (
        "cropi-train",
        "--model",
        policy_folder,
        prompts,
        "--steps",
        1,
        "--verifier",
        "maths",
        "--partial-credit",
        "-o",
        tmp_path / "P2",
    )
    refused = run(*line, code=2)
    assert "--partial-credit" in refused.stderr
    assert "reasoning-gym" in refused.stderr


@pytest.mark.parametrize(
    ("words", "aggregation", "advantage"),
    [
        ((), "token", "group"),
        (("--aggregation", "sequence"), "sequence", "group"),
        (("--preset", "dr_grpo"), "constant", "centered"),
        (("--preset", "dr_grpo", "--advantage", "leave-one-out"), "constant", "leave-one-out"),
        (("--preset", "dr_grpo", "--aggregation", "sequence", "--advantage", "group"), "sequence", "group"),
        (("--preset", "dr_grpo", "--aggregation", "token"), "token", "centered"),
    ],
)
def test_the_objective_is_two_words(
    words: tuple[str, ...], aggregation: str, advantage: str, asked: Callable[..., Any]
) -> None:
    options = asked(*words, *BASE)
    assert (options.aggregation, options.advantage) == (aggregation, advantage)


@pytest.mark.slow
def test_the_reference_by_name(run: Callable[..., Any], policy_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """`start` is the policy that the whole chain of stages began with, `stage` the one that this stage begins with."""
    words = (prompts, *BASE, "--kl", "0.1", "--quiet")
    for number, folder in enumerate((policy_folder, "P1", "P2"), 1):
        run("cropi-train", "--model", folder, *words, "-o", f"P{number}")
    run("cropi-train", "--model", "P2", *words, "--reference", "start", "-o", "S")
    run("cropi-train", "--model", "P2", *words, "--reference", policy_folder, "-o", "S")  # the same work: up to date
    assert Path(manifest(tmp_path / "S")["inputs"]["reference"]["path"]) == policy_folder
    assert manifest(tmp_path / "P3")["inputs"]["reference"]["path"] == "P2"
    assert "training.json" in manifest(tmp_path / "P3")["outputs"]
    options = json.loads((tmp_path / "P3" / "training.json").read_text())
    assert (options["clip"], options["verifier"], options["kl"]) == ([0.2, 0.2], PARITY, 0.1)
    changed = run("cropi-train", "--model", "P2", *words, "--reference", "stage", "-o", "S", code=1)
    assert "reference" in changed.stderr
    (tmp_path / "P1").rename(tmp_path / "moved")
    lost = run("cropi-train", "--model", "P2", *words, "--reference", "start", "-o", "T", code=1)
    assert lost.stderr == (
        "cropi-train: P2: was trained from P1, which is not there or another policy now; give --reference the folder of the starting policy\n"
    )


def start(words: tuple[object, ...], folder: Path) -> subprocess.Popen[str]:
    program = Path(sys.executable).parent / "cropi-train"
    return subprocess.Popen(
        [str(program), *map(str, words)], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_another_option_or_file_is_refused(
    number: signal.Signals, run: Callable[..., Any], policy_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ("--model", policy_folder, prompts, *BASE, "--steps", "4000", "--save-every", "4000")
    process = start((*words, "-o", "P1"), tmp_path)
    log = tmp_path / "P1.part" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"stopped by {number.name}" in told
    state = json.loads((tmp_path / "P1.part" / "progress.json").read_text())["committed"]
    assert state["step"] >= 2
    saved = tmp_path / "P1.part" / f"checkpoint-{state['step']:06d}" / "model.safetensors"
    assert saved.exists()
    for changed, named in ((("--clip", "0.3"), "clip"), (("--schedule", "cosine"), "schedule")):
        refused = run("cropi-train", *words, *changed, "-o", "P1", code=1)
        assert "unfinished work" in refused.stderr
        assert named in refused.stderr
    tiny_policy.write_jsonl(prompts, tiny_policy.prompts(6))
    refused = run("cropi-train", *words, "-o", "P1", code=1)
    assert "prompts" in refused.stderr
    assert saved.exists(), "a refusal changes nothing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", "0"), "nothing can be learned"),
        (("-n", "1"), "give 2 or more"),
        (("--lora", "4", "--carry", "full"), "adapters begin again"),
        (("--clip", "a,b"), "expected two numbers"),
        (("--preset", "none"), "Invalid value"),
    ],
)
def test_senseless_options_are_usage_errors(
    words: tuple[str, ...], said: str, run: Callable[..., Any], policy_folder: Path, prompts: Path
) -> None:
    done = run("cropi-train", "--model", policy_folder, prompts, *BASE, *words, "-o", "P1", code=2)
    assert said in done.stderr


def test_carry_full_needs_an_optimizer_state(
    run: Callable[..., Any], policy_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    words = (prompts, *BASE, "--carry", "full", "--quiet")
    done = run("cropi-train", "--model", policy_folder, *words, "-o", "P1", code=1)
    assert "optimizer.safetensors" in done.stderr
    run("cropi-train", "--model", policy_folder, prompts, *BASE, "--quiet", "-o", "P1")
    run("cropi-train", "--model", "P1", *words, "-o", "P2")
    assert "optimizer" in manifest(tmp_path / "P2")["inputs"]


def test_a_prompt_that_is_too_long_ends_before_anything_is_sampled(
    run: Callable[..., Any], policy_folder: Path, tmp_path: Path
) -> None:
    long = tiny_policy.write_jsonl(
        tmp_path / "long.jsonl", [{"id": "x", "prompt": "1" * 300, "answer": "1", "source": "s"}]
    )
    done = run("cropi-train", "--model", policy_folder, long, *BASE, "-o", "P1", code=1)
    assert done.stderr.count("\n") == 1
    assert "prompt 'x': its 300 tokens" in done.stderr
    assert not (tmp_path / "P1.part").exists()
