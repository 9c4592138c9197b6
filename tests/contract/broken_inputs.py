"""What users do wrong, and what the command must say: the table of test_contract_bad_input.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from command_table import CASES, own

Harm = Callable[[Path], object]


@dataclass(frozen=True)
class Broken:
    """One mistake.

    words: the line of a row of the table, or one of its own. says: what the message must hold. code: 2 for usage.
    """

    name: str
    words: str
    harm: Harm
    says: tuple[str, ...]
    code: int = 1


def row(name: str) -> str:
    return next(case.words for case in CASES if case.name == name)


def gone(name: str) -> Harm:
    return lambda place: (place / name).unlink()


def line(name: str, number: int, text: str) -> Harm:
    """Replace a line (from 1) of a file."""

    def harm(place: Path) -> None:
        path = own(place / name)
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("".join(line + "\n" for line in lines))

    return harm


def record(name: str, number: int, change: Callable[[dict[str, Any]], object]) -> Harm:
    """Change a record of a JSONL file."""

    def harm(place: Path) -> None:
        path = own(place / name)
        lines = path.read_text().splitlines()
        found = json.loads(lines[number - 1])
        change(found)
        lines[number - 1] = json.dumps(found)
        path.write_text("".join(line + "\n" for line in lines))

    return harm


def emptied(name: str) -> Harm:
    return lambda place: own(place / name).write_text("")


def as_folder(name: str) -> Harm:
    def harm(place: Path) -> None:
        (place / name).unlink()
        (place / name).mkdir()

    return harm


def first_id_again(name: str) -> Harm:
    """Give the third record the id of the first."""

    def harm(place: Path) -> None:
        first = json.loads((place / name).read_text().splitlines()[0])
        record(name, 3, lambda r: r.update(id=first["id"]))(place)

    return harm


def cut(name: str, keep: float = 0.5) -> Harm:
    """Truncate a file."""

    def harm(place: Path) -> None:
        path = own(place / name)
        os.truncate(path, int(path.stat().st_size * keep))

    return harm


def inside(store: str, change: Harm) -> Harm:
    """Change something in a copy of a store or policy."""
    return lambda place: change(own(place / store))


def chunk_of_nan(store: Path) -> None:
    """Overwrite one value of the first chunk of rows with NaN."""
    chunk = store / "vector" / "c" / "0" / "0"
    values = np.fromfile(chunk, dtype=np.float16)
    values[5] = np.nan
    values.tofile(chunk)


def nothing(place: Path) -> None:
    return None


JSONL = [
    # command's row, its JSONL file, a field it needs
    ("prompts", "raw.jsonl", "answer"),
    ("rollout", "prompts.jsonl", "answer"),
    ("grad-store", "rollouts.jsonl", "samples"),
    ("grad-mean", "rollouts.jsonl", "prompt_token_ids"),
    ("select", "scores.jsonl", "pass_rate"),
    ("select", "prompts.jsonl", "prompt"),
    ("train", "selected.jsonl", "source"),
]


def spoilt_file(name: str, file: str, field: str) -> list[Broken]:
    """What can be wrong with a JSONL file, whatever the command that reads it."""
    words = row(name).replace("valid.rollouts.jsonl.gz", file)
    found = [
        Broken("is missing", words, gone(file), (file, "no such file")),
        Broken("is a folder", words, as_folder(file), (file, "folder")),
        Broken("is empty", words, emptied(file), (file, "holds no record")),
        Broken("has broken JSON", words, line(file, 3, '{"id": "p2", '), (f"{file}:3", "broken JSON", "fix or remove")),
        Broken("has a line that is no object", words, line(file, 2, "[1, 2]"), (f"{file}:2", "object")),
        Broken("lacks a field", words, record(file, 2, lambda r: r.pop(field)), (f"{file}:2", f"'{field}'")),
    ]
    if name != "prompts":  # there ids may be absent, and repetitions of a question are dropped
        found.append(Broken("has an id twice", words, first_id_again(file), (f"{file}:3", "comes twice")))
    return [replace(broken, name=f"{name}: {file} {broken.name}") for broken in found]


BROKEN = [
    *(broken for name, file, field in JSONL for broken in spoilt_file(name, file, field)),
    Broken(
        "grad: a packed file cut short",
        row("grad-mean"),
        cut("valid.rollouts.jsonl.gz"),
        ("valid.rollouts.jsonl.gz", "gzip"),
    ),
    Broken(
        "prompts: nothing is left",
        "cropi-prompts raw.jsonl --exclude raw.jsonl",
        nothing,
        ("no prompt is left", "16 are in the excluded files"),
    ),
    Broken(
        "prompts: an unknown family",
        "cropi-prompts reasoning-gym:chain_sun --size 3",
        nothing,
        ("chain_sun", "chain_sum"),
        2,
    ),
    Broken("prompts: no size", "cropi-prompts reasoning-gym:chain_sum", nothing, ("--size",), 2),
    Broken(
        "prompts: not finite",
        row("prompts"),
        line("raw.jsonl", 2, '{"id": "p1", "prompt": "q", "answer": "1", "chat_template_kwargs": {"x": NaN}}'),
        ("raw.jsonl:2", "p1", "chat_template_kwargs.x", "finite"),
    ),
    Broken(
        "prompts: half a character",
        row("prompts"),
        line("raw.jsonl", 2, '{"id": "p1", "prompt": "\\ud800", "answer": "1", "source": "s"}'),
        ("raw.jsonl:2", "Unicode"),
    ),
    Broken(
        "prompts: a column that is not there",
        "cropi-prompts raw.jsonl --map prompt=question",
        nothing,
        ("raw.jsonl:1", "'question'", "columns are id, prompt"),
    ),
    Broken(
        "prompts: nothing to map", "cropi-prompts raw.jsonl --map question=prompt", nothing, ("'question'", "prompt"), 2
    ),
    Broken(
        "prompts: a broken table",
        "cropi-prompts raw.csv",
        lambda place: (place / "raw.csv").write_text("prompt,answer\nq,1\nq,2,3\n"),
        ("raw.csv:3", "more fields"),
    ),
    Broken(
        "prompts: a packed file cut short",
        "cropi-prompts raw.jsonl.zst",
        lambda place: (place / "raw.jsonl.zst").write_bytes(zstandard.compress(b'{"prompt": "q"}\n' * 99)[:-9]),
        ("raw.jsonl.zst", "zstd"),
    ),
    Broken(
        "prompts: a split not chosen",
        "cropi-prompts both",
        lambda place: [
            ((place / "both").mkdir(exist_ok=True), shutil.copy(place / "raw.jsonl", place / "both" / f"{split}.jsonl"))
            for split in ("train", "test")
        ],
        ("both", "test, train", "--split"),
    ),
    Broken("prompts: a split of a file", row("prompts") + " --split train", nothing, ("--split", "folder"), 2),
    Broken(
        "prompts: a field no row has",
        row("prompts") + " --template {promt}",
        nothing,
        ("promt", "answer, id, prompt"),
        2,
    ),
    Broken(
        "prompts: arguments the template is given anyway",
        row("prompts") + " --chat-template-kwargs tokenize=false",
        nothing,
        ("tokenize",),
        2,
    ),
    Broken(
        "prompts: a second system message",
        row("prompts") + " --system brief",
        record("raw.jsonl", 1, lambda r: r.update(prompt=[{"role": "system", "content": "a"}])),
        ("raw.jsonl:1", "--system"),
    ),
    Broken(
        "prompts: a solution in the prompt",
        row("prompts"),
        record("raw.jsonl", 1, lambda r: r.update(prompt=[{"role": "assistant", "content": "a"}])),
        ("raw.jsonl:1", "--last-assistant"),
    ),
    Broken(
        "rollout: arguments of the template that are none",
        row("rollout"),
        record("prompts.jsonl", 2, lambda r: r.update(chat_template_kwargs=[1])),
        ("prompts.jsonl:2", "chat_template_kwargs"),
    ),
    Broken(
        "grad: rollouts of others",
        row("grad-raw"),
        line("rollouts.jsonl", 1, '{"id": "p0", "prompt": "q", "answer": "1", "responses": ["1"], "rewards": [1]}'),
        ("rollouts.jsonl:1", "authors", "cropi-verify"),
    ),
    Broken(
        "rollout: not UTF-8",
        row("rollout"),
        lambda place: own(place / "prompts.jsonl").write_bytes(b'{"id": "\xff"}\n'),
        ("prompts.jsonl:1",),
    ),
    Broken("rollout: no verifier", row("rollout"), gone("parity.py"), ("parity.py", "no file")),
    Broken(
        "rollout: no such function",
        row("rollout").replace(":reward", ":rewards"),
        nothing,
        ("rewards", "parity.py"),
    ),
    Broken(
        "rollout: an unknown verifier",
        row("rollout").replace("parity.py:reward", "math"),
        nothing,
        ("math", "maths"),
        2,
    ),
    Broken(
        "verify: prompts",
        "cropi-verify prompts.jsonl",
        nothing,
        ("prompts.jsonl:1", "prompt_token_ids"),
    ),
    Broken("verify: no file", "cropi-verify", nothing, ("FILE",), 2),
    Broken("verify: no verifier", row("verify").replace("exact", "absent.py:f"), nothing, ("absent.py", "no file"), 1),
    Broken("verify: an unknown verifier", row("verify").replace("exact", "math"), nothing, ("math", "maths"), 2),
    Broken("rollout: no file", "cropi-rollout --model P0", nothing, ("a file of prompts",), 2),
    Broken("rollout: no such status", row("rollout-refresh") + " --where ok", nothing, ("--where ok", "low-ess"), 2),
    Broken(
        "rollout: a status that gradients tell", row("rollout-refresh") + " --where low-ess", nothing, ("--index",), 2
    ),
    Broken("rollout: refresh and prompts", row("rollout-refresh") + " prompts.jsonl", nothing, ("--refresh",), 2),
    Broken("rollout: no server", row("rollout") + " --engine server", nothing, ("--server URL",), 2),
    Broken(
        "rollout: nobody there",
        row("rollout") + " --engine server --server http://127.0.0.1:9",
        nothing,
        ("127.0.0.1:9",),
    ),
    Broken("rollout: a server unasked", row("rollout") + " --server http://127.0.0.1:9", nothing, ("--server URL",), 2),
    Broken("rollout: shard 0/2", row("rollout") + " --shard 0/2", nothing, ("--shard 0/2", "I/N"), 2),
    Broken("grad: shard 3/2", row("grad-store") + " --shard 3/2", nothing, ("--shard 3/2", "I/N"), 2),
    Broken("rollout: no policy", row("rollout"), gone("P0"), ("P0", "no such policy folder")),
    Broken("grad: no policy", row("grad-store"), gone("P0"), ("P0", "no such policy folder")),
    Broken("train: no policy", row("train"), gone("P0"), ("P0", "no such policy folder")),
    Broken(
        "train: no configuration",
        row("train"),
        inside("P0", lambda p: (p / "config.json").unlink()),
        ("P0", "config.json"),
    ),
    Broken(
        "grad: no weights",
        row("grad-store"),
        inside("P0", lambda p: (p / "model.safetensors").unlink()),
        ("P0", "safetensors"),
    ),
    Broken(
        "rollout: weights cut short",
        row("rollout"),
        inside("P0", lambda p: os.truncate(p / "model.safetensors", 20000)),
        ("P0", "does not open"),
    ),
    Broken(
        "rollout: tokenizer broken",
        row("rollout"),
        inside("P0", lambda p: os.truncate(p / "tokenizer.json", 500)),
        ("P0", "tokenizer"),
    ),
    Broken("train: greedy", row("train") + " --temperature 0", nothing, ("--temperature 0",), 2),
    Broken(
        "train: a mean of another objective",
        row("train") + " --against t=mean.safetensors",
        nothing,
        ("mean.safetensors", "--mean --aggregation token"),
    ),
    Broken("train: no mean", row("train") + " --against t=none", nothing, ("none", "no such file")),
    Broken("train: evaluation set missing", row("train"), gone("valid.jsonl"), ("valid.jsonl", "no such file")),
    Broken(
        "grad: a token beyond the vocabulary",
        row("grad-store"),
        record("rollouts.jsonl", 4, lambda r: r["samples"][1]["token_ids"].__setitem__(0, 999)),
        ("rollouts.jsonl:4", "sample 1", "999"),
    ),
    Broken(
        "grad: log-probabilities too few",
        row("grad-store"),
        record("rollouts.jsonl", 4, lambda r: r["samples"][1]["logprobs"].pop()),
        ("rollouts.jsonl:4", "sample 1", "logprobs"),
    ),
    Broken(
        "grad: a reward that is no number",
        row("grad-mean").replace("valid.rollouts.jsonl.gz", "rollouts.jsonl"),
        record("rollouts.jsonl", 4, lambda r: r["samples"][1].update(reward=float("nan"))),
        ("rollouts.jsonl:4", "sample 1", "reward"),
    ),
    Broken(
        "grad: another tokenizer",
        row("grad-store").replace("P0", "other-tokenizer"),
        nothing,
        ("rollouts.jsonl", "another tokenizer"),
    ),
    Broken(
        "grad: a mean of another policy",
        row("grad-store").replace("P0", "other"),
        nothing,
        ("mean.safetensors", "another policy"),
    ),
    Broken(
        "grad: a mean of another objective",
        row("grad-store") + " --weighting none",
        nothing,
        ("mean.safetensors", "another objective"),
    ),
    Broken("grad: a mean without halves", row("grad-halves").replace("halves.saf", "mean.saf"), nothing, ("--halves",)),
    Broken(
        "grad: forward mode without a mean",
        "cropi-grad --model P0 rollouts.jsonl --method jvp",
        nothing,
        ("--against",),
        2,
    ),
    Broken(
        "grad: a clip of one number",
        row("grad-store") + " --ppo-clip 0.2",
        nothing,
        ("--ppo-clip 0.2", "two numbers"),
        2,
    ),
    Broken("grad: bounds turned round", row("grad-store") + " --weight-clip 2,1", nothing, ("--weight-clip 2,1",), 2),
    Broken(
        "grad: nothing to clip", row("grad-store") + " --weighting none --ppo-clip .2,.2", nothing, ("no weights",), 2
    ),
    Broken("grad: no such parameter", row("grad-raw") + " --params lm_*", nothing, ("--params lm_*",), 2),
    Broken(
        "grad: no optimizer state", row("grad-raw") + " --preconditioner P0", nothing, ("P0", "optimizer.safetensors")
    ),
    Broken(
        "grad: a name twice",
        row("grad-store") + " --against target=halves.safetensors",
        nothing,
        ("--against", "own"),
        2,
    ),
    Broken("grad: halves of three", row("grad-halves") + " -n 3", nothing, ("--halves", "-n 4"), 2),
    Broken("grad: adapters have no state", row("grad-adapters") + " --preconditioner P1", nothing, ("--lora",), 2),
    Broken("grad: nothing to checkpoint", row("grad-forward") + " --checkpoint-activations", nothing, ("jvp",), 2),
    Broken("grad: no mean", row("grad-store"), gone("mean.safetensors"), ("mean.safetensors", "no such file")),
    Broken("grad: a mean cut short", row("grad-store"), cut("mean.safetensors"), ("mean.safetensors", "safetensors")),
    Broken(
        "grad: a mean that is none",
        row("grad-store").replace("mean.safetensors", "P0/model.safetensors"),
        nothing,
        ("not a mean gradient",),
    ),
    Broken("grad: a dimension of 63", row("grad-store") + " --dim 63", nothing, ("--dim 63", "64 or more"), 2),
    Broken(
        "project: a mean cut short", row("project-mean"), cut("mean.safetensors"), ("mean.safetensors", "safetensors")
    ),
    Broken("project: no mean", row("project-mean"), gone("mean.safetensors"), ("mean.safetensors", "no such file")),
    Broken(
        "project: a fold that does not divide", "cropi-project grads.zarr --dim 192", nothing, ("192", "divisor"), 2
    ),
    Broken(
        "project: anew from a sketch",
        "cropi-project sketch.zarr --dim 64 --sketch sparse-jl",
        nothing,
        ("sketch.zarr", "countsketch"),
        2,
    ),
    Broken("project: no dimension", "cropi-project raw.zarr", nothing, ("--dim",), 2),
    Broken("project: keep without a sparse sketch", row("project") + " --keep 0.5", nothing, ("keep",), 2),
    Broken(
        "project: fidelity into a file",
        "cropi-project grads.zarr --fidelity target=mean.safetensors",
        nothing,
        ("leave -o",),
        2,
    ),
    Broken("project: a check into a file", "cropi-project grads.zarr --check", nothing, ("leave -o",), 2),
    *(
        Broken(f"{name}: {what}", row(name), inside(store, harm), (store, *says))
        for name, store in (
            ("score", "grads.zarr"),
            ("score-sketches", "sketch.zarr"),
            ("score-sketches", "mean.sketch.zarr"),
            ("project", "raw.zarr"),
        )
        for what, harm, says in (
            (f"{store} is missing", shutil.rmtree, ("no such store",)),
            (f"{store} has no manifest", lambda s: (s / "manifest.json").unlink(), ("manifest.json", "unfinished")),
            (f"{store} has no group", lambda s: (s / "zarr.json").unlink(), ("make it again",)),
            (f"{store} has no vector", lambda s: shutil.rmtree(s / "vector"), ("make it again",)),
            (f"{store} has no index", lambda s: (s / "index.jsonl").unlink(), ("index.jsonl",)),
            (
                f"{store} has lost an index line",
                lambda s: (s / "index.jsonl").write_text(
                    "".join((s / "index.jsonl").read_text().splitlines(keepends=True)[:-1])
                ),
                ("index",),
            ),
            (
                f"{store} has a column cut short",
                lambda s: os.truncate(s / "sketch_norm" / "c" / "0", 2),
                ("sketch_norm",),
            ),
        )
        if not (store in ("grads.zarr", "sketch.zarr") and "column" in what)  # scoring does not read that column
    ),
    *(
        Broken(f"{name}: {what}", row(name), inside(store, harm), (store, *says))
        for name, store in (
            ("score-sketches", "sketch.zarr"),
            ("score-sketches", "mean.sketch.zarr"),
            ("project", "raw.zarr"),
        )
        for what, harm, says in (
            (f"{store} has lost a chunk", lambda s: (s / "vector" / "c" / "0" / "0").unlink(), ("make", "again")),
            (
                f"{store} has a chunk cut short",
                lambda s: os.truncate(s / "vector" / "c" / "0" / "0", 1000),
                ("make", "again"),
            ),
            (f"{store} holds NaN", chunk_of_nan, ("rows from 0", "not the chunk that was written")),
        )
        if not (store == "raw.zarr" and "NaN" in what)
    ),
    Broken("score: no inner products", "cropi-score raw.zarr", nothing, ("raw.zarr", "--against", "--valid")),
    Broken(
        "score: another projection",
        "cropi-score grads.zarr --valid t=raw.zarr",
        nothing,
        ("grads.zarr", "raw.zarr", "projections", "method"),
    ),
    Broken(
        "score: suspects without halves",
        "cropi-score grads.zarr --suspects rollouts.jsonl",
        nothing,
        ("grads.zarr", "--halves"),
    ),
    Broken(
        "score: suspects and reliability",
        "cropi-score halves.zarr --suspects r.jsonl --reliability",
        nothing,
        ("--suspects",),
        2,
    ),
    Broken("score: the same store twice", "cropi-score grads.zarr grads.zarr", nothing, ("grads.zarr", "'p")),
    Broken(
        "score: another dimension",
        "cropi-score sketch.zarr --valid t=small.zarr",
        nothing,
        ("sketch.zarr", "small.zarr", "dim"),
    ),
    Broken(
        "score: another policy",
        "cropi-score sketch.zarr --valid t=stranger.zarr",
        nothing,
        ("stranger.zarr", "policies"),
    ),
    Broken(
        "score: an index out of order",
        row("score"),
        inside("grads.zarr", record("index.jsonl", 1, lambda r: r.update(row=7))),
        ("index.jsonl:1", "row 7"),
    ),
    Broken(
        "score: norms of a sketch of a mean", "cropi-score grads.zarr --norms mean.sketch.zarr", nothing, ("prompt 'p",)
    ),
    Broken(
        "score: norms for inner products",
        "cropi-score grads.zarr --similarity dot --norms raw.zarr",
        nothing,
        ("--norms",),
        2,
    ),
    Broken("score: each of no set", "cropi-score grads.zarr --each", nothing, ("--each", "--valid"), 2),
    Broken("score: JSON of scores", "cropi-score grads.zarr --json", nothing, ("--json", "--reliability"), 2),
    Broken("score: reliability into a file", row("score") + " --reliability", nothing, ("--reliability", "-o"), 2),
    Broken("score: no name", "cropi-score sketch.zarr --valid mean.sketch.zarr", nothing, ("--valid", "NAME=VALUE"), 2),
    Broken(
        "select: a score that is no number",
        row("select"),
        record("scores.jsonl", 1, lambda r: r.update(scores={"target": float("nan")})),
        ("p0", "finite"),
    ),
    Broken("select: a prompt without its score", row("select"), line("scores.jsonl", 1, ""), ("p0",)),
    Broken("select: a share of 2", row("select") + " --ratio 2", nothing, ("ratio 2", "(0, 1]"), 2),
    Broken("select: no scores", "cropi-select --prompts prompts.jsonl", nothing, ("scores",), 2),
]
