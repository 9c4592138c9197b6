"""What `cropi-score --predict` takes on a large pool: seconds of work a million prompts, and memory.

A made-up pool with random features, of which some prompts are measured; the command runs in a process of its own. It reads pool and features
block by block, so its memory is that of the ids, of the measured prompts and of one block.

    python benchmarks/predicting.py                      # a million prompts of 512 features (1 GB of disk in a temporary folder)
    python benchmarks/predicting.py --prompts 100000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from goals import Goal, peak_memory, print_json, print_lines, processor

from cropi_tools.data.features import as_rows, header
from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.data.store import StoreWriter
from cropi_tools.sketches.spec import Layout, ProjectionSpec

GOAL_MEMORY = 4.0  # GiB, for a million prompts
BLOCK = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of predicting scores.")
    parser.add_argument("--prompts", type=int, default=1_000_000, help="prompts of the pool")
    parser.add_argument("--measured", type=int, default=5000, help="of which are measured")
    parser.add_argument("--width", type=int, default=512, help="features of a prompt")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, options.prompts, options.measured, options.width)
        command = [
            str(Path(sys.executable).parent / "cropi-score"),
            *(str(folder / "probe.zarr"), "--predict", str(folder / "pool.jsonl")),
            *(
                "--features",
                str(folder / "f.safetensors"),
                "--if-weak",
                "warn",
                "-o",
                str(folder / "scores.jsonl"),
                "--quiet",
            ),
        ]
        peak = peak_memory(command) / (1 << 30)
        ledger = json.loads((folder / "scores.jsonl.manifest.json").read_text())["ledger"]
    goals = [Goal("predict-memory", peak, GOAL_MEMORY, "a million prompts, GiB", at_most=True)]
    if options.json:
        print_json(goals, processor())
        return
    print(
        f"{options.prompts} prompts of {options.width} features, {options.measured} measured: {ledger['seconds_work']:.1f} s of work, "
        f"{ledger['seconds_start']:.1f} s of starting, {peak:.2f} GiB; {processor()}"
    )
    print_lines(goals)


def make(folder: Path, prompts: int, measured: int, width: int) -> None:
    """A pool, its features, and a store of its first prompts whose scores follow from the first features."""
    draw = np.random.default_rng(0)
    ids = [f"p{number}" for number in range(prompts)]
    with open(folder / "pool.jsonl", "w") as pool, open(folder / "f.safetensors", "wb") as features:
        features.write(header(ids, width, {"policy": "P", "pooling": "random"}))
        first = np.empty(0)
        for start in range(0, prompts, BLOCK):
            rows = draw.normal(size=(min(BLOCK, prompts - start), width))
            features.write(as_rows(rows))
            if len(first) < measured:
                first = np.concatenate([first, rows[:, 0]])
            for name in ids[start : start + len(rows)]:
                pool.write(
                    json.dumps({"id": name, "prompt": "q", "answer": "1", "source": f"s{int(name[1:]) % 7}"}) + "\n"
                )
    layout = Layout((("weight", (64,)),))
    spec = ProjectionSpec.create("countsketch", layout, 64)
    output = Output(folder / "probe.zarr", Fingerprint("made up", {}, {}), {}, folder=True)
    output.open()
    facts = {
        **{"policy": "P", "tokenizer": "T", "objective": {}, "layout": layout.to_json(), "device": "cpu"},
        **{"projection": spec.to_json(), "against": {"target": {"norm": 1.0, "sha256": "0" * 64}}},
    }
    writer = StoreWriter(output, measured, spec.dim, facts)
    for name, value in zip(ids[:measured], np.tanh(first[:measured]) / 2, strict=True):
        entry = {"id": name, "source": "s", "pass_rate": 0.5, "status": "ok", "gradient_norm": 1.0}
        writer.add({**entry, "inner": {"target": float(value)}}, np.ones(spec.dim, np.float32))
        if writer.chunk_full:
            writer.commit({})
    writer.finish({}, skipped={})


if __name__ == "__main__":
    main()
