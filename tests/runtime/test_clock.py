"""Start and work apart: the clock itself, outputs over several tries, and a real process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cropi_tools.data.manifest import Fingerprint, read_manifest
from cropi_tools.data.output import Output
from cropi_tools.runtime import clock


class Hand:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    found = Hand()
    monkeypatch.setattr(clock.time, "monotonic", found.monotonic)
    return found


def ledger(output: Output) -> dict[str, float]:
    return (read_manifest(output.path) or {})["ledger"]


def test_what_starts_late_is_start_too(hand: Hand, tmp_path: Path) -> None:
    output = Output(tmp_path / "made", Fingerprint("cropi-test", {}, {}), {})
    hand.now += 3  # imports
    output.open()
    hand.now += 4  # loading
    output.begin_work()
    hand.now += 10
    before = clock.work_time()
    with clock.starting():
        hand.now += 1  # a kernel compiles while work goes on
        with clock.starting():
            hand.now += 1
    hand.now += 20
    assert clock.work_time() - before == 20
    output.part.write_text("")
    output.finish(rows=0)
    assert ledger(output) == {"seconds": 39, "seconds_start": 9, "seconds_work": 30}


def test_processor_time_stands_still_while_nothing_is_computed() -> None:
    program = (
        "import time; from cropi_tools.runtime import clock; clock.use_processor_time(); clock.command_begins()\n"
        "made, before = clock.Clock(), clock.work_time(); time.sleep(1); rested = clock.work_time() - before\n"
        "sum(n * n for n in range(3_000_000)); print(rested, clock.work_time() - before, *made.seconds())"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    rested, worked, whole, start = map(float, shown.stdout.split())
    assert rested < 0.5
    assert worked > 2 * rested
    assert worked <= whole
    assert start < 0.9


def test_start_adds_up_over_tries(hand: Hand, tmp_path: Path) -> None:
    for last in (False, True):
        output = Output(tmp_path / "made", Fingerprint("cropi-test", {}, {}), {})
        output.open()
        hand.now += 5
        output.begin_work()
        hand.now += 7
        output.part.write_text("")
        output.commit({"lines": 1})
        if last:
            output.finish(rows=1)
        else:
            hand.now += 100  # lost with the process
            output._release_lock()
    assert ledger(output) == {"seconds": 24, "seconds_start": 10, "seconds_work": 14}


def test_unfinished_work_of_before_start_was_told_resumes(hand: Hand, tmp_path: Path) -> None:
    first = Output(tmp_path / "made", Fingerprint("cropi-test", {}, {}), {})
    first.open()
    first.part.write_text("")
    hand.now += 6
    first.commit({"lines": 1})
    first._release_lock()
    state = tmp_path / "made.part.json"
    old = {key: value for key, value in json.loads(state.read_text()).items() if key != "seconds_start"}
    state.write_text(json.dumps(old))
    second = Output(tmp_path / "made", Fingerprint("cropi-test", {}, {}), {})
    second.open()
    second.finish(rows=1)
    assert ledger(second) == {"seconds": 6, "seconds_start": 0, "seconds_work": 6}


def test_only_the_first_output_of_a_command_counts_from_its_process(
    hand: Hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "_IMPORTED", hand.now - 8)
    monkeypatch.setattr(clock, "process_age", lambda: 9.0)
    clock.command_begins()
    for name, expected in (("first", 9), ("second", 0)):
        output = Output(tmp_path / name, Fingerprint("cropi-test", {}, {}), {})
        output.open()
        output.part.write_text("")
        output.finish(rows=0)
        assert ledger(output)["seconds_start"] == expected


@pytest.mark.parametrize("age", [None, 8.0 + 61])  # no /proc; a shell that worked for a while and became this process
def test_without_a_usable_creation_time_the_import_counts(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, age: float | None
) -> None:
    monkeypatch.setattr(clock, "_IMPORTED", hand.now - 8)
    monkeypatch.setattr(clock, "process_age", lambda: age)
    clock.command_begins()
    assert clock.Clock().seconds() == (8, 8)


def test_a_process_counts_from_its_creation() -> None:
    program = (
        "import time; time.sleep(.5); from cropi_tools.runtime import clock; clock.command_begins(); "
        "print(clock.Clock().seconds()[1])"
    )
    before = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.5 <= float(shown.stdout) <= time.monotonic() - before + 0.02  # creation is told in ticks of 10 ms


def test_compiling_a_kernel_is_start() -> None:
    """A kernel that is compiled at its first call, in the middle of work, and one that is not any more."""
    program = """
import time
import numpy as np
from numba import njit
from cropi_tools.runtime import clock
from cropi_tools.sketches import countsketch_numba
inner = njit(lambda x: x + 1)
outer = njit(lambda x: inner(x).sum())
for _ in range(2):
    before, worked = time.monotonic(), clock.work_time()
    outer(np.ones(4))
    whole, work = time.monotonic() - before, clock.work_time() - worked
    print(whole - work, work)
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (start, work), (again, _) = ([float(word) for word in line.split()] for line in shown.stdout.splitlines())
    assert start > 0.9 * (start + work)
    assert again < 1e-4


def test_importing_is_start_and_the_collector_rests(
    hand: Hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what came with it is never looked through again; what was switched off before stays so."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cropi_heavy.py").write_text(
        "import gc\nsearching = gc.isenabled()\nheld = [[] for _ in range(1000)]\n"
    )
    started, frozen = clock._started_for(), gc.get_freeze_count()
    try:
        with clock.importing():
            hand.now += 3
            import cropi_heavy  # type: ignore[import-not-found]
        assert clock._started_for() - started == 3
        assert not cropi_heavy.searching
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen + 1000
        after = gc.get_freeze_count()
        gc.disable()
        with clock.importing():
            kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
        assert not gc.isenabled()
        assert gc.get_freeze_count() == after
        assert len(kept) == 1000
    finally:
        gc.enable()
        sys.modules.pop("cropi_heavy", None)


def test_a_failing_import_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(ModuleNotFoundError), clock.importing():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
    assert clock._open == 0


IMPORTS = """
import sys
from cropi_tools.runtime import clock

large = {"torch", "transformers", "numpy", "numba", "zarr", "scipy", "pyarrow", "reasoning_gym", "sympy", "matplotlib", "pandas"}
working = False

def heard(event, words):
    if event == "import" and words[0].partition(".")[0] in large and working and not clock._open:
        late.add(words[0].partition(".")[0])

late = set()
sys.addaudithook(heard)
begin = clock.Clock.begin_work

def begun(self):
    global working
    working = True
    late.clear()  # everything up to now was start
    begin(self)

clock.Clock.begin_work = begun
command = sys.argv.pop(1)
init = clock.Clock.__init__

def made(self):
    global working
    init(self)
    working = False  # that of an output is made before it is opened

clock.Clock.__init__ = made
from importlib import import_module
main = import_module(f"cropi_tools.cli.{command}").main
sys.argv[0] = f"cropi-{command}"
try:
    main()
finally:
    print("late:", *sorted(late))
"""


@pytest.mark.slow
def test_no_command_imports_while_it_works(policy_folder: Path, tmp_path: Path) -> None:
    """The libraries that take long, in a process of their own each: all is imported before work begins, or counted as start."""

    def late(command: str, *words: object) -> list[str]:
        line = [sys.executable, "-c", IMPORTS, command, *map(str, words)]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("late:")
        return done.stdout.splitlines()[-1].split()[1:]

    found = {
        "prompts": late("prompts", "reasoning-gym:basic_arithmetic", "--size", 6, "-o", "p.jsonl"),
        "rollout": late(
            *("rollout", "--model", policy_folder, "p.jsonl", "-n", 4, "--max-tokens", 4, "-o", "r.jsonl"),
            *("--verifier", "maths", "--quiet"),
        ),
        "verify": late("verify", "r.jsonl", "--verifier", "maths", "-o", "v.jsonl", "--quiet"),
        "select to a table": late(
            "select", "--prompts", "p.jsonl", "--by", "random", "-n", 3, "--format", "verl", "-o", "s.parquet"
        ),
        "prompts of a table": late("prompts", "s.parquet", "--map", "prompt=prompt", "-o", "t.jsonl"),
    }
    assert not any(found.values()), found
