"""cropi-rollout --engine vllm, from a shell: killed, stopped, resumed; and its dry run."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import tiny_policy
from killing import PROGRAM, facts_of, finish, same_samples, samples, stop

pytestmark = pytest.mark.vllm


def line(policy: Path, output: str) -> list[str]:
    words = f"--engine vllm --model {policy} -n 8 --max-tokens 48 --temperature 0.8 --verifier exact --quiet"
    return [*words.split(), "-o", output, "prompts.jsonl"]


def test_a_killed_and_a_stopped_rollout_go_on_to_the_same_samples(tied: Path, tmp_path: Path) -> None:
    tiny_policy.write_jsonl(tmp_path / "prompts.jsonl", tiny_policy.prompts(400))
    finish(tmp_path, line(tied, "whole.jsonl"))
    assert stop(tmp_path, line(tied, "broken.jsonl"), "broken.jsonl", signal.SIGKILL) == -signal.SIGKILL
    before = (tmp_path / "broken.jsonl.part").read_text().count("\n")
    assert stop(tmp_path, line(tied, "broken.jsonl"), "broken.jsonl", signal.SIGTERM) == 143
    kept = (tmp_path / "broken.jsonl.part").read_text()
    assert kept.count("\n") >= before
    finish(tmp_path, line(tied, "broken.jsonl"))
    assert (tmp_path / "broken.jsonl").read_text().startswith(kept)  # what was done is not done again
    same_samples(tmp_path / "whole.jsonl", tmp_path / "broken.jsonl")
    sampling = facts_of(tmp_path / "whole.jsonl")["sampling"]
    assert (sampling["engine"], sampling["top_k"], sampling["temperature"]) == ("vllm", 0, 0.8)
    assert len(samples(tmp_path / "whole.jsonl")) == 400


def test_a_dry_run(tied: Path, tmp_path: Path) -> None:
    tiny_policy.write_jsonl(tmp_path / "prompts.jsonl", tiny_policy.prompts(400))
    words = [PROGRAM, *line(tied, "whole.jsonl"), "--dry-run", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())  # a random policy is never right
    said = json.loads(done.stdout)
    assert said["responses"] == 3200
    assert said["seconds"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "prompts.jsonl"]
