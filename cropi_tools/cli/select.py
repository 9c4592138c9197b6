"""cropi-select: the prompts to train on."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cropi_tools.cli.common import Force, Output, Quiet, Seed, Version, command

EXAMPLE = """
cropi-select scores.jsonl --prompts train.jsonl --ratio 0.1 -o selected.jsonl
cropi-select --prompts train.jsonl --by random --ratio 0.1 --seed 3 -o random.jsonl
cropi-select scores.jsonl --prompts train.jsonl --format verl -o selected.parquet
"""


def select(
    prompts: Annotated[
        list[str], typer.Option("--prompts", help="The pool the scores belong to; may be repeated.", metavar="FILE")
    ],
    scores: Annotated[
        list[str] | None, typer.Argument(help="Scores of cropi-score (shards together).", metavar="SCORES")
    ] = None,
    output: Output = "-",
    by: Annotated[
        Literal["influence", "shuffled", "random", "learnability", "pass-rate", "full"],
        typer.Option(
            "--by",
            help="The rule; shuffled, the control, is influence with the pool permuted (one --seed for all stages).",
        ),
    ] = "influence",
    ratio: Annotated[str, typer.Option("--ratio", help="Share of the pool to select, rounded down.")] = "0.1",
    band: Annotated[
        str | None,
        typer.Option("--band", help="Pass rates that --by pass-rate accepts. [default: 0.2,0.8]", metavar="LO,HI"),
    ] = None,
    form: Annotated[
        Literal["jsonl", "verl", "trl"],
        typer.Option(
            "--format", help="Rows of ours, verl's or TRL's; the last two as parquet where -o ends in .parquet."
        ),
    ] = "jsonl",
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """The top share of the pool, merged over validation sets by reciprocal rank, or one of the baselines.

    Prompts without a score (no advantage) are never selected by influence; when fewer have one than asked for, fewer are selected.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import numbered
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.data.records import read_prompts, read_scores
    from cropi_tools.prompts.exports import TableOutput, exported, settings_needed
    from cropi_tools.runtime.errors import UsageError
    from cropi_tools.selection import rules

    runtime.set_quiet(quiet)
    limits = None
    if band is not None:
        try:
            low, high = (float(part) for part in band.split(","))
        except ValueError:
            raise UsageError(f"--band {band}: expected LO,HI such as 0.2,0.8") from None
        limits = (low, high)
    rules.selection_size(ratio, 1)
    inputs = {**numbered("prompts", prompts), **numbered("scores", scores or [])}
    options = {"by": by, "ratio": ratio, "band": limits, "seed": seed, "format": form}
    if by == "shuffled":
        options["permuted"] = "pool"  # before, only the prompts with a score were
    fingerprint = Fingerprint.of("cropi-select", options, inputs)
    table = output.endswith(".parquet")
    if table and form == "jsonl":
        raise UsageError(f"-o {output}: parquet is written with --format verl or trl")
    target = (
        TableOutput(output, fingerprint, inputs, force=force)
        if table
        else JsonLinesOutput(output, fingerprint, inputs, force)
    )
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return
    pool = {record["id"]: record for record in read_prompts(prompts)}
    if by != "full":
        rules.check_ratio(ratio, len(pool))
    known = None
    if scores:
        fields = (
            rules.Score(r["id"], r["source"], r["scores"], r["pass_rate"], r["status"]) for r in read_scores(scores)
        )
        known = {score.id: score for score in fields}
    chosen = rules.select(by, list(pool), known, ratio, seed, limits)
    wanted = len(pool) if by == "full" else rules.selection_size(ratio, len(pool))
    rates = {identity: score.pass_rate for identity, score in (known or {}).items()}
    selected = [
        {**pool[item.id], "rank": item.rank, "score": item.score, "pass_rate": rates.get(item.id)} for item in chosen
    ]
    needed = settings_needed(selected, form)
    target.append(exported(selected, form))
    if needed is not None:
        runtime.warn(needed)
    if len(chosen) < wanted:
        runtime.warn(f"only {len(chosen)} of the {wanted} prompts asked for can be selected by {by}")
    target.finish(facts={"pool": len(pool), "wanted": wanted})
    runtime.notify(f"{output}: {len(chosen)} of {len(pool)} prompts selected by {by}")


main = command(select, name="cropi-select", example=EXAMPLE)
