"""Real processes that sample with vLLM: clean ends, by themselves, by TERM, by the parent's death; and training through them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
from sessions import processes_of

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent
PARITY = str(HERE.parent / "parity.py") + ":reward"


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """In a session of its own, so that everything it starts can be found."""
    return subprocess.Popen(
        [*map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_end_of_the_process_is_quiet(tied: Path, tmp_path: Path) -> None:
    process = start(sys.executable, HERE / "endless.py", tied, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "sampled\n", "")
    assert processes_of(process.pid) == []


def test_nothing_outlives_a_killed_process(tied: Path, tmp_path: Path) -> None:
    process = start(sys.executable, HERE / "endless.py", tied, "endless", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "sampled\n"
    process.kill()
    process.communicate()
    assert processes_of(process.pid) == []


def test_term_ends_a_stream_at_once(tied: Path, tmp_path: Path) -> None:
    """The engine raises what the commands turn into exit code 143; vLLM's import has left our handler in place."""
    process = start(sys.executable, HERE / "endless.py", tied, "endless", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "sampled\n"
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert "Interrupted: stopped by SIGTERM" in err.splitlines()[-1]
    assert processes_of(process.pid) == []


def train(tied: Path, tmp_path: Path, steps: int) -> subprocess.Popen[str]:
    tiny_policy.write_jsonl(tmp_path / "prompts.jsonl", tiny_policy.prompts(9))
    program = Path(sys.executable).parent / "cropi-train"
    return start(
        *(program, "--model", tied, "prompts.jsonl", "--engine", "vllm", "--verifier", PARITY, "-o", "P1"),
        *("--steps", steps, "--batch", 4, "-n", 6, "--max-tokens", 12, "--learning-rate", 3e-3),
        *("--eval", "test=prompts.jsonl", "--eval-every", 2, "--save-every", 2),
        cwd=tmp_path,
    )


def test_training_through_vllm(tied: Path, tmp_path: Path) -> None:
    process = train(tied, tmp_path, 3)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    said = [line.split(":")[0] for line in err.splitlines() if not line.startswith("warning: ")]
    assert said == ["step 0", "step 2", "step 3", "P1"]
    metrics = lines(tmp_path / "P1" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert all(0 < record["engine_mismatch"] < 1e-4 for record in metrics)
    assert all(record["gradient_norm"] > 0 and record["behavior_kl"] < 1e-6 for record in metrics)
    facts = json.loads((tmp_path / "P1" / "manifest.json").read_text())["facts"]
    assert (facts["sampling"]["engine"], facts["sampling"]["temperature"]) == ("vllm", 1.0)
    assert facts["evaluation_sampling"]["temperature"] == 0.0


def test_training_stopped_by_term_goes_on(tied: Path, tmp_path: Path) -> None:
    process = train(tied, tmp_path, 40)
    while len(lines(tmp_path / "P1.part" / "metrics.jsonl")) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert "stopped by SIGTERM" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert processes_of(process.pid) == []
    done = len(lines(tmp_path / "P1.part" / "metrics.jsonl"))
    assert 3 <= done < 40
    process = train(tied, tmp_path, 40)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    metrics = lines(tmp_path / "P1" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 41))
    # also the first step after the resume: the engine has the checkpoint's weights, not those of --model
    assert all(record["engine_mismatch"] < 1e-4 for record in metrics)
    assert metrics[done]["behavior_kl"] < 1e-6
