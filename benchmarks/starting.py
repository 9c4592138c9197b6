"""How much of cropi-grad is start: on the demo's pool, the whole command against its own gradients and a bare import.

Fresh processes with one thread each; seconds of the processor, which other work on the machine hardly changes; medians.

* import: `import torch, transformers` in a process of its own, nothing else.
* modules: the same, and the model's own modules of transformers, which any program with this model needs.
* gradients: norms, inner products and sketches of all batches, timed inside of cropi-grad.
* whole: cropi-grad, whose cache holds compiled kernels (warm), or nothing (cold).

The goal is `whole / (gradients + import)`. Needs the first stage of the demo (make demo).

    python benchmarks/starting.py              # a table
    python benchmarks/starting.py --json       # one object a goal
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from goals import Goal, print_json, print_lines, processor

GOAL = 1.5
ROUNDS = 5
IMPORT = "import torch, transformers"
# the modules are those of the policy's own class
MODULES = """
import torch, transformers
config = transformers.AutoConfig.from_pretrained({model!r})
transformers.AutoModelForCausalLM._model_mapping[type(config)]
transformers.AutoTokenizer
"""
# cropi-grad with a watch on what computes a batch's figures; written to a file, since stdout is the command's
WATCHED = """
import sys, time
from pathlib import Path
from cropi_tools.cli.grad import main
from cropi_tools.gradients.estimates import BackwardEstimates
spent, of = 0.0, BackwardEstimates.of
def watched(self, tasks):
    global spent
    before = time.process_time()
    found = of(self, tasks)
    spent += time.process_time() - before
    return found
BackwardEstimates.of = watched
told = sys.argv.pop(1)
sys.argv[0] = "cropi-grad"
try:
    main()
finally:
    Path(told).write_text(str(spent))
"""


def main() -> None:
    """Print the seconds and the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="the demo's run folder")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        processors, walls, ledger = measured(options.run, Path(scratch), options.rounds)
    smallest = processors["gradients"] + processors["import"]
    peer = "gradients and the bare import"
    goals = [
        Goal(f"start-{cache}", processors[f"whole, {cache} cache"] / smallest, GOAL, peer, at_most=True)
        for cache in ("warm", "cold")
    ]
    if options.json:
        print_json(goals, processor(1), seconds={name: round(value, 2) for name, value in processors.items()})
        return
    for name, value in processors.items():
        print(
            f"{name:20} {value:6.2f} s of the processor" + (f", {walls[name]:6.2f} s in all" if name in walls else "")
        )
    print(f"ledger, warm cache: start {ledger['seconds_start']:.2f} s, work {ledger['seconds_work']:.2f} s")
    against = processors["gradients"] + processors["modules"]
    print(f"warm cache to gradients and the model's modules: {processors['whole, warm cache'] / against:.2f}")
    print_lines(goals)


def measured(run: Path, scratch: Path, rounds: int) -> tuple[dict[str, float], dict[str, float], Mapping[str, float]]:
    """Medians by name, of the processor and in all, and the ledger of the last run with a warm cache."""
    python, command = sys.executable, Path(sys.executable).with_name("cropi-grad")
    told, warm = scratch / "told", scratch / "warm"
    seconds: dict[str, list[tuple[float, float]]] = {}
    spent: list[float] = []

    def add(name: str, line: Sequence[str], cache: Path) -> None:
        seconds.setdefault(name, []).append(timed(line, cache))

    words = grad(run, scratch / "grads.zarr")
    for number in range(rounds + 1):  # the first, which reads files into memory and fills the cache, is not counted
        add("import", [python, "-c", IMPORT], warm)
        add("modules", [python, "-c", MODULES.format(model=str(run / "P0"))], warm)
        add("watched", [python, "-c", WATCHED, str(told), *words], warm)
        spent.append(float(told.read_text()))
        add("whole, warm cache", [str(command), *words], warm)
        ledger = json.loads((scratch / "grads.zarr" / "manifest.json").read_text())["ledger"]
        add("whole, cold cache", [str(command), *words], scratch / f"cold{number}")
    del seconds["watched"]
    found = [
        {name: statistics.median(pair[side] for pair in pairs[1:]) for name, pairs in seconds.items()}
        for side in (0, 1)
    ]
    found[0]["gradients"] = statistics.median(spent[1:])
    return found[0], found[1], ledger


def grad(run: Path, output: Path) -> list[str]:
    """The options with which the demo makes the store of its first stage."""
    start = run / "start"
    against = [
        word for name in ("reverse", "gcd") for word in ("--against", f"{name}={start}/valid-{name}.mean.safetensors")
    ]
    rollouts = [str(start / "train.rollouts.jsonl"), *against]
    return ["--model", str(run / "P0"), *rollouts, "--dim", "4096", "--force", "--quiet", "-o", str(output)]


def timed(line: Sequence[str], cache: Path) -> tuple[float, float]:
    """Seconds of the processor and in all that a process takes, the processes that it starts included."""
    before, started = os.times(), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    subprocess.run(line, check=True, env=environment)
    whole, after = time.perf_counter() - started, os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, whole


if __name__ == "__main__":
    main()
