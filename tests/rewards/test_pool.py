"""The pool of verifier processes: order, hangs, crashes, mistakes, and that no worker outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pool_processes import pids

from cropi_tools.rewards import Grade, VerifierPool, allow_files, grade
from cropi_tools.rewards.pool import default_workers
from cropi_tools.runtime.clock import work_time
from cropi_tools.runtime.errors import InputError, Interrupted, UsageError

# One function that does what the response says.
OBEDIENT = """
import os, re, signal, sys, time, threading

def score(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "hang":
        while True:
            pass
    if solution_str == "hang-in-c":
        re.match("(a+)+$", "a" * 64 + "b")
    if solution_str == "exit":
        os._exit(7)
    if solution_str == "segfault":
        os.kill(os.getpid(), 11)
    if solution_str == "raise":
        raise ZeroDivisionError("on purpose")
    if solution_str == "die-later":
        threading.Timer(0.05, os._exit, (1,)).start()
    if solution_str == "print":
        print("[0, 1.0, 'correct']", flush=True)
        sys.stdin.read()
    if solution_str == "fork":
        os.fork()  # and both go on
    if solution_str == "fork-and-raise" and not os.fork():
        raise ZeroDivisionError("in the child")
    if solution_str == "child-stays" and not os.fork():
        time.sleep(600)
    if solution_str == "own-alarm":
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1)
        time.sleep(0.01)
    if solution_str == "alarm":
        signal.alarm(1)
        time.sleep(5)
    if solution_str == "system-exit":
        raise SystemExit(3)
    if solution_str == "interrupt":
        raise KeyboardInterrupt
    if solution_str == "close-everything":
        os.closerange(0, 100)
    if solution_str == "slow":
        time.sleep(0.2)
    if solution_str == "torch":
        return float("torch" in sys.modules)
    return float(solution_str == ground_truth)
"""


@pytest.fixture
def obedient(tmp_path: Path) -> str:
    path = tmp_path / "obedient.py"
    path.write_text(OBEDIENT)
    allow_files([str(path)])
    return f"{path}:score"


def items(*responses: str) -> list[tuple[dict[str, Any], str]]:
    return [({"id": f"p{i}", "answer": "12"}, response) for i, response in enumerate(responses)]


def test_hangs_and_crashes_cost_their_own_answers_only(obedient: str) -> None:
    responses = ["12", "hang", "12", "exit", "13", "segfault", "12", "hang-in-c", "12", "print", "torch"]
    names = {"hang": "timeout", "hang-in-c": "timeout", "exit": "error", "segfault": "error", "12": "correct"}
    expected = [Grade(float(response == "12"), names.get(response, "wrong")) for response in responses]
    for workers in (1, 2):
        with VerifierPool(obedient, workers=workers, seconds=1) as pool:
            assert pool.grade_many(items(*responses)) == expected
            assert pool.grade_many(items("12", "13")) == [Grade(1.0, "correct"), Grade(0.0, "wrong")]


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("fork", "wrong"),
        ("fork-and-raise", "wrong"),
        ("child-stays", "wrong"),
        ("own-alarm", "wrong"),
        ("alarm", "timeout"),
        ("interrupt", "error"),
        ("close-everything", "error"),
    ],
)
def test_what_a_function_does_to_its_process_costs_its_own_answer_only(
    obedient: str, response: str, outcome: str
) -> None:
    with VerifierPool(obedient, workers=1, seconds=3) as pool:
        outcomes = [one.outcome for one in pool.grade_many(items("12", response, "12", response, *["12"] * 40))]
        assert outcomes == ["correct", outcome, "correct", outcome, *["correct"] * 40]
        assert pool.grade_many(items("12", "13")) == [Grade(1.0, "correct"), Grade(0.0, "wrong")]


def test_a_function_that_exits_is_a_mistake(obedient: str) -> None:
    with VerifierPool(obedient, workers=1) as pool, pytest.raises(InputError, match="SystemExit: 3"):
        pool.grade_many(items("12", "system-exit"))


@pytest.mark.parametrize("loading", [False, True])
def test_workers_killed_from_outside_are_replaced(obedient: str, loading: bool) -> None:
    with VerifierPool(obedient, workers=2, seconds=5) as pool, ThreadPoolExecutor(1) as thread:
        if loading:
            assert pool.grade_many(items("12"))[0].outcome == "correct"
            pool.close()
        grades = thread.submit(pool.grade_many, items(*["slow", "12"] * 12))
        deadline = time.monotonic() + 20
        while len(pids(pool)) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0 if loading else 0.6)
        for pid in pids(pool):
            os.kill(pid, signal.SIGKILL)
        assert [one.outcome for one in grades.result(60)] == ["wrong", "correct"] * 12


def test_a_thread_that_is_not_the_main_one_may_grade(obedient: str) -> None:
    work = [({"id": "p", "answer": "x+1"}, r"\boxed{1+x}"), ({"id": "q", "answer": "12", "verifier": obedient}, "hang")]
    with VerifierPool(seconds=1) as pool, ThreadPoolExecutor(1) as thread:
        assert [one.outcome for one in thread.submit(pool.grade_many, work).result(60)] == ["correct", "timeout"]


def test_who_waits_for_verifiers_to_load_starts(tmp_path: Path) -> None:
    """Where nothing else goes on meanwhile; where an engine samples, its work counts."""
    path = tmp_path / "late.py"
    path.write_text(
        "import time\ntime.sleep(0.3)\n\ndef score(data_source, solution_str, ground_truth, extra_info):\n    time.sleep(0.1)\n    return 1.0\n"
    )
    allow_files([str(path)])
    for stoppable in (True, False):
        with VerifierPool(f"{path}:score", workers=1, stoppable=stoppable) as pool:
            before, worked = time.monotonic(), work_time()
            pool.grade_many(items("12", "13"))
            whole, work = time.monotonic() - before, work_time() - worked
            assert work >= 0.2 - 0.01
            assert (whole - work >= 0.3) is stoppable
            again = work_time()
            pool.grade_many(items("14"))
            assert work_time() - again >= 0.1


def test_cancelled_from_another_thread(obedient: str) -> None:
    with VerifierPool(obedient, seconds=60) as pool, ThreadPoolExecutor(1) as thread:
        grading = thread.submit(pool.grade_many, items("hang"))
        time.sleep(0.5)
        started = time.monotonic()
        pool.cancel()
        with pytest.raises(Interrupted):
            grading.result(10)
        assert time.monotonic() - started < 5
        assert not pids(pool)


def test_few_answers_start_few_workers(obedient: str) -> None:
    assert default_workers() >= 2
    with VerifierPool(obedient, workers=6) as pool:
        pool.grade_many(items("12"))
        assert len(pids(pool)) == 1
        pool.grade_many(items(*["12"] * 7))
        assert len(pids(pool)) == 2
        pool.grade_many(items(*["12"] * 12))
        assert len(pids(pool)) == 3
        pool.grade_many(items(*["12"] * 400))
        assert len(pids(pool)) == 6


def test_a_hang_inside_a_long_slice(obedient: str) -> None:
    responses = ["12"] * 150
    responses[70] = "hang"
    with VerifierPool(obedient, workers=1, seconds=0.5) as pool:
        outcomes = [one.outcome for one in pool.grade_many(items(*responses))]
    assert outcomes == ["correct"] * 70 + ["timeout"] + ["correct"] * 79


def test_a_worker_that_dies_between_batches_is_replaced(obedient: str) -> None:
    with VerifierPool(obedient, workers=1) as pool:
        assert pool.grade_many(items("12"))[0].outcome == "correct"
        os.kill(pids(pool)[0], signal.SIGKILL)
        time.sleep(0.1)
        assert pool.grade_many(items("12"))[0].outcome == "correct"


def test_an_innocent_answer_is_not_blamed_for_a_late_death(obedient: str) -> None:
    with VerifierPool(obedient, workers=1) as pool:
        outcomes = [one.outcome for one in pool.grade_many(items("die-later", *["12"] * 3000))]
    assert outcomes == ["wrong"] + ["correct"] * 3000


def test_a_mistake_of_the_user_stops_the_batch_and_leaves_the_pool_usable(obedient: str) -> None:
    with VerifierPool(obedient, workers=2) as pool:
        with pytest.raises(InputError, match=r"obedient\.py:score, prompt 'p2': ZeroDivisionError: on purpose"):
            pool.grade_many(items("12", "12", "raise", "12"))
        assert not pids(pool)
        assert pool.grade_many(items("12")) == [Grade(1.0, "correct")]


def test_mistakes_that_need_no_grading(tmp_path: Path) -> None:
    with VerifierPool("no-such") as pool, pytest.raises(UsageError, match="no verifier 'no-such'"):
        pool.grade_many(items("12"))
    with VerifierPool(f"{tmp_path}/absent.py:score") as pool, pytest.raises(InputError, match="no file"):
        pool.grade_many(items("12"))
    with pytest.raises(UsageError):
        VerifierPool(workers=0)


def test_exact_and_plain_numbers_start_no_worker() -> None:
    with VerifierPool() as pool:
        exact = [({**record, "verifier": "exact"}, response) for record, response in items("12", " 12 ", "13")]
        assert [one.outcome for one in pool.grade_many(exact)] == ["correct", "correct", "wrong"]
        assert pool.grade_many([({"id": "p", "answer": "1200", "verifier": "maths"}, r"\boxed{1,200}")])[0].reward == 1
        assert pool.grade_many([]) == []
        assert not pids(pool)


def test_records_with_verifiers_of_their_own_mix(obedient: str) -> None:
    mixed = [
        ({"id": "a", "answer": "x+1"}, r"\boxed{1+x}"),
        ({"id": "b", "answer": "x", "verifier": obedient}, "x"),
        ({"id": "c", "answer": "x", "verifier": "exact"}, "y"),
        ({"id": "d", "answer": "[1,2]"}, r"\boxed{(1,2)}"),
    ]
    with VerifierPool("maths", workers=1) as pool:
        assert [one.outcome for one in pool.grade_many(mixed)] == ["correct", "correct", "wrong", "wrong"]


def test_grades_are_those_of_the_unprotected_verifier_for_any_number_of_workers() -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "math.jsonl"
    rows = [json.loads(line) for line in fixture.read_text().splitlines()]
    work = [(row, rf"\boxed{{{other['answer']}}}") for row in rows for other in (row, rows[5], rows[8])]
    expected = [grade(row, response) for row, response in work]
    for workers in (1, 3):
        with VerifierPool(workers=workers) as pool:
            assert pool.grade_many(work) == expected


PARENT = """
import sys, threading, time
from cropi_tools.rewards import VerifierPool
pool = VerifierPool(sys.argv[1], workers=2, seconds=1)
pool.grade_many([({"id": "p", "answer": "12"}, "12")] * 64)
response = sys.argv[2]
threading.Thread(target=pool.grade_many, args=([({"id": "p", "answer": "12"}, response)] * 2,), daemon=True).start()
time.sleep(0.3)
print(*(worker.process.pid for worker in pool._live), flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("response", ["12", "hang", "hang-in-c"])
def test_workers_die_with_a_killed_parent(obedient: str, response: str) -> None:
    command = [sys.executable, "-c", PARENT, obedient, response]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        parent.kill()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


HANGING = """
import sys
from cropi_tools.rewards import VerifierPool
pool = VerifierPool(sys.argv[1], workers=1, seconds=60)
pool.grade_many([({"id": "p", "answer": "12"}, "12")])
print(*(worker.process.pid for worker in pool._live), flush=True)
pool.grade_many([({"id": "p", "answer": "12"}, "hang")])
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_in_the_parent_ends_the_workers(obedient: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, obedient], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        assert is_running(pid)
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate(timeout=20)
        assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not is_running(pid)


def test_ctrl_c_reaches_the_parent_only(obedient: str) -> None:
    with VerifierPool(obedient, workers=1) as pool:
        pool.grade_many(items("12"))
        (pid,) = pids(pool)
        os.kill(pid, signal.SIGINT)
        assert os.getpgid(pid) != os.getpgid(0)
        assert pool.grade_many(items("12"))[0].outcome == "correct"
        assert pids(pool) == [pid]
    assert not is_running(pid)
