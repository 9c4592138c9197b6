"""What a recipe will take, by arithmetic: tokens, floating-point operations and, at rates that you give, GPU-hours.

    python examples/paper_cost.py CONFIG --pool N --prompt-tokens N --tokens N --live SHARE [--eval-prompts N]
                                  [--tokens-per-second X] [--flops X] [NAME=VALUE ...]

Samples, stages, steps, arms and seeds are the config's, or those of NAME=VALUE (`STAGES=2`), which make gets. What only a measurement can tell
has no default. A policy of P parameters takes 2 P operations a token forward and 4 P backward, attention apart.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools.training.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
FORWARD, BACKWARD = 2, 4  # operations a parameter and token
WITHOUT_SCORES = ("full", "random")
RESCORED = ("cropi", "shuffled")  # the arms that score every stage again
READ = (
    *("PARAMETERS", "ARMS", "SEEDS", "STAGES", "STEPS", "SAMPLES", "VALID", "VALID_SIZE", "VALID_SAMPLES"),
    *("GRAD_OPTIONS", "TRAIN_OPTIONS"),
)
"""What is read of a config."""


class Counts(NamedTuple):
    """What decides the cost.

    pool, valid, tests: prompts, of all sets together. prompt_tokens, tokens: of a prompt and of a response, on average. live: share of groups
    with unequal rewards, which alone have a gradient. in_update: share of groups that training computes; verl leaves out none. evaluations: a
    stage. passes, update: operations a parameter and token, of scoring and of training.
    """

    parameters: float
    arms: Sequence[str]
    seeds: int
    stages: int
    steps: int
    batch: int
    samples: int
    valid_samples: int
    pool: int
    valid: int
    prompt_tokens: float
    tokens: float
    live: float
    in_update: float
    tests: int = 0
    evaluations: int = 0
    passes: int = FORWARD + BACKWARD
    update: int = FORWARD + BACKWARD


class Work(NamedTuple):
    """Tokens generated, tokens of gradients to train and to score, operations of these gradients."""

    generated: float = 0.0
    trained: float = 0.0
    scored: float = 0.0
    flops: float = 0.0

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*(mine + its for mine, its in zip(self, other, strict=True)))

    def times(self, count: float) -> Work:
        """So many of it."""
        return Work(*(value * count for value in self))


def sampling(of: Counts) -> Work:
    """The starting policy's rollouts of the pool and of the targets."""
    return Work(generated=(of.pool * of.samples + of.valid * of.valid_samples) * of.tokens)


def scoring(of: Counts) -> Work:
    """The gradients of the pool and of the targets; a prompt's own tokens are computed once. Of the targets all prompts count as live."""
    pool = of.live * of.pool * (of.prompt_tokens + of.samples * of.tokens)
    scored = pool + of.valid * (of.prompt_tokens + of.valid_samples * of.tokens)
    return Work(scored=scored, flops=of.passes * of.parameters * scored)


def training(of: Counts) -> Work:
    """A stage of an arm, its evaluations among it."""
    prompts = of.steps * of.batch
    trained = of.in_update * prompts * (of.prompt_tokens + of.samples * of.tokens)
    generated = (prompts * of.samples + of.evaluations * of.tests) * of.tokens
    return Work(generated=generated, trained=trained, flops=of.update * of.parameters * trained)


def rows(of: Counts) -> list[tuple[str, Work]]:
    """What is made once, a seed of each arm, and everything."""
    once = sampling(of).plus(scoring(of)) if set(of.arms) - {*WITHOUT_SCORES} else Work()
    found = [("start, once for all arms", once)]
    whole = once
    for arm in of.arms:
        work = training(of).times(of.stages)
        if arm in RESCORED:
            work = work.plus(scoring(of).times(of.stages - 1))
        found.append((f"{arm}, a seed", work))
        whole = whole.plus(work.times(of.seeds))
    return [*found, (f"all, {of.seeds} seeds" if of.seeds > 1 else "all", whole)]


def table(
    found: Sequence[tuple[str, Work]],
    parameters: float,
    tokens_per_second: float | None = None,
    flops: float | None = None,
) -> list[str]:
    """Lines for people: GPU-hours only where the rate is known, and their sum where both are."""
    names = ["tokens generated", "trained", "scored", "FLOPs generating", "of gradients"]
    names += ["GPU-hours generating"] * bool(tokens_per_second) + ["gradients"] * bool(flops)
    names += ["together"] * bool(tokens_per_second and flops)
    lines = [["", *names]]
    for name, work in found:
        cells = [f"{count / 1e6:,.0f} M" if count else "-" for count in work[:3]]
        cells += [f"{count:.2e}" if count else "-" for count in (FORWARD * parameters * work.generated, work.flops)]
        hours = [work.generated / tokens_per_second / 3600] if tokens_per_second else []
        hours += [work.flops / flops / 3600] if flops else []
        hours += [sum(hours)] if len(hours) > 1 else []
        lines.append([name, *cells, *(f"{hour:,.1f}" for hour in hours)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def values_of(config: str, given: Sequence[str]) -> dict[str, str]:
    """The values of READ that make finds in a config. CalledProcessError: it refuses them, and has said why."""
    asking = "".join(f"$(info {name}=$(if $(value {name}),$({name})))" for name in READ)
    words = ["make", "--no-print-directory", "--silent", f"CONFIG={Path(config).resolve()}", *given]
    # CHECKING: no file of the run need be there
    words += ["CHECKING=1", f"--eval=counts: ; {asking}", "counts"]
    said = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in said.splitlines() if line.partition("=")[0] in READ)


def counts_of(values: dict[str, str], asked: argparse.Namespace) -> Counts:
    """A config's values and what was asked. KeyError: the config has not one of them."""
    missing = [name for name in READ[:-2] if not values[name]]
    if missing:
        raise KeyError(missing[0])
    train, grad = (shlex.split(values[name]) for name in ("TRAIN_OPTIONS", "GRAD_OPTIONS"))
    preset: dict[str, Any] = PRESETS.get(after(train, "--preset", ""), {})
    steps, every = int(values["STEPS"]), int(after(train, "--eval-every", "25"))
    again = FORWARD * ("--checkpoint-activations" in train)
    reference = FORWARD * (float(after(train, "--kl", preset.get("kl", 0))) > 0)
    recomputed = FORWARD * (("--checkpoint-activations" in grad) + ("--behavior" in grad))
    return Counts(
        parameters=float(values["PARAMETERS"]),
        arms=values["ARMS"].split(),
        seeds=len(values["SEEDS"].split()),
        stages=int(values["STAGES"]),
        steps=steps,
        batch=int(after(train, "--batch", preset.get("batch", 128))),
        samples=int(values["SAMPLES"]),
        valid_samples=int(values["VALID_SAMPLES"]),
        pool=asked.pool,
        valid=len(values["VALID"].split()) * int(values["VALID_SIZE"]),
        prompt_tokens=asked.prompt_tokens,
        tokens=asked.tokens,
        live=asked.live,
        in_update=1.0 if after(train, "--engine", "") == "verl" else asked.live,
        tests=asked.eval_prompts * int(after(train, "--eval-samples", "1")),
        # at 0, every so many steps, and at the end
        evaluations=1 + -(-steps // every),
        passes=FORWARD + BACKWARD + recomputed,
        update=FORWARD + BACKWARD + again + reference,
    )


def after(words: Sequence[str], flag: str, otherwise: Any) -> Any:
    """The word that follows a flag, the last time it comes."""
    places = [place for place, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else otherwise


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Tokens, FLOPs and GPU-hours of a recipe, by arithmetic.")
    parser.add_argument("config", metavar="CONFIG", help="such as examples/qwen2.5-1.5b-math/config.mk")
    parser.add_argument("given", nargs="*", metavar="NAME=VALUE", help="values in place of the config's: STAGES=2")
    parser.add_argument("--pool", type=int, required=True, help="prompts of the pool")
    parser.add_argument("--prompt-tokens", type=float, required=True, help="of a prompt, on average")
    parser.add_argument("--tokens", type=float, required=True, help="of a response, on average")
    parser.add_argument("--live", type=float, required=True, help="share of prompts with unequal rewards, 0 to 1")
    parser.add_argument("--eval-prompts", type=int, default=0, help="of all test sets; 0: evaluations apart")
    parser.add_argument("--tokens-per-second", type=float, help="that one GPU generates")
    parser.add_argument("--flops", type=float, help="that one GPU sustains in gradients, such as 4e14")
    asked = parser.parse_intermixed_args()
    if not 0 <= asked.live <= 1:
        parser.error(f"--live {asked.live:g}: must be 0 to 1")
    for rate in ("tokens_per_second", "flops"):
        if getattr(asked, rate) is not None and not getattr(asked, rate) > 0:
            parser.error(f"--{rate.replace('_', '-')}: must be above 0")
    try:
        counts = counts_of(values_of(asked.config, asked.given), asked)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyError as missing:
        parser.error(f"{asked.config} does not set {missing.args[0]}")
    print("\n".join(table(rows(counts), counts.parameters, asked.tokens_per_second, asked.flops)))


if __name__ == "__main__":
    main()
