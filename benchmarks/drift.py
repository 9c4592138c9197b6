"""How long do old rollouts rank prompts as fresh ones would? Every importance weighting over the steps of training, drawn.

The policies are those of the full pool's arm on bed (a) of `make reproduce`, after each of its stages. At each of them the pool is ranked

* by its own fresh rollouts (of pool and validation prompts), twice with independent draws: how well these two agree is the ceiling, and
  once more with disjoint halves of the validation prompts, so that their choice is in the noise as well;
* by the starting policy's rollouts under every weighting, as CROPI does, and by the scores that the starting policy had (static).

The figure is the overlap of the top tenths: of the tenth of the pool that the one ranking puts first, how many the other one does, the mean
over targets and seeds. Prompts without a gradient are in no ranking.

    python benchmarks/reproduce/run.py --beds families --seeds 3      # first: the policies and the old rollouts
    python benchmarks/drift.py --seeds 3 --figure docs/results/drift.png
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from reproduce.warm import Warm

from cropi_tools.data.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "reproduce" / "families"
DATA = ROOT / "runs" / "reproduce" / "tiny" / "data"
WORK = ROOT / "runs" / "drift"
TARGETS = ("reverse", "gcd")
STAGES, STAGE_STEPS, RATIO = 4, 25, 0.1
WEIGHTINGS: dict[str, tuple[str, ...]] = {
    "none": ("--weighting", "none"),
    "token (the paper's)": ("--weighting", "token"),
    "token, clipped to .8-1.2": ("--weighting", "token", "--weight-clip", "0.8,1.2"),
    "prefix": ("--weighting", "prefix"),
    "suffix": ("--weighting", "suffix"),
    "trajectory": ("--weighting", "trajectory"),
    "sequence": ("--weighting", "sequence"),
}
STATIC, CEILING, HALVES = "scores of the start", "fresh against fresh", "and other validation prompts"
COLORS = {
    "none": "#8a8a8a",
    "token (the paper's)": "#d55e00",
    "token, clipped to .8-1.2": "#e69f00",
    "prefix": "#0072b2",
    "suffix": "#56b4e9",
    "trajectory": "#cc79a7",
    "sequence": "#009e73",
    STATIC: "#333333",
    CEILING: "#000000",
    HALVES: "#000000",
}


class Place(NamedTuple):
    """A policy of a run, and where its rankings are made."""

    seed: int
    stage: int

    @property
    def policy(self) -> Path:
        return RUNS / str(self.seed) / "full" / str(self.seed) / str(self.stage) / "policy"

    @property
    def start(self) -> Path:
        return RUNS / str(self.seed) / "start"

    @property
    def folder(self) -> Path:
        return WORK / str(self.seed) / str(self.stage)


class Commands:
    """The commands, with everything imported; what is there already they leave as it is."""

    def __init__(self, warm: Warm) -> None:
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": warm.path}

    def __call__(self, name: str, *words: object, output: Path) -> Path:
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [name, *map(str, words), "-o", str(output), "--quiet"]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description="Rankings from old rollouts against fresh ones, over training.")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of bed (a)")
    parser.add_argument("--figure", type=Path, help="draw it")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    places = [Place(seed, stage) for seed in range(1, options.seeds + 1) for stage in range(1, STAGES + 1)]
    absent = next((place.policy for place in places if not (place.policy / "manifest.json").exists()), None)
    if absent:
        sys.exit(
            f"drift.py: {absent.relative_to(ROOT)} is not there; run benchmarks/reproduce/run.py --beds families first"
        )
    with Warm(WORK) as warm, ThreadPoolExecutor(2) as pool:
        commands = Commands(warm)
        found = list(pool.map(lambda place: dict(overlaps(place, commands)), places))
    curves = {
        name: {
            stage * STAGE_STEPS: [one[name] for place, one in zip(places, found, strict=True) if place.stage == stage]
            for stage in range(1, STAGES + 1)
        }
        for name in (*WEIGHTINGS, STATIC, CEILING, HALVES)
    }
    if options.json:
        print(json.dumps(curves))
    else:
        show(curves)
    if options.figure:
        draw(curves, options.figure, options.seeds)


def overlaps(place: Place, commands: Commands) -> Iterator[tuple[str, float]]:
    """(name, overlap with the first fresh ranking), the mean over targets."""
    fresh = [ranking(place, commands, f"fresh-{draw}", fresh_rollouts(place, commands, draw)) for draw in (1, 2)]
    yield CEILING, overlap(*fresh)
    halves = [ranking(place, commands, f"half-{draw}", half_rollouts(place, commands, draw)) for draw in (1, 2)]
    yield HALVES, overlap(*halves)
    old = {
        "train": place.start / "train.rollouts.jsonl",
        **{name: place.start / f"valid-{name}.rollouts.jsonl" for name in TARGETS},
    }
    for number, (name, words) in enumerate(WEIGHTINGS.items()):
        yield name, overlap(ranking(place, commands, f"old-{number}", old, words), fresh[0])
    yield STATIC, overlap(scores_of(place.start / "scores.jsonl"), fresh[0])


def fresh_rollouts(place: Place, commands: Commands, draw: int) -> dict[str, Path]:
    """Rollouts of pool and validation prompts by the policy itself."""
    files = {"train": (DATA / "pool.jsonl", 8), **{name: (DATA / f"valid.{name}.jsonl", 16) for name in TARGETS}}
    return {
        name: commands(
            "cropi-rollout",
            *("--model", place.policy, prompts, "-n", samples, "--max-tokens", 8, "--verifier", "exact"),
            *("--seed", 1000 * draw + number),
            output=place.folder / f"fresh-{draw}" / f"{name}.rollouts.jsonl",
        )
        for number, (name, (prompts, samples)) in enumerate(files.items())
    }


def half_rollouts(place: Place, commands: Commands, draw: int) -> dict[str, Path]:
    """The same rollouts with every other validation prompt left out: the even ones of one draw, the odd ones of the other."""
    found = fresh_rollouts(place, commands, draw)
    for name in TARGETS:
        whole, half = found[name], place.folder / f"half-{draw}" / f"{name}.rollouts.jsonl"
        half.parent.mkdir(parents=True, exist_ok=True)
        lines = whole.read_text().splitlines(keepends=True)[draw % 2 :: 2]
        if not half.exists() or half.read_text() != "".join(lines):
            half.write_text("".join(lines))
        found[name] = half
    return found


def ranking(
    place: Place, commands: Commands, name: str, rollouts: Mapping[str, Path], words: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Exact scores of the pool on every target, by id."""
    folder = place.folder / name
    means = {
        target: commands(
            "cropi-grad",
            "--model",
            place.policy,
            rollouts[target],
            "--mean",
            *words,
            output=folder / f"{target}.safetensors",
        )
        for target in TARGETS
    }
    against = [word for target, mean in means.items() for word in ("--against", f"{target}={mean}")]
    store = commands(
        "cropi-grad",
        "--model",
        place.policy,
        rollouts["train"],
        *against,
        "--dim",
        64,
        *words,
        output=folder / "grads.zarr",
    )
    return scores_of(commands("cropi-score", store, output=folder / "scores.jsonl"))


def scores_of(path: Path) -> dict[str, dict[str, float]]:
    """By target and id, prompts without a score left out; `all` has every id."""
    found: dict[str, dict[str, float]] = {target: {} for target in TARGETS}
    everyone: dict[str, float] = {}
    for _, record in read_jsonl(path):
        everyone[record["id"]] = 0.0
        for target, score in (record["scores"] or {}).items():
            found[target][record["id"]] = score
    return {**found, "all": everyone}


def overlap(one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]) -> float:
    """The share of the top tenth of the pool that two rankings have in common, the mean over targets."""
    size = int(RATIO * len(one["all"]))
    tops = [
        [set(sorted(scores[target], key=lambda name: -scores[target][name])[:size]) for target in TARGETS]
        for scores in (one, other)
    ]
    return float(np.mean([len(a & b) / size for a, b in zip(*tops, strict=True)]))


def show(curves: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    steps = list(next(iter(curves.values())))
    print("| ranked by | " + " | ".join(f"step {step}" for step in steps) + " |")
    print("|---|" + "---|" * len(steps))
    for name, curve in curves.items():
        print(f"| {name} | " + " | ".join(f"{np.mean(curve[step]):.2f}" for step in steps) + " |")


def draw(curves: Mapping[str, Mapping[int, Sequence[float]]], path: Path, seeds: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        style = {CEILING: "--", HALVES: ":", STATIC: "-."}.get(name, "-")
        axes.plot(
            list(curve),
            [np.mean(values) for values in curve.values()],
            style,
            color=COLORS[name],
            label=name,
            marker="o",
            markersize=3.5,
        )
    axes.set_xticks([stage * STAGE_STEPS for stage in range(1, STAGES + 1)])
    axes.set_ylim(0, 1)
    axes.set_xlabel("training steps since the old rollouts")
    axes.set_ylabel("overlap with the fresh top tenth")
    axes.set_title(f"Rankings from the starting policy's rollouts, full pool, {seeds} seeds", fontsize=10.5)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
