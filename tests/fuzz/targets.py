"""What reads records: command lines on good files of which one is spoilt, and readers that no short command line reaches."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradient_stores
import numpy as np
import pyarrow
import tiny_policy
from manifests import manifest
from pyarrow import feather, parquet
from record_mutations import Record, spoilt

SAMPLES = 4


def rollout(record: Record, number: int) -> Record:
    samples = [
        {
            "token_ids": [5 + k, 6 + number % 9, 1],
            "logprobs": [-0.5, -1.25, -3.0],
            "text": "7" if k % 2 else "a",
            "finish_reason": "stop",
            "reward": float(k % 2),
            "outcome": "correct" if k % 2 else "wrong",
        }
        for k in range(SAMPLES)
    ]
    return {**record, "prompt_token_ids": [2, 12, 3], "samples": samples}


def good_records() -> dict[str, list[Record]]:
    """A few records of every kind, by the name of their file."""
    prompts = [{**record, "extra": {"level": 1, "tags": ["a"]}} for record in tiny_policy.prompts(5)]
    prompts[1] |= {"verifier": "exact", "extra": {"level": 2, "tags": ["b"], "note": "x"}}
    rollouts = [rollout(record, number) for number, record in enumerate(prompts)]
    scores = [
        {
            "id": record["id"],
            "source": record["source"],
            "scores": {"a": 0.5 - 0.1 * number, "b": 0.1 * number} if number else None,
            "pass_rate": 0.25 * number,
            "norm": 1.5,
            "status": "ok" if number else "zero-advantage",
        }
        for number, record in enumerate(prompts)
    ]
    authors = [{**record, "responses": ["7", "8"], "rewards": [1.0, 0]} for record in tiny_policy.prompts(3)]
    dump = [
        {"input": record["prompt"], "output": str(k), "gts": record["answer"], "score": float(k), "step": 1}
        for record in prompts[:2]
        for k in range(2)
    ]
    verl = [
        {
            "data_source": "s",
            "prompt": [{"role": "user", "content": f"q{number}"}],
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": number, "extra": "{}", "prompt_form": "text", "rest": '{"k": 1}'},
        }
        for number in range(3)
    ]
    recipe = [{"family": "chain_sum", "size": 2, "set": {"min_terms": 2, "max_terms": 3}, "template": "{question}"}]
    verl_log = [
        {
            "step": step,
            "data": {
                "critic/score/mean": 0.5,
                "response_length/mean": 3.0,
                "timing_s/step": 2.0,
                "val-core/t/acc/mean@1": 0.5,
            },
        }
        for step in (1, 2)
    ]
    return {
        "prompts.jsonl": prompts,
        "other.jsonl": [{**record, "prompt": f"x{record['prompt']}"} for record in tiny_policy.prompts(3, start=50)],
        "rollouts.jsonl": rollouts,
        "scores.jsonl": scores,
        "authors.jsonl": authors,
        "dump.jsonl": dump,
        "verl.jsonl": verl,
        "recipe.jsonl": recipe,
        "metrics.verl.jsonl": verl_log,
        "pending.jsonl": [{"place": number, "rollout": one} for number, one in enumerate(rollouts[:2])],
    }


def lay_out(place: Path, policy: Path, chat: Path) -> None:
    """Good files of every kind in a folder."""
    import synthetic_run
    import transformers
    from halves_stores import halves_store

    transformers.utils.logging.disable_progress_bar()  # which a command's own process never shows
    for name, records in good_records().items():
        tiny_policy.write_jsonl(place / name, records)
    (place / "P0").symlink_to(policy)
    (place / "chat").symlink_to(chat)
    facts = {"fingerprint": {"command": "cropi-rollout", "options": {"date": "2024-07-26"}, "inputs": {}}}
    (place / "rollouts.jsonl.manifest.json").write_text(json.dumps({**manifest("cropi-rollout"), **facts}))
    rows = [None, *(np.random.default_rng(number).normal(size=64).astype(np.float32) for number in range(4))]
    inner = [{"t": 0.1 * number} for number in range(5)]
    against = {"t": {"norm": 8.0, "sha256": "x"}}
    gradient_stores.make_store(place / "grads.zarr", rows, gradient_stores.spec(), inner=inner, against=against)
    halves_store(place / "halves.zarr", np.random.default_rng(0).normal(size=(40, 2)), np.ones((40, 2)))
    synthetic_run.write_run(place / "run", arms=["random", "cropi"], seeds=["1"])
    tiny_policy.write_jsonl(place / "run" / "start" / "scores.jsonl", good_records()["scores.jsonl"])


Spoil = Callable[[Path, random.Random], None]


def spoil_line(path: Path, draw: random.Random) -> None:
    """Spoil one line of a JSONL file; its other lines stay."""
    lines = path.read_bytes().splitlines()
    at = draw.randrange(len(lines))
    lines[at] = spoilt(json.loads(lines[at]), draw)
    path.write_bytes(b"\n".join(lines) + b"\n")


class Target(NamedTuple):
    """One use of a command. words: without -o. file: what is spoilt, and how."""

    name: str
    words: str
    file: str
    spoil: Spoil = spoil_line
    output: str = "out.jsonl"
    heavy: bool = False


def spoil_object(path: Path, draw: random.Random) -> None:
    """Spoil a JSON file of one object."""
    path.write_bytes(spoilt(json.loads(path.read_bytes()), draw))


def as_array(path: Path, draw: random.Random) -> None:
    """prompts.jsonl as one JSON array, an item of it spoilt."""
    items = [json.dumps(record).encode() for record in good_records()["prompts.jsonl"]]
    at = draw.randrange(len(items))
    items[at] = spoilt(json.loads(items[at]), draw)
    path.write_bytes(draw.choice((b"[", b"[\n", b"[,")) + b", ".join(items) + draw.choice((b"]", b"]", b"", b"]]")))


def as_csv(path: Path, draw: random.Random) -> None:
    """A table of texts, with some of the bytes harmed."""
    rows = [["id", "prompt", "answer", "source", "extra"]]
    for number in range(4):
        value = spoilt({"x": 1}, draw).decode("utf-8", "replace")[:300]
        row = [f"i{number}", f"q{number}", "4", "s", '""{}""']
        row[draw.randrange(5)] = value.replace('"', draw.choice(('""', '""', '"', "")))
        rows.append(row)
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows).encode("utf-8", "replace")
    at = draw.randrange(len(text))
    path.write_bytes(
        text[:at] + draw.choice((b"", b"", b"\xff", b"\x00", b'"', b"\r", b"\xed\xa0\x80", b",")) + text[at:]
    )


def _columns() -> list[Any]:
    """Columns of three values that JSON or Python knows little of."""
    day, stamp = pyarrow.date32(), pyarrow.timestamp("us")
    invalid = pyarrow.array([b"a", b"\xff", b"\xed\xa0\x80"]).view(pyarrow.string())
    large = pyarrow.array([b"a", b"\xff\xfe", None], pyarrow.large_binary()).view(pyarrow.large_string())
    return [
        invalid,
        large,
        pyarrow.array([b"a", b"\xff", None]),
        pyarrow.array([b"text", b"more", b"last"]),
        pyarrow.array([0, 10**8, -(10**7)], pyarrow.int32()).cast(day),
        pyarrow.array([0, 2**62, -(2**62)], pyarrow.int64()).cast(stamp),
        pyarrow.array([0, 2**40, 5], pyarrow.int64()).cast(pyarrow.timestamp("s", "Nowhere/Land")),
        pyarrow.array([1, 2, 3], pyarrow.int64()).cast(pyarrow.timestamp("ns")),
        pyarrow.array([0, 2**62, 1], pyarrow.int64()).cast(pyarrow.duration("s")),
        pyarrow.array([0, 1, 5], pyarrow.int64()).cast(pyarrow.time64("ns")),
        pyarrow.array([1.5, float("nan"), None]),
        pyarrow.array([1, 2**64 - 1, None], pyarrow.uint64()),
        pyarrow.array([True, False, None]),
        pyarrow.array(["1.5", "2.5", None]).cast(pyarrow.decimal128(20, 2)),
        pyarrow.array([[("a", 1)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array([{"a": {"b": [1]}}, None, {"a": None}]),
        pyarrow.array(["a", "b", "a"]).dictionary_encode(),
        pyarrow.nulls(3),
        pyarrow.array([[invalid[1].as_buffer().to_pybytes()], [], None], pyarrow.list_(pyarrow.binary())),
        pyarrow.array([[{"role": "user", "content": "x"}], [{"role": "user", "content": None}], []]),
        pyarrow.array([np.float16(1), np.float16(2), None], pyarrow.float16()),
    ]


def as_parquet(path: Path, draw: random.Random) -> None:
    """A parquet file with one or two columns of strange types."""
    texts = pyarrow.array(["a", "b", "c"])
    columns = {"id": texts, "prompt": texts, "answer": texts, "source": texts}
    for name in draw.sample(
        ["id", "prompt", "answer", "source", "extra", "verifier", "other", "reward_model", "chat_template_kwargs"], 2
    ):
        columns[name] = draw.choice(_columns())
    table = pyarrow.table(columns)
    if path.suffix == ".arrow":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        parquet.write_table(table, path)
    if draw.random() < 0.2:
        harmed = bytearray(path.read_bytes())
        harmed[draw.randrange(len(harmed))] ^= 0xFF
        path.write_bytes(harmed)


RULES = ("influence", "shuffled", "random", "learnability", "pass-rate", "full")
FEW = "--max-tokens 2 -n 2 --verifier exact"

TARGETS = (
    *(
        Target(f"prompts {file}", f"cropi-prompts {file}", file)
        for file in ("prompts.jsonl", "verl.jsonl", "authors.jsonl", "rollouts.jsonl")
    ),
    Target(
        "prompts excluded",
        "cropi-prompts prompts.jsonl --exclude other.jsonl --check-overlap authors.jsonl",
        "other.jsonl",
    ),
    Target(
        "prompts mapped",
        "cropi-prompts prompts.jsonl --map prompt=extra.tags.0,answer=extra.level,id=id,source=prompt",
        "prompts.jsonl",
    ),
    Target(
        "prompts shaped",
        "cropi-prompts prompts.jsonl --template {prompt}:{extra:lower} --system s --answer-template {answer}",
        "prompts.jsonl",
    ),
    Target("prompts recipe", "cropi-prompts recipe:recipe.jsonl", "recipe.jsonl"),
    Target("prompts array", "cropi-prompts rows.json", "rows.json", as_array),
    Target("prompts csv", "cropi-prompts rows.csv", "rows.csv", as_csv),
    Target("prompts parquet", "cropi-prompts rows.parquet", "rows.parquet", as_parquet),
    Target("prompts arrow", "cropi-prompts rows.arrow --template {prompt}{id}", "rows.arrow", as_parquet),
    *(
        Target(
            f"select {by}", f"cropi-select scores.jsonl --prompts prompts.jsonl --ratio 0.9 --by {by}", "scores.jsonl"
        )
        for by in RULES
    ),
    Target("select prompts", "cropi-select --prompts prompts.jsonl --by random --ratio 1", "prompts.jsonl"),
    Target(
        "select verl",
        "cropi-select --prompts prompts.jsonl --by full --format verl",
        "prompts.jsonl",
        output="out.parquet",
    ),
    Target(
        "select trl",
        "cropi-select --prompts prompts.jsonl --by full --format trl",
        "prompts.jsonl",
        output="out.parquet",
    ),
    Target("select trl lines", "cropi-select --prompts prompts.jsonl --by full --format trl", "prompts.jsonl"),
    Target("score", "cropi-score grads.zarr", "grads.zarr/index.jsonl"),
    Target("score sketches", "cropi-score grads.zarr --valid t=grads.zarr --each", "grads.zarr/index.jsonl"),
    Target("score norms", "cropi-score grads.zarr --norms grads.zarr", "grads.zarr/index.jsonl"),
    Target("score reliability", "cropi-score halves.zarr --reliability", "halves.zarr/index.jsonl", output=""),
    Target("verify", "cropi-verify rollouts.jsonl --verifier exact", "rollouts.jsonl"),
    Target("verify recorded", "cropi-verify rollouts.jsonl --verifier recorded", "rollouts.jsonl"),
    Target(
        "verify authors",
        "cropi-verify authors.jsonl --verifier recorded --model P0",
        "authors.jsonl",
        heavy=True,
    ),
    Target(
        "verify dump",
        "cropi-verify dump.jsonl --verifier exact --model P0 --prompts prompts.jsonl",
        "dump.jsonl",
        heavy=True,
    ),
    Target("rollout", f"cropi-rollout --model P0 prompts.jsonl {FEW}", "prompts.jsonl", heavy=True),
    Target("rollout chat", f"cropi-rollout --model chat prompts.jsonl {FEW}", "prompts.jsonl", heavy=True),
    Target(
        "refresh",
        f"cropi-rollout --model P0 --refresh rollouts.jsonl --where zero-advantage {FEW}",
        "rollouts.jsonl",
        heavy=True,
    ),
    Target(
        "refresh index",
        f"cropi-rollout --model P0 --refresh rollouts.jsonl --where low-ess --index grads.zarr {FEW}",
        "grads.zarr/index.jsonl",
        heavy=True,
    ),
    Target("grad", "cropi-grad --model P0 rollouts.jsonl --dim 64", "rollouts.jsonl", output="out.zarr", heavy=True),
    Target(
        "grad mean",
        "cropi-grad --model P0 rollouts.jsonl --mean",
        "rollouts.jsonl",
        output="out.safetensors",
        heavy=True,
    ),
    Target(
        "train",
        f"cropi-train --model P0 prompts.jsonl --steps 1 --batch 2 {FEW}",
        "prompts.jsonl",
        output="P1",
        heavy=True,
    ),
    Target(
        "train verl",
        f"cropi-train --model chat prompts.jsonl --steps 1 --batch 4 {FEW} --engine verl --verl-python python --dry-run",
        "prompts.jsonl",
        output="P1",
        heavy=True,
    ),
    *(
        Target(f"report {file}", f"cropi-report run{more}", f"run/{file}", output="")
        for more, file in (
            ("", "cropi/1/1/policy/metrics.jsonl"),
            (" --json", "cropi/1/2/policy/evaluations.jsonl"),
            ("", "random/1/1/policy/evaluations.jsonl"),
            (" --json", "random/1/1/policy/timings.jsonl"),
            ("", "cropi/1/2/selected.jsonl"),
            (" --json", "start/scores.jsonl"),
        )
    ),
    Target("report manifest", "cropi-report run", "run/cropi/1/1/policy/manifest.json", spoil_object, output=""),
)

METADATA = (
    Target("store manifest", "cropi-score grads.zarr", "grads.zarr/manifest.json", spoil_object),
    Target("store metadata", "cropi-score grads.zarr", "grads.zarr/zarr.json", spoil_object),
    Target(
        "input manifest",
        "cropi-verify rollouts.jsonl --verifier exact",
        "rollouts.jsonl.manifest.json",
        spoil_object,
    ),
)


def remove_output(place: Path, name: str) -> None:
    """Everything a run may have left under the name of its output."""
    for path in place.glob(f"{name}*") if name else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
