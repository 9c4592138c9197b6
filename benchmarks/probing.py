"""What scoring a tenth of the pool and predicting the rest keeps of CROPI's gain, and what it costs: `PROBE` against scoring all of it.

Two beds, both of the demo's starting policy and targets (`make demo` first): its pool as it is, and with wrong references for 40 % of the
prompts (wrong_references.py), where a prediction alone cannot do. Arms: random, full, complete (CROPI that scores the whole pool) and cropi
(probing). Everything goes through `make curriculum`, so it resumes when it was stopped, and every figure is cropi-report's:

* gain kept: (cropi - random) / (complete - random), final accuracy on the targets, with a bootstrap interval over the seeds;
* selection work: seconds of work (starting apart) spent on sampling, scoring, predicting and selecting, cropi's as a share of complete's;
* steps and seconds to the accuracy that full ends with, full's against cropi's, what selection costs included.

    python benchmarks/probing.py                     # both beds, 5 seeds: about half an hour on two cores
    python benchmarks/probing.py --json              # one object a goal
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from goals import Goal, print_json, print_lines, processor
from wrong_references import corrupt

from cropi_tools.data.jsonl import read_jsonl

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "tiny" / "config.mk"
DEMO = ROOT / "runs" / "tiny"
ARMS = "random full complete cropi"
SHORTLISTS = {"clean": "0", "wrong": "1"}
"""The shortlist of each bed: references that may be wrong have to be confirmed."""
GAIN_KEPT, SELECTION_WORK, FEWER_STEPS, FEWER_SECONDS = 0.95, 0.2, 3.0, 1.5
BOOTSTRAPS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description="Probing a part of the pool against scoring all of it.")
    parser.add_argument("--beds", nargs="+", default=list(SHORTLISTS), choices=list(SHORTLISTS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every arm")
    parser.add_argument("--probe", default="0.1", help="share of the pool that a stage measures")
    parser.add_argument("--shortlist", help="prompts confirmed, in selections; for both beds")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "probing", help="where the runs lie")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    if not (DEMO / "P0" / "manifest.json").exists():
        sys.exit("probing.py: runs/tiny/P0 is not there; run `make demo` first")
    goals = []
    for bed in options.beds:
        shortlist = options.shortlist or SHORTLISTS[bed]
        run = options.folder / bed
        values = {
            "PROBE": options.probe,
            "SHORTLIST": shortlist,
            "SEEDS": " ".join(map(str, range(1, options.seeds + 1))),
        }
        if bed == "wrong":
            values["POOL"] = str(wrong_pool(options.folder))
        report = curriculum(run, values)
        if not options.json:
            print_bed(bed, values, report, run)
        goals += judged(bed, report)
    if options.json:
        print_json(goals, processor())
    else:
        print_lines(goals)


def wrong_pool(folder: Path) -> Path:
    """The pool with wrong references, by the rollouts of the demo's starting policy."""
    made = corrupt(DEMO / "data" / "pool.jsonl", DEMO / "start" / "train.rollouts.jsonl", folder / "wrong-pool")
    return made.pool


def curriculum(run: Path, values: Mapping[str, str]) -> dict[str, Any]:
    """All arms and seeds of a run, two at a time; the report as JSON."""
    given = [f"{name}={value}" for name, value in {"RUN": str(run), "ARMS": ARMS, **values}.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["make", "--no-print-directory", "-s", "-j2", f"CONFIG={CONFIG}", *given, "curriculum"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    said = subprocess.run(
        ["cropi-report", str(run), "--json"], env={**environment, "PATH": path()}, check=True, capture_output=True
    )
    report: dict[str, Any] = json.loads(said.stdout)
    return report


def path() -> str:
    """The commands of this environment first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def judged(bed: str, report: Mapping[str, Any]) -> list[Goal]:
    """The bed's figures against their goals."""
    kept, _, _ = gain_kept(report)
    work = selection_work(report)
    goals = [
        Goal(f"probing-gain-kept-{bed}", kept, GAIN_KEPT, "CROPI that scores the whole pool"),
        Goal(
            f"probing-selection-work-{bed}", work["cropi"] / work["complete"], SELECTION_WORK, "the same", at_most=True
        ),
    ]
    if bed == "wrong":
        speed = report["arms"]["cropi"]["speed"]
        goals += [
            Goal(f"probing-steps-{bed}", speed["steps"]["ratio"] or 0.0, FEWER_STEPS, "the full pool's final accuracy"),
            Goal(
                f"probing-seconds-{bed}",
                speed["seconds"]["ratio"] or 0.0,
                FEWER_SECONDS,
                "the same, selecting included",
            ),
        ]
    return goals


def gain_kept(report: Mapping[str, Any]) -> tuple[float, float, float]:
    """What probing keeps of the gain over random, and its 95 % bootstrap interval over seeds."""
    by_seed = [report["arms"][arm]["difference"]["by_seed"] for arm in ("cropi", "complete")]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    gains = np.array([[gain[seed] for seed in seeds] for gain in by_seed])
    draws = np.random.default_rng(0).integers(len(seeds), size=(BOOTSTRAPS, len(seeds)))
    drawn = gains[:, draws].mean(-1)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return float(gains[0].mean() / gains[1].mean()), float(low), float(high)


def selection_work(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of work spent on selecting, a seed, by arm."""
    costs = {arm: report["arms"][arm]["cost"]["mean_of_one_seed"] for arm in ("cropi", "complete")}
    return {arm: sum(cost[part]["seconds"] or 0.0 for part in ("sampling", "scoring")) for arm, cost in costs.items()}


def wrong_chosen(run: Path, arm: str, wrong: frozenset[str]) -> float:
    """The share of the prompts selected that have a wrong reference."""
    chosen = [
        record["id"] in wrong
        for path in sorted(run.glob(f"{arm}/*/*/selected.jsonl"))
        for _, record in read_jsonl(path)
    ]
    return float(np.mean(chosen))


def print_bed(bed: str, values: Mapping[str, str], report: Mapping[str, Any], run: Path) -> None:
    """A table of the bed's arms, and what follows from it."""
    wrong = (
        frozenset(record["id"] for _, record in read_jsonl(run.parent / "wrong-pool" / "wrong.jsonl"))
        if bed == "wrong"
        else None
    )
    print(f"\n{bed}: PROBE={values['PROBE']} SHORTLIST={values['SHORTLIST']}, {values['SEEDS'].count(' ') + 1} seeds")
    for arm, found in report["arms"].items():
        cost = found["cost"]["mean_of_one_seed"]
        selecting = sum(cost[part]["seconds"] or 0.0 for part in ("sampling", "scoring"))
        mid = dict(map(tuple, found["curve"])).get(found["step"] // 2)
        share = "" if wrong is None else f"  wrong references {wrong_chosen(run, arm, wrong):.2f}"
        speed = found.get("speed") or {}
        said = "".join(
            f"  {unit} {speed[unit]['in_words']} {speed[unit]['interval']}"
            for unit in ("steps", "seconds")
            if unit in speed
        )
        final = found["target"]
        print(
            f"{arm:9} half-way {100 * (mid or float('nan')):5.1f}  final {100 * final['mean']:5.1f} +- {100 * final['spread']:4.1f}  "
            f"selecting {selecting:6.2f} s  training {cost['training']['seconds']:6.2f} s{share}{said}"
        )
    kept, low, high = gain_kept(report)
    work = selection_work(report)
    print(f"gain kept {kept:.2f} [{low:.2f}, {high:.2f}], selection work {work['cropi'] / work['complete']:.2f}")


if __name__ == "__main__":
    main()
