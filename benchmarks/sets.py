"""Choosing a set against choosing single prompts, where a pool holds copies: does it pay to look at what the chosen have in common?

The demo's pool (`make demo` first), but in the families of both targets ten prompts stand eight times each, sampled each for itself, as
questions that differ in a word do in life. A tenth of the pool is chosen at the starting policy, by

* plain: `cropi-select`, each prompt by its own score;
* quota: the same, but every source gives its share of the pool;
* greedy: one prompt after another, so that the sum of the chosen gradients points towards the targets' mean gradients as well as it can
  (matching pursuit on sketches; the mean of the cosines with all targets);

and trained on for 25 steps. `distinct` is how many different questions are among the chosen.

    python benchmarks/sets.py                # 3 seeds: some minutes on two cores; what is there is kept
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from goals import processor

from cropi_tools.data.jsonl import Record, dump_line, read_jsonl
from cropi_tools.data.store import open_stores
from cropi_tools.selection.rules import shares, tie_key

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "runs" / "tiny"
TARGETS = ("reverse", "gcd")
COPIED, COPIES = 10, 8
SAMPLED = "-n 8 --max-tokens 8 --verifier exact"
TRAINED = "--steps 25 --batch 32 --learning-rate 1.5e-4 --betas 0.9,0.99 --eval-every 25 --eval-samples 2 --eval-temperature 1.0 --state drop"


def main() -> None:
    parser = argparse.ArgumentParser(description="Sets of prompts against single ones, on a pool with copies.")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of training")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "sets", help="where everything lies")
    options = parser.parse_args()
    if not (DEMO / "start" / "scores.jsonl").exists():
        sys.exit("sets.py: runs/tiny is not there; run `make demo` first")
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    pool = folder / "pool.jsonl"
    if not pool.exists():
        write(pool, with_copies([record for _, record in read_jsonl(DEMO / "data" / "pool.jsonl")]))
    prompts = {record["id"]: record for _, record in read_jsonl(pool)}
    scored(folder, pool)
    chosen = {"plain": plain(folder, pool), "quota": quota(folder, prompts), "greedy": greedy(folder, prompts)}
    print(f"{len(prompts)} prompts, {len(next(iter(chosen.values())))} chosen, {options.seeds} seeds, {processor()}")
    for name, ids in chosen.items():
        selected = folder / f"{name}.jsonl"
        write(selected, [prompts[one] for one in ids])
        found = [trained(folder, selected, name, seed) for seed in range(1, options.seeds + 1)]
        of_targets = sum(prompts[one]["source"] in TARGETS for one in ids) / len(ids)
        distinct = len({prompts[one]["prompt"] for one in ids})
        accuracy = 100 * np.array(found)
        print(
            f"{name:7} accuracy {accuracy.mean():5.1f} +- {accuracy.std(ddof=1):3.1f}  of the targets' families {of_targets:.2f}  "
            f"distinct {distinct}"
        )


def with_copies(records: Sequence[Record]) -> list[Record]:
    """The pool, in the targets' families with COPIED prompts COPIES times each in place of as many others."""
    found = []
    for source in dict.fromkeys(record["source"] for record in records):
        own = [record for record in records if record["source"] == source]
        if source in TARGETS:
            own.sort(key=lambda record: tie_key(0, record["id"]))
            kept = own[: len(own) - COPIED * (COPIES - 1)]
            copies = [{**one, "id": f"{one['id']}/{copy}"} for one in kept[:COPIED] for copy in range(1, COPIES)]
            own = kept + copies
        found += own
    return found


def write(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(dump_line(record) + "\n" for record in records))


def scored(folder: Path, pool: Path) -> None:
    """Rollouts, gradients with sketches, scores, and the sketches of the targets' means."""
    start = DEMO / "start"
    run(f"cropi-rollout --model {DEMO}/P0 {pool} {SAMPLED} -o {folder}/pool.rollouts.jsonl")
    against = " ".join(f"--against {name}={start}/valid-{name}.mean.safetensors" for name in TARGETS)
    run(f"cropi-grad --model {DEMO}/P0 {folder}/pool.rollouts.jsonl {against} --dim 4096 -o {folder}/grads.zarr")
    run(f"cropi-score {folder}/grads.zarr -o {folder}/scores.jsonl")
    for name in TARGETS:
        run(f"cropi-project {start}/valid-{name}.mean.safetensors --dim 4096 -o {folder}/{name}.sketch.zarr")


def run(line: str) -> None:
    """A command of this environment; what it says goes to stderr."""
    program, *words = line.split()
    subprocess.run([str(Path(sys.executable).parent / program), *words], check=True, stdout=sys.stderr)


def plain(folder: Path, pool: Path) -> list[str]:
    """What cropi-select takes."""
    run(f"cropi-select {folder}/scores.jsonl --prompts {pool} --ratio 0.1 -o {folder}/selected.jsonl")
    return [record["id"] for _, record in read_jsonl(folder / "selected.jsonl")]


def quota(folder: Path, prompts: Mapping[str, Record]) -> list[str]:
    """Of every source its share, by the mean score."""
    scores = {
        r["id"]: np.mean(list(r["scores"].values())) for _, r in read_jsonl(folder / "scores.jsonl") if r["scores"]
    }
    sources: dict[str, list[str]] = {}
    for name, record in prompts.items():
        sources.setdefault(record["source"], []).append(name)
    wanted = shares({source: len(ids) for source, ids in sources.items()}, len(prompts) // 10)
    found = []
    for source, ids in sources.items():
        live = sorted((one for one in ids if one in scores), key=lambda one: -scores[one])
        found += live[: wanted[source]]
    return found


def greedy(folder: Path, prompts: Mapping[str, Record]) -> list[str]:
    """One after another, whichever brings the sum nearest to the targets."""
    (store,) = open_stores([str(folder / "grads.zarr")])
    rows = np.concatenate([block for _, block in store.blocks()]).astype(np.float64)
    rows *= store.column("sketch_norm")[:, None].astype(np.float64)
    ids = [entry["id"] for entry in store.entries() if entry["row"] is not None]
    means = []
    for name in TARGETS:
        (sketch,) = open_stores([str(folder / f"{name}.sketch.zarr")])
        mean = np.concatenate([block for _, block in sketch.blocks()])[0].astype(np.float64)
        means.append(mean / np.linalg.norm(mean))
    directions = np.stack(means, 1)  # [dim, targets]
    products, squares = rows @ directions, (rows**2).sum(1)
    total, chosen = np.zeros(rows.shape[1]), []
    left = np.ones(len(rows), bool)
    for _ in range(len(prompts) // 10):
        norms = np.sqrt(np.maximum(total @ total + 2 * rows @ total + squares, 1e-30))
        gain = np.where(left, ((total @ directions + products) / norms[:, None]).mean(1), -np.inf)
        best = int(np.argmax(gain))
        left[best] = False
        total += rows[best]
        chosen.append(ids[best])
    return chosen


def trained(folder: Path, selected: Path, name: str, seed: int) -> float:
    """The mean accuracy on the targets after training."""
    tests = " ".join(f"--eval {target}={DEMO}/data/test.{target}.jsonl" for target in TARGETS)
    policy = folder / f"{name}-{seed}"
    os.environ["OMP_NUM_THREADS"] = "1"
    run(f"cropi-train --model {DEMO}/P0 {selected} {SAMPLED} {TRAINED} {tests} --seed {seed} -o {policy}")
    found: list[dict[str, Any]] = [json.loads(line) for line in (policy / "evaluations.jsonl").read_text().splitlines()]
    return float(np.mean([record["accuracy"] for record in found if record["step"] == 25]))


if __name__ == "__main__":
    main()
