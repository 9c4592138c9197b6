"""How near scoring comes to reading the sketches at all, and that its memory does not grow with them.

A pool of unit rows is written as cropi-grad writes it (float16, its chunks, two shards) and scored against the mean sketches of some
sets, all on the same files with the same threads, best of several interleaved rounds, after everything was read once:

* read: every chunk file into a buffer by plain reads. What is told against it is bytes of rows a second.
* rows: the inner products of all rows with all sets, checked to be finite: what scoring does to the rows.
* numpy: the same as it is usually written, a block of rows as float32 times the sets. Shown, not a goal.
* command: cropi-score from its start to its file: Python and its libraries loaded, the index read twice, a JSON line a prompt
  written. Shown, not a goal; of few dimensions it is most of the time.

Memory is the peak of resident anonymous memory of cropi-score on one shard and on both; of a pool's prompts it holds the ids.

    python benchmarks/scoring.py                  # a pool of 20000 rows, 0.3 GB
    python benchmarks/scoring.py --rows 200000    # the full size, 3.3 GB
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from goals import Goal, best_seconds, peak_memory, print_json, print_lines

from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.data.store import Store, StoreWriter
from cropi_tools.scores.influence import mean_sketch
from cropi_tools.scores.row_products import processors, row_products
from cropi_tools.sketches.spec import Layout, ProjectionSpec

GOAL, ROUNDS, SHARDS = 0.4, 9, 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Scoring against plain reads of the same files, and its memory.")
    parser.add_argument("--rows", type=int, default=20000, help="rows of the pool, in two shards")
    parser.add_argument("--dim", type=int, default=8192, help="dimensions of the sketch")
    parser.add_argument("--sets", type=int, default=6, help="validation sets")
    parser.add_argument("--folder", help="where the stores are made; a temporary folder unless told")
    parser.add_argument("--json", action="store_true", help="one JSON object a goal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.rows, options.dim, options.sets)
    goal = Goal("scoring-to-read", found["rows"] / found["read"], GOAL, "plain reads of the same files")
    if options.json:
        device = f"{os.cpu_count()} cores, {found['threads']} threads"
        print_json([goal], device, **found)
        return
    print(
        f"{options.rows} x {options.dim} float16 ({found['bytes'] / 1e9:.2f} GB), {options.sets} sets, {found['threads']} threads"
    )
    for name in ("read", "rows", "numpy", "command"):
        print(f"{name:8} {found[name] / 1e9:7.2f} GB/s   {found[name] / found['read']:6.3f} of reading")
    print_lines([goal])
    small, large = found["memory"]
    print(
        f"peak anonymous memory of cropi-score: {small / 1e6:.0f} MB on half of the rows, {large / 1e6:.0f} MB on all"
    )


def measure(folder: Path, rows: int, dim: int, sets: int) -> dict[str, Any]:
    """Bytes of rows a second of every way, and the two peaks of memory in bytes."""
    shards = [write_store(folder / f"pool.{n}.zarr", rows // SHARDS, dim, seed=n) for n in range(SHARDS)]
    names = [f"set{n}" for n in range(sets)]
    valid = [write_store(folder / f"{name}.zarr", 16, dim, seed=100 + n) for n, name in enumerate(names)]
    means = np.stack([mean_sketch([store]) for store in valid])
    vectors = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    threads = processors()

    def read() -> None:
        for store in shards:
            chunks = store.chunks

            def part(first: int, chunks: Any = chunks) -> None:
                buffer = memoryview(bytearray(chunks.chunk_bytes))
                for number in range(first, chunks.count, threads):
                    with open(chunks.path(number), "rb", buffering=0) as file:
                        file.readinto(buffer)

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(part, range(threads)))

    def score() -> None:
        for store in shards:
            for _ in row_products(store, vectors):
                pass

    def plain() -> None:
        for store in shards:
            for _, block in store.blocks():
                block @ vectors.T

    words = ["--train", str(shards[0].path), "--train", str(shards[1].path)]
    named = [word for name, store in zip(names, valid, strict=True) for word in ("--valid", f"{name}={store.path}")]
    command = [str(Path(sys.executable).with_name("cropi-score")), "--quiet", *named]
    size = sum(store.chunks.count * store.chunks.chunk_bytes for store in shards)
    seconds = best_seconds({"read": read, "rows": score}, ROUNDS) | best_seconds({"numpy": plain}, 1)
    memory, spent = [], 0.0
    for used in (words[:2], words):
        start = time.perf_counter()
        memory.append(peak_memory([*command, *used, "-o", str(folder / f"{len(used)}.jsonl")]))
        spent = time.perf_counter() - start
    rates = {name: size / best for name, best in {**seconds, "command": spent}.items()}
    return {**rates, "bytes": size, "threads": threads, "memory": memory}


def write_store(path: Path, rows: int, dim: int, seed: int) -> Store:
    """A store of random sketches, written as cropi-grad does it."""
    layout = Layout((("w", (1 << 20,)),))
    spec = ProjectionSpec.create("countsketch", layout, dim)
    facts = {"policy": "P", "tokenizer": "T", "objective": {}, "layout": layout.to_json(), "device": "cpu"}
    output = Output(path, Fingerprint("benchmark", {}, {}), {}, folder=True)
    output.open()
    writer = StoreWriter(output, rows, dim, {**facts, "projection": spec.to_json(), "against": {}})
    some = np.random.default_rng(seed).standard_normal((256, dim), dtype=np.float32)
    for n in range(rows):
        entry = {"id": f"pool-{seed}-{n}", "source": "benchmark", "pass_rate": 0.5, "status": "ok", "tokens": 2048}
        entry |= {"kl": 0.01, "effective_sample_size": 0.98, "gradient_norm": 1.0, "inner": {}}
        writer.add(entry, np.roll(some[n % 256], n // 256))
        if writer.chunk_full:
            writer.commit({})
    writer.finish({}, skipped={})
    return Store(path)


if __name__ == "__main__":
    main()
