"""Run the comparison of plan.toml: every bed and seed, two at a time, and keep what came out.

A unit is one seed of a bed, all its arms: `make curriculum` with the bed's config, a run folder in runs/reproduce, and at its end a record
in docs/results/reproduce, which holds every evaluation of every arm with what had been spent by then. A unit with a record is done. Killed,
the same command goes on where it was; nothing that is finished is made again.

    python benchmarks/reproduce/run.py                          # all of it: hours on two cores
    python benchmarks/reproduce/run.py --beds families --seeds 2
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from plan import PLAN, RECORDS, ROOT, Bed, read_plan, record_path, rounded
from warm import CLOCK, Warm

sys.path.insert(0, str(ROOT / "benchmarks"))
from goals import processor

from cropi_tools.data.jsonl import read_jsonl

WORK = ROOT / "runs" / "reproduce"
AT_ONCE = 2
RUNNING: list[subprocess.Popen[bytes]] = []
STOPPING = Event()
WARM: list[Warm] = []


class Unit(NamedTuple):
    """One seed of a bed."""

    bed: Bed
    seed: int

    @property
    def name(self) -> str:
        return f"{self.bed.name} {self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the comparison of plan.toml.")
    beds = read_plan()
    parser.add_argument("--beds", nargs="+", default=list(beds), choices=list(beds))
    parser.add_argument("--seeds", type=int, help="seeds of each bed (default: as planned)")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help=f"units at once, a core each (default {AT_ONCE})")
    options = parser.parse_args()
    chosen = [beds[name] for name in options.beds]
    units = [
        Unit(bed, seed)
        for seed in range(1, 1 + max(bed.seeds for bed in chosen))
        for bed in chosen
        if seed <= min(options.seeds or bed.seeds, bed.seeds)
    ]
    left = [unit for unit in units if not record_path(unit.bed.name, unit.seed).exists()]
    say(f"{len(units) - len(left)} of {len(units)} units have their record in {RECORDS.relative_to(ROOT)}")
    if not left:
        return
    WORK.mkdir(parents=True, exist_ok=True)
    RECORDS.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with Warm(WORK) as warm:
        WARM.append(warm)
        kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        environment = {**kept, "OMP_NUM_THREADS": "1", "PATH": warm.path}
        words = [f"VENV={warm.folder}"]
        # what several units share comes first, one after another
        for unit in {(unit.bed.name, unit.bed.shared_by(unit.seed)): unit for unit in left}.values():
            if make(unit, "starting-policy", words, environment):
                sys.exit(f"run.py: {unit.name}: the starting policy was not made; see {log_of(unit)}")
        with ThreadPoolExecutor(options.at_once) as pool:
            failed = [
                unit.name
                for unit, fine in zip(
                    left, pool.map(lambda unit: complete(unit, words, environment), left), strict=True
                )
                if not fine
            ]
    if failed:
        sys.exit(f"run.py: failed: {', '.join(failed)}")


def complete(unit: Unit, words: Sequence[str], environment: dict[str, str]) -> bool:
    """Run a unit to its end and write its record."""
    if STOPPING.is_set() or not WARM[0].alive:
        return False
    begun = time.monotonic()
    if code := make(unit, "curriculum", words, environment):
        say(f"{unit.name}: make ended with {code}; see {log_of(unit)}")
        return False
    try:
        write_record(unit)
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
        say(f"{unit.name}: no record: {error}")
        return False
    say(f"{unit.name}: {time.monotonic() - begun:.0f} s")
    return True


def make(unit: Unit, target: str, words: Sequence[str], environment: dict[str, str]) -> int:
    command = ["make", "--no-print-directory", f"CONFIG={unit.bed.config}", f"SEED={unit.seed}", *words, target]
    with open(log_of(unit), "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, CLOCK: unit.bed.clock},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        RUNNING.append(process)
        while (code := process.poll()) is None:  # `wait` would hold a lock that `stop` needs
            time.sleep(0.2)
        return code


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End with everything that was started: the same command goes on from there."""
    STOPPING.set()
    for process in RUNNING:
        if process.poll() is None:
            process.terminate()
    for process in RUNNING:
        process.wait()
    for warm in WARM:
        warm.close()
    os._exit(128 + number)


def log_of(unit: Unit) -> Path:
    return WORK / f"{unit.bed.name}-{unit.seed}.log"


def write_record(unit: Unit) -> None:
    """What cropi-report says of the unit's run, as far as the analysis reads it."""
    run = WORK / unit.bed.name / str(unit.seed)
    said = subprocess.run(
        [Path(sys.executable).with_name("cropi-report"), run, "--json", "--quiet"], check=True, capture_output=True
    )
    report: dict[str, Any] = json.loads(said.stdout)
    record = {
        "bed": unit.bed.name,
        "seed": unit.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "device": processor(),
        "command": f"make curriculum CONFIG={unit.bed.config} SEED={unit.seed}",
        "plan": PLAN.name,
        "clock": unit.bed.clock,
        "arms": {
            name: {
                "points": found["points"][str(unit.seed)],
                "cost": found["cost"]["by_seed"][str(unit.seed)],
                "selected": selected(unit, run / name / str(unit.seed)),
            }
            for name, found in report["arms"].items()
        },
    }
    path = record_path(unit.bed.name, unit.seed)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rounded(record, 6), separators=(",", ":")) + "\n")
    os.replace(part, path)


def selected(unit: Unit, arm: Path) -> list[dict[str, int]]:
    """By stage how many prompts an arm chose, how many of the targets' sources, and how many with a wrong reference."""
    wrong: set[str] = set()
    if unit.bed.wrong_references:
        wrong = {record["id"] for _, record in read_jsonl(ROOT / unit.bed.wrong_references.format(seed=unit.seed))}
    stages = []
    for path in sorted(arm.glob("*/selected.jsonl"), key=lambda path: int(path.parent.name)):
        records = [record for _, record in read_jsonl(path)]
        of_targets = sum(record["source"] in unit.bed.targets for record in records)
        of_wrong = sum(record["id"] in wrong for record in records)
        stages.append({"prompts": len(records), "targets": of_targets, "wrong": of_wrong})
    return stages


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


if __name__ == "__main__":
    main()
