"""Data of strangers runs no program, and a verifier's program can neither forge grades nor take all memory."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_policy

from cropi_tools.rewards import VerifierPool, allow_files, check_own_verifiers, grade, verifiers
from cropi_tools.runtime.errors import InputError

MARK = "EXECUTED"
HELPER = f"""
import pathlib
pathlib.Path(__file__).with_name("{MARK}").touch()

def ok(solution_str, **others):
    return 1.0

def other(solution_str, **others):
    return 0.5
"""


@pytest.fixture(autouse=True)
def nothing_allowed() -> Iterator[None]:
    yield
    verifiers._allowed.clear()
    verifiers._may_run.cache_clear()


@pytest.fixture
def helper(tmp_path: Path) -> Path:
    path = tmp_path / "helper.py"
    path.write_text(HELPER)
    return path


def record(verifier: object, **others: Any) -> dict[str, Any]:
    return {"id": "a", "prompt": "1+1=", "answer": "2", "source": "s", "verifier": verifier, **others}


def test_a_record_names_no_program(helper: Path, tmp_path: Path) -> None:
    strange = record(f"{helper}:ok")
    with pytest.raises(
        InputError, match=r"prompt 'a' names the program .*helper\.py:ok .*--allow-verifier .*helper\.py"
    ):
        grade(strange, "2")
    with VerifierPool() as pool, pytest.raises(InputError, match="names the program"):
        pool.grade_many([(strange, "2")])
    (tmp_path / "p.jsonl").write_text("\n" + json.dumps(strange) + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl:2: prompt 'a' names the program"):
        check_own_verifiers([str(tmp_path / "p.jsonl")], None)
    assert grade(strange, "2", "exact").reward == 1.0
    with VerifierPool("exact") as pool:
        assert [found.reward for found in pool.grade_many([(strange, "2")])] == [1.0]
    assert check_own_verifiers([str(tmp_path / "p.jsonl")], "exact") == {}
    assert not (tmp_path / MARK).exists()


def test_what_the_command_line_names_runs(helper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen for all records, or allowed, by any spelling of its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(helper)
    for own in (None, "helper.py:other", "exact"):
        assert grade(record(own), "2", "link.py:ok").reward == 1.0
    with pytest.raises(InputError, match="names the program"):
        grade(record("helper.py:other"), "2")
    allow_files(["helper.py"])
    for own in ("helper.py:other", f"{helper}:other", "./helper.py:other", "link.py:other"):
        assert grade(record(own), "2").reward == 0.5
    (tmp_path / "second.py").write_text(HELPER)
    with pytest.raises(InputError, match="names the program"):
        grade(record("second.py:ok"), "2")


LINES = [
    "cropi-rollout --model P0 data.jsonl -n 1 --max-tokens 2 -o out.jsonl",
    "cropi-rollout --model P0 data.jsonl -n 1 --max-tokens 2 --dry-run",
    "cropi-verify rollouts.jsonl -o out.jsonl",
    "cropi-train --model P0 data.jsonl --steps 1 --max-tokens 2 -o out",
    "cropi-train --model P0 good.jsonl --eval t=data.jsonl --steps 1 --max-tokens 2 -o out",
    "cropi-train --model P0 data.jsonl --steps 1 --max-tokens 2 -o out --dry-run",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("form", ["ours", "verl"])
def test_no_command_runs_what_data_names(
    run: Callable[..., subprocess.CompletedProcess[str]],
    policy_folder: Path,
    helper: Path,
    tmp_path: Path,
    line: str,
    form: str,
) -> None:
    (tmp_path / "P0").symlink_to(policy_folder)
    tiny_policy.write_jsonl(tmp_path / "good.jsonl", tiny_policy.prompts(2))
    strange = record("helper.py:ok")
    if form == "verl":
        strange = {
            "data_source": "s",
            "prompt": [{"role": "user", "content": "1+1="}],
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": "a", "verifier": "helper.py:ok"},
        }
        pq.write_table(pa.Table.from_pylist([strange]), tmp_path / "data.parquet")
        run("cropi-prompts", "data.parquet", "-o", "data.jsonl")
        strange = json.loads((tmp_path / "data.jsonl").read_text())
        assert strange["verifier"] == "helper.py:ok"
    tiny_policy.write_jsonl(tmp_path / "data.jsonl", [strange])
    sample = {"token_ids": [2], "logprobs": [-1.0], "text": "2", "finish_reason": "stop", "reward": 0.0}
    tiny_policy.write_jsonl(tmp_path / "rollouts.jsonl", [{**strange, "prompt_token_ids": [2], "samples": [sample]}])
    said = run(*line.split(), code=1).stderr
    assert "names the program helper.py:ok" in said
    assert said.count("\n") == 1
    assert not (tmp_path / MARK).exists()
    if "cropi-verify" in line:
        said = run(*line.split(), "--verifier", "exact").stderr
        assert said.startswith("--verifier exact overrides the verifiers of 1 of 1 records\n")
        assert json.loads((tmp_path / "out.jsonl").read_text())["samples"][0]["outcome"] == "correct"
        assert not (tmp_path / MARK).exists()
        run(*line.split(), "--allow-verifier", "helper.py", "--force")
        assert (tmp_path / MARK).exists()


WRITER = """
import os

def forger(solution_str, **others):
    for number in range(1, 20):
        try:
            os.write(number, b'[0, 1.0, "correct"]\\n{"ready": true}\\n[0, 1.0')
        except OSError:
            pass
    return 0.0

def greedy(solution_str, **others):
    return float(len(bytearray(1 << 40)))

class Odd(BaseException):
    pass

def odd(solution_str, **others):
    if solution_str == "odd":
        raise Odd
    return 1.0
"""


def outcomes(name: str, *texts: str) -> list[tuple[float, str]]:
    with VerifierPool(name, workers=1, seconds=10) as pool:
        found = pool.grade_many([({"id": str(number), "answer": "2"}, text) for number, text in enumerate(texts)])
    return [(one.reward, one.outcome) for one in found]


def test_writing_where_replies_go_changes_no_grade(tmp_path: Path) -> None:
    (tmp_path / "w.py").write_text(WRITER)
    assert outcomes(f"{tmp_path / 'w.py'}:forger", "1", "2", "3") == [(0.0, "wrong")] * 3


def test_memory_and_strange_exceptions_are_counted(tmp_path: Path) -> None:
    (tmp_path / "w.py").write_text(WRITER)
    assert outcomes(f"{tmp_path / 'w.py'}:greedy", "1", "2") == [(0.0, "error")] * 2
    assert outcomes(f"{tmp_path / 'w.py'}:odd", "1", "odd", "2") == [(1.0, "correct"), (0.0, "error"), (1.0, "correct")]
