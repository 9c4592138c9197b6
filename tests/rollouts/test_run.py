"""Sampling and verifying side by side, stopping, and what a dry run says."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import naive_policy
import pytest
import tiny_policy
from test_refreshing import ROLLOUTS, run

from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.manifest import Fingerprint
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling
from cropi_tools.rewards.verifiers import Grade
from cropi_tools.rollouts.estimate import probe_places
from cropi_tools.rollouts.grading import Row
from cropi_tools.rollouts.sampling import GROUPS_AHEAD, SamplingTask, chunks, sample_groups
from cropi_tools.rollouts.writing import write
from cropi_tools.runtime import signals
from cropi_tools.runtime.errors import InputError


class Counting(Engine):
    """Answers every request with one token; takes note of how far it was asked."""

    def __init__(self) -> None:
        self.groups = 0

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        for requests in groups:
            self.groups += 1
            yield [Completion([request.prompt_token_ids[0]], [-1.0], "length") for request in requests]

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        return {}


class Slow:
    """A pool that grades in its own time."""

    verifier = "exact"

    def __init__(self, release: threading.Event | None = None, error: Exception | None = None) -> None:
        self.release, self.error, self.threads, self.cancelled = release, error, set(), False

    def grade_many(self, items: list[tuple[dict[str, Any], str]]) -> list[Grade]:
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        if self.release is not None:
            assert self.release.wait(20)
        return [Grade(1.0, "correct")] * len(items)

    def cancel(self) -> None:
        self.cancelled = True


def start(engine: Engine, pool: Slow, prompts: int = 40) -> Iterator[list[Row]]:
    tasks = [SamplingTask(record, (0, record["id"]), 128) for record in tiny_policy.prompts(prompts)]
    tokens = naive_policy.policy().tokens
    return sample_groups(engine, tokens, pool, chunks(tasks, 128), Sampling(1, 1.0))  # type: ignore[arg-type]


def test_the_engine_goes_on_while_verifiers_work() -> None:
    engine, pool = Counting(), Slow(threading.Event())
    groups = start(engine, pool)
    first: list[list[Row]] = []
    consumer = threading.Thread(target=lambda: first.append(next(groups)))
    consumer.start()
    deadline = time.monotonic() + 20
    while engine.groups < GROUPS_AHEAD + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert engine.groups == GROUPS_AHEAD + 1  # ahead of the verifiers, and not without bound
    assert pool.release is not None
    pool.release.set()
    consumer.join()
    found = first + list(groups)
    assert [row.record["id"] for group in found for row in group] == [r["id"] for r in tiny_policy.prompts(40)]
    assert threading.get_ident() not in pool.threads
    assert len(pool.threads) == 1


def test_an_error_of_a_verifier_comes_through_and_ends_the_work() -> None:
    engine, pool = Counting(), Slow(error=InputError("prompt 'p0': the verifier failed"))
    with pytest.raises(InputError, match="the verifier failed"):
        list(start(engine, pool))
    assert pool.cancelled
    assert engine.groups <= GROUPS_AHEAD + 2


class Failing(Counting):
    """Fails at its fourth group."""

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        for number, found in enumerate(super().stream(groups, sampling)):
            if number == 3:
                raise InputError("the server went away")
            yield found


def test_what_was_sampled_before_the_engine_failed_is_kept() -> None:
    release = threading.Event()
    threading.Timer(0.3, release.set).start()
    groups = start(Failing(), Slow(release))
    assert [len(next(groups)) for _ in range(3)] == [2, 2, 2]
    with pytest.raises(InputError, match="went away"):
        next(groups)


def test_a_stop_keeps_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pool = Counting(), Slow()
    groups = start(engine, pool)
    found = [next(groups)]
    monkeypatch.setattr(signals, "_stop_signal", signal.SIGTERM)
    found += list(groups)
    assert len(found) == engine.groups < 20
    found = list(start(engine, pool))  # a run that is asked to stop before its first group does that one
    assert len(found) == 1


def test_records_passed_on_cost_no_request() -> None:
    kept = {"id": "k", "samples": [{"outcome": "wrong", "reward": 0.0, "text": ""}], "prompt_token_ids": [3]}
    passed = SamplingTask(kept, None, 0)
    tasks = [passed, *(SamplingTask(record, (0, record["id"]), 3) for record in tiny_policy.prompts(2)), passed]
    engine, sampling, pool = Counting(), Sampling(1, 1.0), Slow()
    tokens = naive_policy.policy().tokens
    ((first, *between, last),) = sample_groups(engine, tokens, pool, [tasks], sampling)  # type: ignore[arg-type]
    assert first == last == Row(kept, sampled=False)
    assert first.record is kept
    assert [(len(row.record["samples"]), row.sampled) for row in between] == [(3, True), (3, True)]
    assert list(sample_groups(engine, tokens, pool, [[passed]], sampling)) == [[first]]  # type: ignore[arg-type]


@pytest.mark.parametrize(("prompts", "samples"), [(1, 8), (31, 8), (33, 8), (10**6, 8), (10**6, 1000), (5, 1), (0, 8)])
def test_the_probe_is_spread_evenly(prompts: int, samples: int) -> None:
    places = list(probe_places(prompts, samples))
    assert len(places) <= max(1, 256 // samples)
    assert len(places) >= min(prompts, max(1, 256 // samples // 2))
    assert places == sorted(set(places))
    assert all(0 <= place < prompts for place in places)


def test_a_dry_run_says_what_it_will_cost_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tiny_policy.save(tmp_path / "P0")
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(300))
    line = ["--model", str(policy), str(prompts), "-n", "4", "--max-tokens", "6", "--verifier", "exact", "--quiet"]
    before = sorted(tmp_path.rglob("*"))
    assert run(*line, "-o", str(tmp_path / "r.jsonl"), "--dry-run", "--json") == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = json.loads(capsys.readouterr().out)
    assert (said["prompts"], said["responses"]) == (300, 1200)
    assert run(*line, "-o", str(tmp_path / "r.jsonl")) == 0
    text = (tmp_path / "r.jsonl").read_text()
    assert said["disk"] == pytest.approx(len(text.encode()), rel=0.05)
    tokens = sum(len(s["token_ids"]) for row in map(json.loads, text.splitlines()) for s in row["samples"])
    assert said["tokens"] == pytest.approx(tokens, rel=0.1)
    assert said["seconds"] > 0
    assert said["memory"] > 1e8
    capsys.readouterr()
    assert run(*line, "-o", str(tmp_path / "r.jsonl"), "--dry-run", "--shard", "1/3") == 0
    assert capsys.readouterr().out.startswith("100 prompts, 400 responses")


def test_a_shard_without_a_prompt_writes_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tiny_policy.save(tmp_path / "P0")
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(2))
    line = ["--model", str(policy), str(prompts), "-n", "2", "--max-tokens", "2", "--verifier", "exact"]
    assert run(*line, "--shard", "1/3", "-o", str(tmp_path / "r.jsonl")) == 0
    assert (tmp_path / "r.jsonl").read_text() == ""
    capsys.readouterr()
    assert run(*line, "--shard", "1/3", "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["prompts"], said["seconds"], said["disk"]) == (0, 0, 0)


def test_a_dry_run_that_is_asked_to_stop_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy.save(tmp_path / "P0")
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(2))
    monkeypatch.setattr(signals, "_stop_signal", signal.SIGTERM)
    line = ["--model", str(policy), str(prompts), "-n", "2", "--max-tokens", "2", "--verifier", "exact", "--dry-run"]
    assert run(*line) == 143
    assert capsys.readouterr().out == ""


def test_an_input_that_shrinks_meanwhile_is_an_error() -> None:
    target = JsonLinesOutput("-", Fingerprint("c", {}, {}), {})
    assert target.open()
    with pytest.raises(InputError, match="2 records are missing"):
        write(target, iter([]), 2, "rollouts")


def test_verifiers_of_records_are_checked_before_the_first_sample_and_count(tmp_path: Path) -> None:
    policy = tiny_policy.save(tmp_path / "P0")
    mine = tmp_path / "mine.py"
    mine.write_text("def f(solution_str, **more):\n    return 1.0\n")
    records = tiny_policy.prompts(3)
    records[1]["verifier"] = f"{mine}:f"
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", records)
    line = ["--model", str(policy), str(prompts), "-n", "2", "--max-tokens", "2", "--quiet"]
    line += ["--allow-verifier", str(mine)]
    assert run(*line, "-o", str(tmp_path / "r.jsonl")) == 0
    mine.write_text("def f(solution_str, **more):\n    return 0.0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said := io.StringIO())
        assert run(*line, "-o", str(tmp_path / "r.jsonl")) == 1
    assert "own-verifiers" in said.getvalue()
    records[2]["verifier"] = "nonsense"
    tiny_policy.write_jsonl(prompts, records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said := io.StringIO())
        assert run(*line, "-o", str(tmp_path / "other.jsonl")) == 1
    assert "p.jsonl:3: there is no verifier 'nonsense'" in said.getvalue()
    assert not list(tmp_path.glob("other*"))


def test_rollouts_as_prompts_leave_their_marks_behind(tmp_path: Path) -> None:
    policy = tiny_policy.save(tmp_path / "P0")
    rows = [{**row, "sampled_by": "x", "reasoning_open": True} for row in ROLLOUTS]
    source = tiny_policy.write_jsonl(tmp_path / "r.jsonl", rows)
    line = ["--model", str(policy), str(source), "-n", "2", "--max-tokens", "2", "--verifier", "exact", "--quiet"]
    assert run(*line, "-o", str(tmp_path / "new.jsonl")) == 0
    for text in (tmp_path / "new.jsonl").read_text().splitlines():
        assert not {"sampled_by", "reasoning_open"} & json.loads(text).keys()


def test_a_verifier_that_answers_nothing_ends_the_command(tmp_path: Path) -> None:
    """Unnoticed, every reward would be 0; a few that are lost are counted aloud."""
    (tmp_path / "dying.py").write_text(
        "import os\n\ndef always(solution_str, **more):\n    os._exit(3)\n\n"
        "def sometimes(ground_truth, **more):\n    return os._exit(3) if ground_truth == '0' else 1.0\n"
    )
    policy = tiny_policy.save(tmp_path / "P0")
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(10))
    line = ["--model", str(policy), str(prompts), "-n", "1", "--max-tokens", "2", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said := io.StringIO())
        assert run(*line, "--verifier", f"{tmp_path}/dying.py:always") == 1
        assert "no answer on any of the first 10 responses: it died (10)" in said.getvalue()
        assert run(*line, "--verifier", f"{tmp_path}/dying.py:sometimes", "-o", str(tmp_path / "b.jsonl")) == 0
        assert "warning: the verifier gave no answer on 1 responses" in said.getvalue()


def test_reading_prompts_is_work_and_loading_is_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In cropi-rollout as in cropi-grad."""
    from cropi_tools.rollouts import run as room

    def slowed(name: str, seconds: float) -> None:
        real = getattr(room, name)

        def late(*words: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return real(*words, **named)

        monkeypatch.setattr(room, name, late)

    policy, prompts, target = tiny_policy.save(tmp_path / "P0"), tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in tiny_policy.prompts(2)))
    line = ["--model", str(policy), str(prompts), "-n", "2", "--max-tokens", "2", "--verifier", "exact", "--quiet"]
    assert run(*line, "-o", str(target)) == 0  # imports
    slowed("check_record", 0.2)  # of two prompts
    slowed("load_tokens", 0.7)
    slowed("open_engine", 0.7)
    assert run(*line, "-o", str(target), "--force") == 0
    ledger = json.loads((tmp_path / "r.jsonl.manifest.json").read_text())["ledger"]
    assert ledger["seconds_start"] >= 1.4
    assert 0.4 <= ledger["seconds_work"] < 1.8
