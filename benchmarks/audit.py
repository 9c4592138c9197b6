"""How well influence finds wrong reference answers: the demo's pool with 40 % of them wrong, where which are wrong is known.

For each seed a share of the pool's references becomes the policy's own most frequent wrong answer (wrong_references.py); gradients of the
starting policy by halves and `cropi-score --suspects` follow, as a user would run them. Ways to find the wrong ones are compared by the area
under the curve (AUC, the chance that a wrong one looks more suspicious than a right one), over the prompts that have a gradient: the
score; z, the score over its noise; the pass rate, where low is suspicious; and disagreement, by how much the share of the policy's most
frequent answer passes that of the reference. Within a target's family its own score counts, over the whole pool the lowest of all targets.

    python benchmarks/audit.py             # the demo's starting policy, pool and validation sets, made in --work
    python benchmarks/audit.py --json      # one object a goal
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fidelity import ROOT, call, demo
from goals import Goal, print_json, print_lines, processor
from scipy.stats import rankdata
from wrong_references import SHARE, corrupt

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.data.records import read_rollouts
from cropi_tools.data.store import Store
from cropi_tools.rewards.answers import most_frequent
from cropi_tools.scores.suspects import LEVEL, Audit, audit

GOAL, POOL = 0.9, "whole pool"
DETECTORS = ("score", "z", "pass rate", "disagreement")


class Prompt(NamedTuple):
    """A prompt with a gradient: whether its reference is wrong, whether it is listed, whether its score is below zero by more than noise on any
    set, of its kind or not, and how suspicious each detector finds it, by set."""

    source: str
    wrong: bool
    listed: bool
    below: bool
    suspicion: dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Wrong reference answers found by influence.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "audit", help="folder for what is made, kept")
    parser.add_argument("--seeds", type=int, default=5, help="choices of the references that are wrong")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    runtime.set_quiet(True)
    options.work.mkdir(parents=True, exist_ok=True)
    policy, rollouts, valid = demo(options.work)
    means = means_by_halves(options.work, policy, valid)
    found = [prompts(options.work, policy, rollouts, means, seed) for seed in range(options.seeds)]
    report(found, list(means), options.json)


def means_by_halves(work: Path, policy: str, valid: Sequence[str]) -> dict[str, str]:
    """The mean gradients of the validation sets, by name; what is there is kept."""
    means = {}
    for path in valid:
        name = Path(path).name.split(".")[0].removeprefix("valid-")
        means[name] = str(work / f"{name}.halves.safetensors")
        call("cropi-grad", "--model", policy, path, "--mean", "--halves", "-o", means[name])
    return means


def prompts(work: Path, policy: str, rollouts: str, means: dict[str, str], seed: int) -> list[Prompt]:
    """The prompts of a pool with wrong references, audited."""
    made = corrupt(work / "data" / "pool.jsonl", rollouts, work / f"wrong-{seed}", SHARE, seed)
    store, listed = made.pool.with_name("grads.zarr"), made.pool.with_name("suspects.jsonl")
    against = [word for name, path in means.items() for word in ("--against", f"{name}={path}")]
    call("cropi-grad", "--model", policy, str(made.rollouts), *against, "--halves", "--dim", "512", "-o", str(store))
    call("cropi-score", str(store), "--suspects", str(made.rollouts), "-o", str(listed))
    suspects = {json.loads(line)["id"] for line in listed.read_text().splitlines()}
    wrong = {record["id"] for record in made.changed}
    records = {rollout.id: rollout.record for rollout in read_rollouts([made.rollouts])}
    found = audit([Store(store)])
    return [
        Prompt(
            record["source"],
            record["id"] in wrong,
            record["id"] in suspects,
            bool((found.p[place] <= LEVEL).any()),
            suspicion(found, place, records),
        )
        for place, record in enumerate(found.records)
    ]


def suspicion(found: Audit, place: int, records: dict[str, Record]) -> dict[str, dict[str, float]]:
    """How suspicious each detector finds a prompt, on each set and over all."""
    scored = found.records[place]
    record = records[scored["id"]]
    usual = most_frequent(record, record["samples"])
    assert usual is not None
    other = usual.samples / len(record["samples"]) - scored["pass_rate"]
    score = -found.scores[place]
    z = score / found.deviations[place]
    alone = {"pass rate": -scored["pass_rate"], "disagreement": other}
    by_set = {name: {"score": score[n], "z": z[n], **alone} for n, name in enumerate(found.names)}
    return {**by_set, POOL: {"score": score.max(), "z": z.max(), **alone}}


def area(values: Sequence[float], wrong: Sequence[bool]) -> float:
    """The chance that a wrong one has a larger value than a right one; equal values count one half."""
    ranks, is_wrong = rankdata(values), np.array(wrong)
    bad, good = int(is_wrong.sum()), int((~is_wrong).sum())
    return float((ranks[is_wrong].sum() - bad * (bad + 1) / 2) / (bad * good))


def areas(found: Sequence[Prompt], name: str, detector: str) -> float:
    """The AUC of a detector within a target's family, or over the pool."""
    some = [prompt for prompt in found if name in (POOL, prompt.source)]
    return area([prompt.suspicion[name][detector] for prompt in some], [prompt.wrong for prompt in some])


def report(found: Sequence[Sequence[Prompt]], names: Sequence[str], as_json: bool) -> None:
    """Print the table, or the goals."""
    table = {
        (name, detector): [areas(prompts, name, detector) for prompts in found]
        for name in (*names, POOL)
        for detector in DETECTORS
    }
    average = {key: statistics.mean(values) for key, values in table.items()}
    best = max(average[name, "z"] for name in names)
    margin = min(average[name, "z"] - max(average[name, other] for other in DETECTORS[2:]) for name in names)
    goals = [
        Goal("audit-auc-best-family", best, GOAL, "a coin: 0.5"),
        Goal("audit-auc-margin-worst-family", margin, 0.0, "pass rate and disagreement, the better"),
    ]
    if as_json:
        print_json(goals, f"{processor()}; mean of {len(found)} seeds")
        return
    print(f"AUC of wrong references, mean of {len(found)} seeds [lowest, highest]")
    print(f"{'':12}" + "".join(f"{detector:>24}" for detector in DETECTORS))
    for name in (*names, POOL):
        cells = [table[name, detector] for detector in DETECTORS]
        print(f"{name:12}" + "".join(f"{spread(values):>24}" for values in cells))
    print(
        f"\n{'':12}"
        + "".join(f"{heading:>24}" for heading in ("live", "wrong", "listed", "wrong among these", "of all wrong"))
    )
    for name in (*names, POOL):
        print(f"{name:12}" + counted(found, name, lambda prompt: prompt.listed))
    print("all below zero by more than noise, of the target's kind or not:")
    print(f"{POOL:12}" + counted(found, POOL, lambda prompt: prompt.below))
    print()
    print_lines(goals)


def counted(found: Sequence[Sequence[Prompt]], name: str, listed: Callable[[Prompt], bool]) -> str:
    """How many prompts of a family are listed and how many of these are wrong, over the seeds."""
    some = [[prompt for prompt in one if name in (POOL, prompt.source)] for one in found]

    def share(of: Callable[[Prompt], bool], among: Callable[[Prompt], bool]) -> str:
        parts = [[of(prompt) for prompt in one if among(prompt)] for one in some]
        return spread([statistics.mean(part) if part else float("nan") for part in parts])

    cells = (
        spread([float(len(one)) for one in some]),
        share(lambda prompt: prompt.wrong, lambda prompt: True),
        spread([float(sum(map(listed, one))) for one in some]),
        share(lambda prompt: prompt.wrong, listed),
        share(listed, lambda prompt: prompt.wrong),
    )
    return "".join(f"{cell:>24}" for cell in cells)


def spread(values: Sequence[float]) -> str:
    """`0.955 [0.941, 0.962]`."""
    return f"{statistics.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
