"""What a curriculum will take: `make estimate CONFIG=FILE`.

A few prompts, spread evenly over the pool and the validation sets, go through every command in a temporary folder: rollouts and means
are really made of them, the rest is told by `--dry-run`. Their figures are added up over stages, arms and seeds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools.data.jsonl import dump_line, read_jsonl
from cropi_tools.runtime.estimate import evenly, in_bytes, in_seconds
from cropi_tools.selection.rules import RULES_BY_PASS_RATE

PROBE_RESPONSES = 256  # of the pool, and of each validation set
START = 4.0  # seconds that a command takes to start, where none is really run
LIGHT = 0.3  # the same of cropi-score and cropi-select, which load no torch
NOT_SAMPLED = ("full", "random")
NOT_SCORED = (*NOT_SAMPLED, *RULES_BY_PASS_RATE)  # the last read rollouts of the pool alone
RESCORED = ("cropi", "complete", "shuffled")  # the arms that score every stage again
COLUMNS = ("sampling", "gradients", "scores", "training", "loading")


class Cost(NamedTuple):
    """Seconds of each kind of work, tokens generated, bytes on disk."""

    sampling: float = 0.0
    gradients: float = 0.0
    scores: float = 0.0
    training: float = 0.0
    loading: float = 0.0
    tokens: float = 0.0
    disk: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """Both, one after the other."""
        return Cost(*(mine + its for mine, its in zip(self, other, strict=True)))

    def times(self, count: float) -> Cost:
        """So many of it."""
        return Cost(*(value * count for value in self))

    @property
    def seconds(self) -> float:
        """Of all kinds."""
        return sum(self[: len(COLUMNS)])


class Parts(NamedTuple):
    """What the arms are put together from: sampling and scoring the pool, the same for the targets, a stage's training.

    refreshing: sampling again before a later stage. share: of the pool that a stage measures where it probes; 0: none probes.
    """

    training: Cost
    sampling: Cost = Cost()
    scoring: Cost = Cost()
    targets: Cost = Cost()
    means: Cost = Cost()
    refreshing: Cost = Cost()
    share: float = 0.0

    def probes(self, name: str) -> bool:
        """Whether an arm measures a part of the pool at every stage."""
        return name == "cropi" and self.share > 0

    def once(self, arms: Sequence[str]) -> Cost:
        """What is made once for all arms."""
        scored = [arm for arm in arms if arm not in NOT_SCORED]
        whole = not all(map(self.probes, scored))
        found = self.targets.plus(self.means) if scored else Cost()
        if whole or any(arm in RULES_BY_PASS_RATE for arm in arms):
            found = found.plus(self.sampling)
        return found.plus(self.scoring) if whole else found

    def arm(self, name: str, stages: int) -> Cost:
        """A seed of an arm, without what is made once for all arms."""
        found = self.training.times(stages)
        if name in RESCORED:
            found = found.plus(self.means.times(stages - 1))
        if self.probes(name):
            measured = self.sampling.plus(self.scoring).times(self.share)
            # probe and shortlist are commands of their own
            return found.plus(
                measured._replace(loading=2 * (self.sampling.loading + self.scoring.loading)).times(stages)
            )
        return found.plus(self.scoring.plus(self.refreshing).times(stages - 1)) if name in RESCORED else found


def main() -> None:
    """Print the table."""
    asked = parsed()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            parts = measured(asked, Path(scratch))
    except subprocess.CalledProcessError as error:
        print(f"estimate: {error.cmd[0]} failed; so would the curriculum, or its probe is too small", file=sys.stderr)
        sys.exit(1)
    print("\n".join(table(rows(asked, parts))))


def parsed() -> argparse.Namespace:
    """What the Makefile tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pool", "rollout", "grad", "store", "train", "arms", "refresh"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument(
        "--probe", type=float, default=0.0, help="share of the pool that a stage measures; 0: all of it"
    )
    for name in ("samples", "valid-samples", "stages", "seeds", "gpus"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--valid", action="append", default=[], metavar="NAME=FILE")
    return parser.parse_args()


def measured(asked: argparse.Namespace, scratch: Path) -> Parts:
    """Run every command on a few prompts."""
    pool, share = probe(asked.pool, asked.samples, scratch / "pool.jsonl")
    said = asking(f"{asked.train} {pool}", scratch / "P")
    training = Cost(training=said["seconds"], tokens=said["tokens"], disk=said["disk"] - said["checkpoint"])
    if all(arm in NOT_SAMPLED for arm in asked.arms.split()):
        return Parts(training._replace(loading=START + LIGHT))
    rollout, rollouts = f"{asked.rollout} {asked.pool} -n {asked.samples} --seed 0", scratch / "pool.rollouts.jsonl"
    said = asking(rollout, "-")
    again = said["equal_rewards_fraction"] if asked.refresh == "zero-advantage" else 1.0
    start = made(f"{asked.rollout} {pool} -n {asked.samples}", rollouts)["seconds_start"]
    sampling = Cost(said["seconds"] / asked.gpus, tokens=said["tokens"], disk=said["disk"], loading=start)
    training = training._replace(loading=start + LIGHT)
    if all(arm in NOT_SCORED for arm in asked.arms.split()):
        return Parts(training, sampling)
    refreshing = sampling.times(again)._replace(disk=sampling.disk, loading=start) if asked.refresh else Cost()
    targets, means, against = Cost(), Cost(), ""
    for name, file in (one.split("=", 1) for one in asked.valid):
        said = asking(f"{asked.rollout} {file} -n {asked.valid_samples}", "-")
        targets = targets.plus(Cost(said["seconds"], tokens=said["tokens"], disk=said["disk"], loading=start))
        part, times = probe(file, asked.valid_samples, scratch / f"{name}.jsonl")
        own, mean = scratch / f"{name}.rollouts.jsonl", scratch / f"{name}.mean.safetensors"
        made(f"{asked.rollout} {part} -n {asked.valid_samples}", own)
        said = asking(f"{asked.grad} {own} --mean", mean)
        made(f"{asked.grad} {own} --mean", mean)
        means = means.plus(Cost(gradients=said["seconds"] * times, disk=said["disk"], loading=start))
        against += f" --against {shlex.quote(f'{name}={mean}')}"
    line, store = f"{asked.grad} {rollouts} {against} {asked.store}", scratch / "grads.zarr"
    said = asking(line, store)
    gradients = said["seconds"] * share / asked.gpus
    scoring = Cost(gradients=gradients, disk=said["disk"] * share, loading=start)
    made(line, store)
    said = asking(f"cropi-score {store}", "-")
    scoring = scoring.plus(Cost(scores=said["seconds"] * share, disk=said["disk"] * share, loading=LIGHT))
    return Parts(training, sampling, scoring, targets, means, refreshing, asked.probe)


def probe(path: str, samples: int, target: Path) -> tuple[Path, float]:
    """Some of the prompts, evenly spread, as a file; and how many times as many there are."""
    records = [record for _, record in read_jsonl(path)]
    chosen = [records[place] for place in evenly(len(records), max(1, PROBE_RESPONSES // samples))]
    target.write_text("".join(dump_line(record) + "\n" for record in chosen), encoding="utf-8")
    return target, len(records) / max(len(chosen), 1)


def asking(line: str, output: Path | str) -> dict[str, Any]:
    """What a command's dry run says. CalledProcessError: it failed, and has said why."""
    print(f"estimate: asking {line.split()[0]}", file=sys.stderr, flush=True)
    said: dict[str, Any] = json.loads(run(line, output, "--dry-run", "--json"))
    return said


def made(line: str, output: Path) -> dict[str, Any]:
    """The ledger of a command that is really run. CalledProcessError: as of `asking`."""
    print(f"estimate: running {line.split()[0]}", file=sys.stderr, flush=True)
    run(line, output)
    manifest = output / "manifest.json" if output.is_dir() else output.with_name(output.name + ".manifest.json")
    ledger: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["ledger"]
    return ledger


def run(line: str, output: Path | str, *more: str) -> str:
    """What a command prints on standard output."""
    words = [*shlex.split(line), "-o", str(output), "--quiet", *more]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def rows(asked: argparse.Namespace, parts: Parts) -> list[tuple[str, Cost]]:
    """What is made once, a seed of each arm, and everything."""
    arms = asked.arms.split()
    once = parts.once(arms)
    found = [(f"{arm}, a seed", parts.arm(arm, asked.stages)) for arm in arms]
    whole = once
    for _, cost in found:
        whole = whole.plus(cost.times(asked.seeds))
    everything = f"all, {asked.seeds} seeds" if asked.seeds > 1 else "all"
    return [("start, once for all arms", once), *found, (everything, whole)]


def table(costs: list[tuple[str, Cost]]) -> list[str]:
    """Lines for people."""
    lines = [["", *COLUMNS, "time", "tokens", "disk"]]
    for name, cost in costs:
        times = [in_seconds(value) if value else "-" for value in (*cost[: len(COLUMNS)], cost.seconds)]
        lines.append([name, *times, f"{cost.tokens:,.0f}", in_bytes(cost.disk)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in pairs)
        for pairs in (enumerate(zip(line, widths, strict=True)) for line in lines)
    ]
    shown.append(
        "one command after another; tokens are those generated, evaluations apart; responses may grow longer in training"
    )
    return shown


if __name__ == "__main__":
    main()
