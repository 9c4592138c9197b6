"""Stopped at any moment, the same line goes on, and ends with the bytes of an unbroken run.

Nothing takes the final name before it is whole.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from command_table import CASES, CHANGES, Case, leftovers, looks_whole, same_content
from shell import Shell, signalled
from sweeps import some

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
resumable = pytest.mark.parametrize("case", [case for case in CASES if case.committed], ids=lambda case: case.name)
ENDING = 12  # the last changes of a command: hash, manifest, rename, tidying up
KEPT = r"kept [\d,]+ of [\d,]+ (responses|prompts|steps)( and rollouts of the next one)?; the same command resumes"


def whole_or_absent(case: Case, output: Path, expected: Path) -> None:
    """A result that bears its name is whole; a manifest that lies beside one names this one."""
    if output.exists():
        same_content(output, expected, case.exempt)
        assert not case.folder or (output / "manifest.json").exists()
    else:
        assert looks_whole(output) == []


def finishes(case: Case, place: Path, shell: Shell, expected: Path) -> None:
    """The same line, left alone, completes the result and leaves nothing else."""
    output = place / "again" / case.output
    shell([*case.to(f"again/{case.output}"), "--quiet"], place)
    same_content(output, expected, case.exempt)
    assert leftovers(output) == []
    manifest = output / "manifest.json" if case.folder else output.with_name(output.name + ".manifest.json")
    assert manifest.exists()


def killed(case: Case, place: Path, shell: Shell, points: list[int]) -> None:
    """Kill the command before each of these file changes, one try after another; then let it finish."""
    (place / "again").mkdir(exist_ok=True)
    expected, output = place / case.output, place / "again" / case.output
    for point in points:
        done = shell([*case.to(f"again/{case.output}"), "--quiet"], place, code=None, kill_at=point)
        assert done.code in (0, -signal.SIGKILL), done.stderr
        whole_or_absent(case, output, expected)
    finishes(case, place, shell, expected)


def fresh(place: Path) -> None:
    """Take away what the last kill and its rerun made."""
    shutil.rmtree(place / "again")


@each
def test_killed_repeatedly(case: Case, place: Path, shell: Shell) -> None:
    draw = random.Random(case.name)
    total = CHANGES[case.name]
    killed(case, place, shell, [draw.randint(2, total - ENDING), draw.randint(2, 20)])


@each
def test_killed_while_finishing(case: Case, place: Path, shell: Shell) -> None:
    draw = random.Random(case.name)
    total = CHANGES[case.name]
    for point in sorted(draw.sample(range(total - ENDING, total + 1), 2)):
        killed(case, place, shell, [point])
        fresh(place)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@each
def test_killed_all_the_way(case: Case, place: Path, shell: Shell) -> None:
    """Before changes at the beginning, at the end, and a tenth of those between, where commits repeat; before a third of all these, or all."""
    total = CHANGES[case.name]
    between = range(7, total - ENDING)
    drawn = random.Random(case.name).sample(between, (len(between) + 9) // 10)
    points = sorted({*range(1, 7), *drawn, *range(max(1, total - ENDING), total + 1)})
    for point in some(points, 1 / 3, case.name):
        killed(case, place, shell, [point])
        fresh(place)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [case for case in CASES if not case.light], ids=lambda case: case.name)
def test_killed_at_random_moments(case: Case, place: Path, shell: Shell) -> None:
    (place / "again").mkdir()
    draw = random.Random(case.name)
    started = time.monotonic()
    finishes(case, place, shell, place / case.output)
    length = time.monotonic() - started
    fresh(place)
    for _ in range(3):
        (place / "again").mkdir()
        for _ in range(3):
            wait = draw.uniform(0.0, length)
            kill = signalled(signal.SIGKILL, lambda: True, wait)
            done = shell([*case.to(f"again/{case.output}"), "--quiet"], place, code=None, meanwhile=kill)
            assert done.code in (0, -signal.SIGKILL), done.stderr
            whole_or_absent(case, place / "again" / case.output, place / case.output)
        finishes(case, place, shell, place / case.output)
        fresh(place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda number: number.name)
@resumable
def test_asked_to_stop_it_keeps_what_is_done(case: Case, number: signal.Signals, place: Path, shell: Shell) -> None:
    assert case.committed is not None
    (place / "again").mkdir()
    output = place / "again" / case.output
    part = output.with_name(output.name + ".part")
    progress = part / "progress.json" if case.folder else output.with_name(output.name + ".part.json")
    words = [*case.to(f"again/{case.output}"), "--quiet"]
    name, mine, mark = case.committed
    kept = part / name if name else part

    def ready() -> bool:
        return progress.exists() and (not case.stops_at_once or (kept.exists() and mine in kept.read_bytes()))

    done = shell(words, place, code=143, meanwhile=signalled(number, ready))
    (error,) = done.errors
    assert re.fullmatch(rf"{case.line[0]}: stopped by {number.name}; {KEPT}", error), error
    assert looks_whole(output) == []
    # a mark in what was kept is still there at the end: it was not done again
    assert mine in kept.read_bytes()
    kept.write_bytes(kept.read_bytes().replace(mine, mark, 1))
    shell(words, place)
    found = ((output / name) if name else output).read_bytes()
    assert found.count(mark) == 1
    assert found.replace(mark, mine, 1) == ((place / case.output / name) if name else place / case.output).read_bytes()


@resumable
def test_interrupted_by_the_keyboard(case: Case, place: Path, shell: Shell) -> None:
    (place / "again").mkdir()
    output = place / "again" / case.output
    part = output.with_name(output.name + ".part")
    progress = part / "progress.json" if case.folder else output.with_name(output.name + ".part.json")
    words = [*case.to(f"again/{case.output}"), "--quiet"]
    done = shell(words, place, code=130, meanwhile=signalled(signal.SIGINT, progress.exists))
    (error,) = done.errors
    assert re.fullmatch(f"{case.line[0]}: interrupted; (nothing finished yet|{KEPT})", error), error
    assert looks_whole(output) == []
    finishes(case, place, shell, place / case.output)


def test_a_mean_asked_to_stop_keeps_its_sum(place: Path, shell: Shell) -> None:
    # one prompt a pass: several at once may all be done before the signal comes
    case = next(case for case in CASES if case.name == "grad-mean-halves")
    (place / "again").mkdir()
    progress = place / "again" / (case.output + ".part.json")
    words = [*case.to(f"again/{case.output}"), "--quiet"]
    shell(words, place, code=143, meanwhile=signalled(signal.SIGTERM, progress.exists))
    assert b'"done": ' in progress.read_bytes()
    finishes(case, place, shell, place / case.output)


def test_a_command_that_commits_only_at_the_end_stops_as_well(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "raw.jsonl").write_text(
        "".join(f'{{"prompt": "question {n}", "answer": "{n}"}}\n' for n in range(200_000))
    )
    part = tmp_path / "many.jsonl.part"
    stop = signalled(signal.SIGTERM, part.exists)
    shell(["cropi-prompts", "raw.jsonl", "-o", "many.jsonl"], tmp_path, code=143, meanwhile=stop)
    assert leftovers(tmp_path / "many.jsonl") == []
    assert looks_whole(tmp_path / "many.jsonl") == []
