"""cropi-rollout at scale: whether its memory is flat in the number of prompts, and what its --dry-run is worth.

    python benchmarks/rollout.py                      # a minute
    python benchmarks/rollout.py --prompts 1000000    # the figure of docs/results: 1M prompts against 250k

Memory is the peak of resident anonymous memory of the whole command, seen every 5 ms, on all prompts and on a quarter of them: one sample of
one token each from the tiny policy's shape with random weights, so that the records are many and the sampling little. Ids are held as
hashes to tell repetitions; the growth a prompt is that. The dry run's time and disk are compared with those of the command it speaks of.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fidelity import ROOT
from goals import Goal, peak_memory, print_json, print_lines, processor

sys.path.insert(0, str(ROOT / "examples" / "tiny"))
from warmup import make_model, make_tokenizer

GOAL_FLAT = 1.1
GOAL_TIME = 1.5
GOAL_DISK = 1.1
COMMAND = str(Path(sys.executable).parent / "cropi-rollout")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of cropi-rollout, and its estimates against what came.")
    parser.add_argument("--prompts", type=int, default=60_000, help="records of the larger of two files")
    parser.add_argument("--estimated", type=int, default=4_000, help="prompts of the command that is estimated")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer()
        make_model(tokenizer).save_pretrained(folder / "P0")
        tokenizer.save_pretrained(folder / "P0")
        sizes = (options.prompts // 4, options.prompts)
        peaks = [peak(folder, size, f"-n 1 --max-tokens 1 -o {folder}/{size}.jsonl") for size in sizes]
        said, took, disk = estimate(folder, options.estimated)
    growth = (peaks[1][0] - peaks[0][0]) / (sizes[1] - sizes[0])
    goals = [
        Goal("rollout-memory-flat", peaks[1][0] / peaks[0][0], GOAL_FLAT, f"{sizes[0]} prompts", at_most=True),
        Goal("dry-run-time", off(said["seconds"], took), GOAL_TIME, "the command itself, loading apart", at_most=True),
        Goal("dry-run-disk", off(said["disk"], disk), GOAL_DISK, "the command's file", at_most=True),
    ]
    if options.json:
        print_json(goals, f"{processor()}; {options.prompts} prompts")
        return
    for size, (memory, seconds) in zip(sizes, peaks, strict=True):
        print(
            f"{size:8} prompts: {memory / 1e6:7.1f} MB at most, {size / seconds:8.0f} prompts a second, loading included"
        )
    print(f"growth: {growth:.1f} bytes a prompt")
    print(
        f"dry run: {said['seconds']:.1f} s and {said['disk'] / 1e6:.2f} MB; came: {took:.1f} s and {disk / 1e6:.2f} MB"
    )
    print_lines(goals)


def off(said: float, came: float) -> float:
    """By what factor an estimate is off, either way."""
    return max(said / came, came / said)


def command(folder: Path, prompts: int, words: str) -> list[str]:
    """The command on so many prompts, which are written if they are not there."""
    path = folder / f"{prompts}.prompts.jsonl"
    if not path.exists():
        with open(path, "w") as lines:
            for i in range(prompts):
                record = {"id": f"p{i}", "prompt": f"S{i % 97},{i % 89}=", "answer": str(i % 10), "source": "sums"}
                lines.write(json.dumps(record) + "\n")
    return [COMMAND, "--model", f"{folder}/P0", str(path), "--verifier", "exact", "--quiet", *words.split()]


def peak(folder: Path, prompts: int, words: str) -> tuple[int, float]:
    """The most anonymous memory the command was seen to have, in bytes, and its seconds."""
    line = command(folder, prompts, words)
    started = time.perf_counter()
    return peak_memory(line), time.perf_counter() - started


def estimate(folder: Path, prompts: int) -> tuple[dict[str, float], float, int]:
    """What a dry run says, and the seconds and bytes of the command. Seconds are without loading: of a run on one prompt."""
    words = "-n 8 --max-tokens 16 -o"
    said = subprocess.run(
        [*command(folder, prompts, f"{words} {folder}/e.jsonl"), "--dry-run", "--json"], capture_output=True, check=True
    )
    seconds = []
    for count in (1, prompts):
        line = command(folder, prompts, f"{words} {folder}/e{count}.jsonl --limit {count}")
        started = time.perf_counter()
        subprocess.run(line, check=True)
        seconds.append(time.perf_counter() - started)
    return json.loads(said.stdout), seconds[1] - seconds[0], (folder / f"e{prompts}.jsonl").stat().st_size


if __name__ == "__main__":
    main()
