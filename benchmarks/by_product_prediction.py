"""What scores that training makes on the side (`cropi-train --against`) add to the next stage's prediction.

For each seed the demo's starting policy (`make demo` first) is trained for 25 steps on a tenth that was chosen from a probe of a tenth, with
--against. The policy's exact scores of the whole pool are then what a second stage wants to know. They are predicted from a fresh probe of a
tenth, alone and with each kind of what is known: what the first stage measured, and what training made on the side.

    python benchmarks/by_product_prediction.py            # 3 seeds, some minutes on two cores; what is there is kept
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from goals import processor

from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.scores.rank_metrics import precision_at, spearman

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "runs" / "tiny"
TARGETS = ("reverse", "gcd")
POOL = DEMO / "data" / "pool.jsonl"
SAMPLED = "-n 8 --max-tokens 8 --verifier exact"
TRAINED = "--steps 25 --batch 32 --learning-rate 1.5e-4 --betas 0.9,0.99 --state drop"
WAYS = ("fresh probe alone", "and the first stage's scores", "and training's", "and both")


def main() -> None:
    parser = argparse.ArgumentParser(description="What by-products of training add to a prediction.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "by-product", help="where everything lies")
    options = parser.parse_args()
    if not (DEMO / "start" / "scores.jsonl").exists():
        sys.exit("by_product_prediction.py: runs/tiny is not there; run `make demo` first")
    os.environ["OMP_NUM_THREADS"] = "1"
    found = np.array([of_seed(options.folder / str(seed), seed) for seed in range(1, options.seeds + 1)])
    print(f"{options.seeds} seeds, means over seeds and targets, against exact scores of the whole pool; {processor()}")
    print(f"{'':30} precision@10 %  Spearman, prompts with a score")
    for name, (precision, rank) in zip(WAYS, found.mean(0), strict=True):
        print(f"{name:30} {precision:14.3f} {rank:9.3f}")


def of_seed(folder: Path, seed: int) -> list[tuple[float, float]]:
    """Precision and rank correlation of each way."""
    folder.mkdir(parents=True, exist_ok=True)
    features = folder / "features.safetensors"
    run(f"cropi-embed --model {DEMO}/P0 {POOL} -o {features}")
    means = {name: DEMO / "start" / f"valid-{name}.mean.safetensors" for name in TARGETS}
    first = measured(folder / "first", DEMO / "P0", means, 1000 * seed)
    predicting = f"cropi-score --predict {POOL} --features {features} --if-weak warn"
    run(f"{predicting} {first} -o {folder}/first.scores.jsonl")
    selected, policy = folder / "selected.jsonl", folder / "policy"
    run(f"cropi-select {folder}/first.scores.jsonl --prompts {POOL} --among all --ratio 0.1 -o {selected}")
    # training adds up tokens, and so does what it tells on the side
    as_trained = {name: folder / f"{name}.trained.safetensors" for name in TARGETS}
    for name, mean in as_trained.items():
        run(
            f"cropi-grad --model {DEMO}/P0 {DEMO}/start/valid-{name}.rollouts.jsonl --mean --aggregation token -o {mean}"
        )
    run(f"cropi-train --model {DEMO}/P0 {selected} {SAMPLED} {TRAINED} {against(as_trained)} --seed {seed} -o {policy}")
    now = {name: folder / f"{name}.mean.safetensors" for name in TARGETS}
    for name, mean in now.items():
        run(f"cropi-grad --model {policy} {DEMO}/start/valid-{name}.rollouts.jsonl --mean -o {mean}")
    run(f"cropi-rollout --model {policy} {POOL} {SAMPLED} --seed {seed} -o {folder}/pool.rollouts.jsonl")
    run(f"cropi-grad --model {policy} {folder}/pool.rollouts.jsonl {against(now)} --dim 64 -o {folder}/exact.zarr")
    run(f"cropi-score {folder}/exact.zarr -o {folder}/exact.jsonl")
    second = measured(folder / "second", policy, now, 1000 * seed + 1)
    known = f"--old {folder}/first.scores.jsonl", f"--old {policy}/influence.jsonl"
    rows = []
    for number, old in enumerate(("", known[0], known[1], " ".join(known[::-1]))):
        run(f"{predicting} {second} {old} -o {folder}/predicted-{number}.jsonl")
        rows.append(agreement(folder / f"predicted-{number}.jsonl", folder / "exact.jsonl"))
    return rows


def measured(place: Path, policy: Path, means: dict[str, Path], seed: int) -> Path:
    """Gradients of a random tenth under a policy."""
    run(f"cropi-select --prompts {POOL} --by random --per-source --ratio 0.1 --seed {seed} -o {place}.jsonl")
    run(f"cropi-rollout --model {policy} {place}.jsonl {SAMPLED} --seed {seed} -o {place}.rollouts.jsonl")
    run(f"cropi-grad --model {policy} {place}.rollouts.jsonl {against(means)} --dim 64 -o {place}.zarr")
    return Path(f"{place}.zarr")


def against(means: dict[str, Path]) -> str:
    return " ".join(f"--against {name}={path}" for name, path in means.items())


def agreement(predicted: Path, exact: Path) -> tuple[float, float]:
    """Of the prompts that were not measured; one without a score is last in the exact ranking."""
    known = {record["id"]: record["scores"] for _, record in read_jsonl(exact)}
    records = [record for _, record in read_jsonl(predicted) if not record["measured"]]
    precisions, ranks = [], []
    for name in TARGETS:
        found = np.array([record["scores"][name] for record in records])
        truth = np.array([(known[record["id"]] or {name: -np.inf})[name] for record in records])
        precisions.append(precision_at(found, truth))
        live = np.isfinite(truth)
        ranks.append(spearman(found[live], truth[live]))
    return float(np.mean(precisions)), float(np.mean(ranks))


def run(line: str) -> None:
    """A command of this environment; what it says goes to stderr."""
    program, *words = line.split()
    subprocess.run([str(Path(sys.executable).parent / program), *words], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
