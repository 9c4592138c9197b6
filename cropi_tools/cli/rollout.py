"""cropi-rollout: sample responses and verify them; with a test set it is the evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cropi_tools.cli.common import (
    AllowVerifier,
    AsJson,
    Date,
    Device,
    DryRun,
    Dtype,
    Force,
    Limit,
    Output,
    PartialCredit,
    Quiet,
    Seed,
    Shard,
    Temperature,
    VerifySeconds,
    Version,
    command,
)
from cropi_tools.data.dates import DEFAULT_DATE

if TYPE_CHECKING:
    from cropi_tools.data.manifest import Input

EXAMPLE = """
cropi-rollout --model P0 train.jsonl -n 8 -o train.rollouts.jsonl
cropi-rollout --model P1 test.jsonl -n 4 --json -o test.rollouts.jsonl | jq .accuracy
cropi-rollout --model P1 --refresh train.rollouts.jsonl --where zero-advantage -o train.2.rollouts.jsonl
cropi-rollout --verify-only train.rollouts.jsonl --verifier mine.py:reward -o regraded.jsonl
"""


def rollout(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts (JSONL, .gz, .zst, or `-`); with --verify-only, rollouts.", metavar="[FILE]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The policy: a Hugging Face folder.", metavar="FOLDER")
    ] = None,
    output: Output = "-",
    samples: Annotated[
        int | None,
        typer.Option(
            "-n", "--samples", help="Samples per prompt. [default: 8; with --refresh as many as there were]", min=1
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            help="Longest response, in tokens; with --verify-only on texts, the limit they had. [default: 1024]",
            min=1,
        ),
    ] = None,
    temperature: Temperature = 1.0,
    verifier: Annotated[
        str,
        typer.Option(
            "--verifier",
            help="maths, choice, exact, reasoning-gym, or FILE.py:FUNCTION; a record's own `verifier` comes first. With "
            "--verify-only also `recorded`: the rewards stay.",
        ),
    ] = "maths",
    allow_verifier: AllowVerifier = None,
    verify_seconds: VerifySeconds = 10.0,
    partial_credit: PartialCredit = False,
    engine: Annotated[
        Literal["transformers", "vllm", "server"],
        typer.Option("--engine", help="What samples: in this process, or an OpenAI-compatible server."),
    ] = "transformers",
    server: Annotated[
        str | None,
        typer.Option("--server", help="Its address; a key is read from OPENAI_API_KEY alone.", metavar="URL"),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option("--served-model", help="The model's name there. [default: the only one]")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", help="Most requests at once to a server.", min=1)] = 64,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Grade the responses of rollouts again; nothing is sampled.")
    ] = False,
    dump_prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", help="With --verify-only on verl's dumps: the prompts they are of.", metavar="FILE"),
    ] = None,
    refresh: Annotated[
        list[str] | None,
        typer.Option(
            "--refresh", help="Rollouts of which to sample some prompts anew, keeping the rest.", metavar="FILE"
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            help="Which: zero-advantage, empty, zero-gradient, low-ess[=SHARE] (of n importance weights, at least 1/n) or all; "
            "may be repeated.",
            metavar="STATUS",
        ),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option("--index", help="The gradient store that knows a status; may be repeated.", metavar="STORE"),
    ] = None,
    seed: Seed = 0,
    shard: Shard = "1/1",
    limit: Limit = None,
    date: Date = DEFAULT_DATE,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Sample responses to every prompt, verify them, and say how accurate they are.

    Every sample has its own seed, made of --seed, the prompt's id and the sample's number. The summary (accuracy and pass@k with
    95 % intervals over prompts, lengths; for every source) goes to stderr, or with --json to stdout.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import parse_shard, warn_of_other_dates
    from cropi_tools.data.dates import asks_for_date, parse_date
    from cropi_tools.data.jsonl import is_stream
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint, numbered
    from cropi_tools.data.policies import has_weights, policy_input, tokens_input
    from cropi_tools.rewards import (
        allow_files,
        check_own_verifiers,
        check_partial_credit,
        check_verifier,
        verifier_fingerprint,
    )
    from cropi_tools.runtime.errors import UsageError

    runtime.set_quiet(quiet)
    if as_json and is_stream(output) and not dry_run:
        raise UsageError("--json prints the summary on stdout, where the rollouts go; name a file with -o")
    part = parse_shard(shard)
    try:
        date = parse_date(date)
    except UsageError as error:
        raise UsageError(f"--date {date}: {error}") from None
    sources = refresh or prompts or []
    _check_mode(
        prompts=prompts,
        model=model,
        engine=engine,
        server=server,
        verify_only=verify_only,
        dump_prompts=dump_prompts,
        refresh=refresh,
        where=where,
        index=index,
        dry_run=dry_run,
        samples=samples,
        served_model=served_model,
    )
    allow_files(allow_verifier or [])
    keep_rewards = verify_only and verifier == "recorded"
    if not keep_rewards:
        check_verifier(verifier)
    inputs: dict[str, Input] = {}
    graded_by = verifier if keep_rewards else verifier_fingerprint(verifier)
    options: dict[str, Any] = {"verifier": graded_by, "verify_seconds": verify_seconds, "shard": shard, "limit": limit}
    if not keep_rewards:
        options["own_verifiers"] = check_own_verifiers(sources, verifier)
        options["partial_credit"] = partial_credit
    check_partial_credit(partial_credit, {verifier, *options.get("own_verifiers", ())})
    if model is not None:
        # a folder with the tokenizer alone will do where nothing is sampled from it here
        bare = verify_only or (engine == "server" and not has_weights(model))
        if bare and refresh:
            raise UsageError(
                "--refresh notes whose the new samples are: --model must be the served policy, with its weights"
            )
        inputs["policy"] = (tokens_input if bare else policy_input)(model)
        if asks_for_date(model):
            options["date"] = date
            warn_of_other_dates([model, *sources], date)
    inputs |= numbered("rollouts" if refresh or verify_only else "prompts", sources)
    inputs |= numbered("prompts of the dump", dump_prompts or [])
    if verify_only:
        options |= {"verify_only": True, "max_tokens": max_tokens}
    else:
        max_tokens = max_tokens or 1024
        samples = samples or (None if refresh else 8)
        options |= {"samples": samples, "max_tokens": max_tokens, "temperature": temperature, "engine": engine}
        options |= {"seed": seed, "dtype": dtype}
        if engine == "server":
            options["served_model"] = served_model
    indexes: list[str] = []
    if refresh:
        from cropi_tools.rollouts.refreshing import index_files

        options["where"] = sorted(set(where or []))
        indexes = index_files(where or [], index or [])
        inputs |= numbered("index", indexes)
    target = JsonLinesOutput(output, Fingerprint.of("cropi-rollout", options, inputs), inputs, force)
    if not dry_run and not target.open():
        runtime.notify(f"{output}: up to date")
        _show(target.finished_facts()["summary"], as_json)
        return
    if verify_only:
        from cropi_tools.rollouts.regrading import Regrading, regrade

        _show(
            regrade(
                Regrading(
                    sources,
                    verifier,
                    verify_seconds,
                    partial_credit,
                    model,
                    dump_prompts or [],
                    max_tokens,
                    part,
                    limit,
                    date,
                ),
                target,
            ),
            as_json,
        )
        return

    from cropi_tools.engines.choose import Server
    from cropi_tools.engines.protocol import Sampling
    from cropi_tools.rollouts import run

    assert model is not None
    assert max_tokens is not None
    wish = run.Plan(
        sources=sources,
        policy=model,
        policy_digest=inputs["policy"].sha256,
        refresh=where if refresh else None,
        indexes=indexes,
        samples=samples,
        sampling=Sampling(max_tokens, temperature),
        seed=seed,
        verifier=verifier,
        verify_seconds=verify_seconds,
        partial_credit=partial_credit,
        shard=part,
        limit=limit,
        engine=engine,
        server=Server(server, served_model, concurrency) if server else None,
        device=device,
        dtype=dtype,
        date=date,
    )
    if dry_run:
        found = run.dry_run(wish)
        print(json.dumps(found._asdict()) if as_json else "\n".join(found.lines()))
        return
    _show(run.sample(wish, target), as_json)


def _check_mode(**given: Any) -> None:
    """UsageError for options that contradict each other or lack another."""
    from cropi_tools.runtime.errors import UsageError

    sampling = not given["verify_only"]
    mistakes = [
        (given["prompts"] and given["refresh"], "--refresh FILE names the rollouts; leave the prompts out"),
        (not (given["prompts"] or given["refresh"]), f"name a file of {'prompts' if sampling else 'rollouts'}"),
        (sampling and not given["model"], "--model FOLDER says which policy to sample from"),
        (not sampling and given["refresh"], "--verify-only samples nothing, --refresh does: choose one"),
        (not sampling and given["dry_run"], "--dry-run measures sampling; --verify-only has none"),
        (given["refresh"] and not given["where"], "--refresh needs --where STATUS, such as --where zero-advantage"),
        (given["where"] and not given["refresh"], "--where chooses prompts of --refresh FILE"),
        (given["index"] and not given["refresh"], "--index tells the status of prompts of --refresh FILE"),
        (given["dump_prompts"] and sampling, "--prompts names the prompts of dumps that --verify-only reads"),
        (given["engine"] == "server" and not given["server"], "--engine server needs --server URL"),
        (given["engine"] != "server" and given["server"], "--server URL is for --engine server"),
        (given["served_model"] and not given["server"], "--served-model names a model of --server URL"),
        (given["samples"] and not sampling, "--verify-only samples nothing; leave -n out"),
    ]
    for wrong, remedy in mistakes:
        if wrong:
            raise UsageError(remedy)


def _show(summary: Mapping[str, Any], as_json: bool) -> None:
    """The summary as JSON on stdout, or as a table on stderr."""
    from cropi_tools import runtime
    from cropi_tools.rollouts.metrics import table

    if as_json:
        print(json.dumps(summary))
        return
    for line in table(summary):
        runtime.notify(line)


main = command(rollout, name="cropi-rollout", example=EXAMPLE)
