"""What the commands cost on a real chat model, SmolLM2-135M-Instruct: seconds of work and of starting, tokens a second, peak memory.

The pool are a few prompts of each line of examples/smollm2-135m/families.jsonl with three worked examples, so about 175 tokens, each sampled
8 times with at most 32 new tokens; the mean gradient is that of one family. Seconds and tokens are those that each command wrote into its
manifest, processor time and memory are those of its whole process: memory is the most that was resident, pages of the mapped weights among it.
Tokens are those generated, or those that went through the policy (in training both). Processor time says what other load on the machine does
not change.

    python benchmarks/real_model.py              # about six minutes on two cores
    python benchmarks/real_model.py --size 1     # a third of the prompts
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from goals import Used, processor, used_by

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "smollm2-135m"
BIN = Path(sys.executable).parent
SHAPED = (
    "--messages",
    EXAMPLE / "examples.json",
    "--system",
    "Solve the task in one short line and end with: The answer is X.",
)
TEMPERATURE = 0.7
SAMPLED = f"-n 8 --max-tokens 32 --temperature {TEMPERATURE} --verifier maths"
GRADIENTS = f"--policy-temperature {TEMPERATURE}"
STEPS = 2


class Row(NamedTuple):
    """One command: what it did, its ledger, how many tokens that was, and what its process took; None of a part of one."""

    name: str
    ledger: dict[str, Any]
    tokens: int
    used: Used | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description="What the commands cost on SmolLM2-135M-Instruct.")
    parser.add_argument(
        "--policy", type=Path, default=ROOT / "runs" / "smollm2-135m" / "P0", help="made if it is not there"
    )
    parser.add_argument("--size", type=int, default=3, help="prompts of each of eight lines")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    subprocess.run([sys.executable, EXAMPLE / "model.py", "-o", options.policy], check=True)
    with tempfile.TemporaryDirectory(dir=options.policy.parent) as folder:
        rows = measure(Path(folder), options.policy.resolve(), options.size)
    if options.json:
        for row in rows:
            print(as_json(row, options.threads))
    else:
        print_table(rows, options.threads)


def measure(folder: Path, policy: Path, size: int) -> list[Row]:
    """Every command once, one after another, in a folder."""

    def call(line: str, *more: object) -> Used:
        name, *words = line.split()
        return used_by([BIN / name, *words, "--quiet", *more], folder)

    def row(name: str, output: str, line: str) -> Row:
        used = call(line, "--model", policy, "-o", output)
        path = folder / output
        manifest = path / "manifest.json" if path.is_dir() else path.with_name(path.name + ".manifest.json")
        ledger = json.loads(manifest.read_text())["ledger"]
        tokens = sum(ledger.get(f"tokens_{kind}", 0) for kind in ("generated", "scored", "trained"))
        return Row(name, ledger, tokens, used)

    recipe = f"cropi-prompts recipe:{EXAMPLE / 'families.jsonl'} --size"
    call(f"{recipe} {size} --seed 1 -o pool.jsonl", *SHAPED)
    call(f"{recipe} {2 * size} --only lcm --seed 2 --exclude pool.jsonl -o valid.jsonl", *SHAPED)
    rows = [row(f"cropi-rollout, {8 * size} prompts x 8", "pool.rollouts.jsonl", f"cropi-rollout pool.jsonl {SAMPLED}")]
    call(f"cropi-rollout valid.jsonl {SAMPLED} -o valid.rollouts.jsonl", "--model", policy)
    mean = "valid.mean.safetensors"
    rows.append(
        row(f"cropi-grad --mean, {2 * size} prompts", mean, f"cropi-grad valid.rollouts.jsonl --mean {GRADIENTS}")
    )
    for method in ("reference", "fast", "jvp"):
        line = f"cropi-grad pool.rollouts.jsonl --against lcm={mean} --method {method} {GRADIENTS}"
        rows.append(row(f"cropi-grad --method {method}", f"{method}.zarr", line))
    line = f"cropi-train pool.jsonl {SAMPLED} --steps {STEPS} --batch 8 --learning-rate 5e-6 --state drop"
    trained = row(f"cropi-train, {STEPS} steps of 8 x 8", "P1", line)
    return [*rows, trained, *halves(trained, folder / "P1")]


def halves(trained: Row, policy: Path) -> list[Row]:
    """The seconds of a training step's two parts, on average, as the policy's timings have them."""
    steps = [json.loads(line) for line in (policy / "timings.jsonl").read_text().splitlines()]
    found = []
    for name, tokens in (("sampling", "tokens_generated"), ("update", "tokens_trained")):
        seconds = sum(step[f"seconds_{name}"] for step in steps) / STEPS
        found.append(Row(f"a step's {name}", {"seconds_work": seconds}, trained.ledger[tokens] // STEPS))
    return found


def as_json(row: Row, threads: int) -> str:
    seconds = {name: row.ledger.get(name) for name in ("seconds_work", "seconds_start")}
    used = {} if row.used is None else row.used._asdict()
    return json.dumps({"name": row.name, **seconds, "tokens": row.tokens, **used, "device": processor(threads)})


def print_table(rows: list[Row], threads: int) -> None:
    """As Markdown."""
    print(f"{processor(threads)}\n")
    print(
        "| | work, s | start, s | tokens | tokens a second | processor time, s | memory, GiB |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        work, start, used = row.ledger["seconds_work"], row.ledger.get("seconds_start"), row.used
        cells = [f"{work:.1f}", "" if start is None else f"{start:.1f}", f"{row.tokens:,}", f"{row.tokens / work:.0f}"]
        cells += ["", ""] if used is None else [f"{used.processor:.1f}", f"{used.memory / 2**30:.2f}"]
        print(f"| {' | '.join([row.name, *cells])} |")


if __name__ == "__main__":
    main()
