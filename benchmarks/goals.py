"""What the benchmarks share: timing, the device's name, memory, and how a goal is told."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """A measured value against its goal. at_most: smaller is better. decided: whether it is met, where more than the value decides."""

    name: str
    value: float
    goal: float
    peer: str
    at_most: bool = False
    decided: bool | None = None

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the goal."""
        if self.decided is not None:
            return self.decided
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def print_json(goals: Sequence[Goal], device: str, **more: Any) -> None:
    """One JSON object a goal: name, value, goal, met, peer, device, and what else is given."""
    for one in goals:
        value = float(f"{one.value:.4g}")
        record = {"name": one.name, "value": value, "goal": one.goal, "met": one.met, "peer": one.peer}
        print(json.dumps({**record, "device": device, **more}))


def print_lines(goals: Sequence[Goal]) -> None:
    """A line a goal, for people."""
    for one in goals:
        side, word = "<=" if one.at_most else ">=", "met" if one.met else "MISSED"
        print(f"{one.name:38} {one.value:9.4g}   goal {side} {one.goal:g} {word:6}  against {one.peer}")


def best_seconds(
    tasks: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The shortest time of each task over `rounds` rounds through all of them, after one that is not counted."""
    best = dict.fromkeys(tasks, float("inf"))
    for count in range(rounds + 1):
        for name, task in tasks.items():
            start = clock()
            task()
            if count:
                best[name] = min(best[name], clock() - start)
    return best


def processor(used: int | None = None) -> str:
    """The processor, and how many of its cores are used (all unless told)."""
    cores = os.cpu_count()
    name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores" if used is None else f"{name}, {used} of {cores} cores"


def anonymous_memory(process: int | str = "self") -> int:
    """Anonymous resident memory of a process now, in bytes: heap, not the pages of mapped files. 0 when it has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_memory(command: Sequence[str]) -> int:
    """Run a command; the most anonymous memory it was seen to have, in bytes, asked every 5 ms."""
    peak = 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


class Used(NamedTuple):
    """What a process took: its most resident memory in bytes, pages of mapped files among it, and its seconds of processor time."""

    memory: int
    processor: float


def used_by(command: Sequence[object], folder: Path | None = None) -> Used:
    """Run a command, what it prints on stdout left out. subprocess.CalledProcessError: it failed."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return Used(used.ru_maxrss * 1024, used.ru_utime + used.ru_stime)
