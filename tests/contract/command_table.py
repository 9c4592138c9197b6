"""The commands the contract suite runs: a new command, or a new way to use one, is one more row.

Words name files of the chain, which conftest.py builds in this order: each row's result is the input of later ones.
Sizes are such that every command commits several times and still ends within about a second.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

HEAVY = frozenset(
    {"torch", "numpy", "zarr", "numba", "transformers", "matplotlib", "reasoning_gym", "math_verify", "sklearn"}
)

COMMANDS = ("prompts", "rollout", "verify", "grad", "embed", "project", "score", "select", "train", "report")
"""Every console script, without `cropi-`."""


@dataclass(frozen=True)
class Case:
    """One way to use a command.

    words: the line, without `-o`. output: the name its result has in the chain; folder: whether that is one. inputs:
    the words that are JSONL files and may be `-`. other: options that ask for another result; differs: how the refusal
    names that. light: the command loads no torch. committed, of a command that commits before its end: a file of the
    unfinished work ("" is the work itself), bytes it holds, and others to put there, by which work that was kept is
    told from work done again. exempt: files that hold times or hosts.
    """

    name: str
    words: str
    output: str
    other: str
    differs: str
    inputs: tuple[str, ...] = ()
    folder: bool = False
    light: bool = False
    committed: tuple[str, bytes, bytes] | None = None
    stops_at_once: bool = False
    exempt: frozenset[str] = frozenset({"manifest.json"})

    @property
    def line(self) -> list[str]:
        """The whole command line."""
        return [*self.words.split(), "-o", self.output]

    def to(self, output: str) -> list[str]:
        """The command line with another output."""
        return [*self.words.split(), "-o", output]


SAMPLED = "--max-tokens 6 --verifier parity.py:reward"

CASES = [
    Case(
        name="prompts",
        words="cropi-prompts raw.jsonl --exclude valid.jsonl --size 12",
        output="prompts.jsonl",
        other="--size 3",
        differs="size 12, now 3",
        inputs=("raw.jsonl",),
        light=True,
    ),
    Case(
        name="rollout",
        words=f"cropi-rollout --model P0 prompts.jsonl -n 64 {SAMPLED}",
        output="rollouts.jsonl",
        other="--temperature 0.5",
        differs="temperature 1.0, now 0.5",
        inputs=("prompts.jsonl",),
        committed=("", b'"source": "even"', b'"source": "kept"'),
    ),
    Case(
        name="rollout-packed",
        words=f"cropi-rollout --model P0 valid.jsonl -n 16 {SAMPLED}",
        output="valid.rollouts.jsonl.gz",
        other="--seed 1",
        differs="seed 0, now 1",
        inputs=("valid.jsonl",),
    ),
    Case(
        name="verify",
        words="cropi-verify rollouts.jsonl --verifier exact",
        output="verified.jsonl",
        other="--limit 2",
        differs="limit None, now 2",
        inputs=("rollouts.jsonl",),
        light=True,
        committed=("", b'"source": "even"', b'"source": "kept"'),
    ),
    Case(
        name="rollout-refresh",
        words=f"cropi-rollout --model P0 --refresh verified.jsonl --where zero-advantage -n 64 {SAMPLED}",
        output="refreshed.jsonl",
        other="--seed 1",
        differs="seed 0, now 1",
        inputs=("verified.jsonl",),
    ),
    Case(
        name="grad-mean",
        words="cropi-grad --model P0 valid.rollouts.jsonl.gz --mean",
        output="mean.safetensors",
        other="--weighting none",
        differs="weighting token, now none",
        inputs=("valid.rollouts.jsonl.gz",),
    ),
    Case(
        name="grad-store",
        words="cropi-grad --model P0 rollouts.jsonl --against target=mean.safetensors --dim 1048576",
        output="grads.zarr",
        other="--seed 5",
        differs="seed 0, now 5",
        inputs=("rollouts.jsonl",),
        folder=True,
        committed=("index.jsonl", b'"source": "even"', b'"source": "kept"'),
    ),
    Case(
        name="grad-raw",
        words="cropi-grad --model P0 rollouts.jsonl --sketch none",
        output="raw.zarr",
        other="--policy-temperature 0.5",
        differs="policy-temperature 1.0, now 0.5",
        folder=True,
    ),
    Case(
        name="grad-mean-halves",
        words="cropi-grad --model P0 valid.rollouts.jsonl.gz --mean --halves --method reference",
        output="halves.safetensors",
        other="--method fast",
        differs="method reference, now fast",
    ),
    Case(
        name="grad-halves",
        words="cropi-grad --model P0 rollouts.jsonl --against target=halves.safetensors --halves --dim 1048576",
        output="halves.zarr",
        other="--seed 5",
        differs="seed 0, now 5",
        folder=True,
    ),
    Case(
        name="grad-forward",
        words="cropi-grad --model P0 rollouts.jsonl --against target=halves.safetensors --halves --method jvp",
        output="forward.zarr",
        other="-n 5",
        differs="samples None, now 5",
        folder=True,
    ),
    Case(
        name="embed",
        words="cropi-embed --model P0 prompts.jsonl",
        output="features.safetensors",
        other="--shard 1/2",
        differs="shard 1/1, now 1/2",
        inputs=("prompts.jsonl",),
    ),
    Case(
        name="project",
        words="cropi-project raw.zarr --dim 1048576",
        output="sketch.zarr",
        other="--seed 5",
        differs="seed 0, now 5",
        folder=True,
        committed=("index.jsonl", b'"source": "even"', b'"source": "kept"'),
    ),
    Case(
        name="project-mean",
        words="cropi-project mean.safetensors --dim 1048576",
        output="mean.sketch.zarr",
        other="--dim 128",
        differs="dim 1048576, now 128",
        folder=True,
    ),
    Case(
        name="score",
        words="cropi-score grads.zarr",
        output="scores.jsonl",
        other="--valid target=mean.sketch.zarr",
        differs="sets [], now ['target']",
        light=True,
    ),
    Case(
        name="score-sketches",
        words="cropi-score sketch.zarr --valid target=mean.sketch.zarr",
        output="sketch.scores.jsonl",
        other="--valid also=mean.sketch.zarr",
        differs="now ['also', 'target']",
        light=True,
    ),
    Case(
        name="score-each",
        words="cropi-score sketch.zarr --valid pool=sketch.zarr --each",
        output="each.scores.jsonl.gz",
        other="--similarity dot",
        differs="similarity cosine, now dot",
        light=True,
    ),
    Case(
        name="score-dot",
        words="cropi-score grads.zarr --similarity dot",
        output="dot.scores.jsonl",
        other="--similarity cosine",
        differs="similarity dot, now cosine",
        light=True,
    ),
    Case(
        name="select",
        words="cropi-select scores.jsonl --prompts prompts.jsonl --ratio 0.5",
        output="selected.jsonl",
        other="--by random",
        differs="by influence, now random",
        inputs=("scores.jsonl", "prompts.jsonl"),
        light=True,
    ),
    Case(
        name="select-verl",
        words="cropi-select scores.jsonl --prompts prompts.jsonl --ratio 0.5 --format verl",
        output="selected.parquet",
        other="--format trl",
        differs="format verl, now trl",
        inputs=("scores.jsonl",),
        light=True,
    ),
    Case(
        name="prompts-back",
        words="cropi-prompts selected.parquet --template q{prompt} --system add --chat-template-kwargs style=1",
        output="back.jsonl",
        other="--system subtract",
        differs="system add, now subtract",
        light=True,
    ),
    Case(
        name="train",
        words="cropi-train --model P0 selected.jsonl --steps 6 --batch 4 -n 4 --save-every 2 "
        f"--eval-every 3 --eval t=valid.jsonl {SAMPLED}",
        output="P1",
        other="--learning-rate 0.5",
        differs="learning-rate 1e-06, now 0.5",
        inputs=("selected.jsonl",),
        folder=True,
        committed=("metrics.jsonl", b'{"step": 1,', b'{"step": 0,'),
        stops_at_once=True,
        exempt=frozenset({"manifest.json", "timings.jsonl"}),
    ),
    Case(
        name="grad-adam",
        words="cropi-grad --model P1 rollouts.jsonl --preconditioner P1 --params model.layers.* --weighting trajectory "
        "--weight-clip 0.1,10 --self-normalize --advantage leave-one-out --aggregation constant --dim 128",
        output="adam.zarr",
        other="--seed 5",
        differs="seed 0, now 5",
        folder=True,
    ),
    Case(
        name="grad-adapters",
        words="cropi-grad --model P0 rollouts.jsonl --lora 2 --checkpoint-activations --sketch sjlt --dim 128",
        output="adapters.zarr",
        other="--sketch sparse-gaussian",
        differs="sketch sjlt, now sparse-gaussian",
        folder=True,
    ),
]
CHANGES: dict[str, int] = {}
"""How many file changes each row makes, counted while the chain is built."""

LEFTOVERS = (
    ".part",
    ".part.json",
    ".part.lock",
    ".part.packed",
    ".part.tmp",
    ".part.json.tmp",
    ".part.old",
    ".old",
    ".manifest.json.tmp",
)


def same_content(first: Path, second: Path, exempt: frozenset[str]) -> None:
    """Fail unless two results have the same files with the same bytes, those exempt apart."""
    one, two = _content(first), _content(second)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name] and name not in exempt] == []


def _content(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(found.relative_to(path)): found.read_bytes() for found in sorted(path.rglob("*")) if found.is_file()}


def leftovers(output: Path) -> list[str]:
    """Names of unfinished work and temporary files that lie beside a result."""
    return [output.name + ending for ending in LEFTOVERS if output.with_name(output.name + ending).exists()]


def looks_whole(output: Path) -> list[str]:
    """What a failed command must not leave: its output, or a manifest of it."""
    return [path.name for path in (output, output.with_name(output.name + ".manifest.json")) if path.exists()]


def own(path: Path) -> Path:
    """Make a link to a file or folder of the chain into a copy the test may change, times kept; its manifest too."""
    for link in (path, path.with_name(path.name + ".manifest.json")):
        if link.is_symlink():
            target = link.resolve()
            link.unlink()
            if target.is_dir():
                shutil.copytree(target, link)
            else:
                shutil.copy2(target, link)
    return path
