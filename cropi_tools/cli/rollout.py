"""cropi-rollout: sample responses and verify them; with a test set it is the evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cropi_tools.cli.common import (
    AsJson,
    Device,
    Dtype,
    Force,
    Limit,
    MaxTokens,
    Model,
    Output,
    Quiet,
    Samples,
    Seed,
    Shard,
    Temperature,
    Verifier,
    Version,
    command,
)

EXAMPLE = """
cropi-rollout --model P0 train.jsonl -n 8 -o train.rollouts.jsonl
cropi-rollout --model P1 test.jsonl -n 4 --json -o test.rollouts.jsonl | jq .accuracy
"""


def rollout(
    prompts: Annotated[list[str], typer.Argument(help="Prompts (JSONL, .gz, .zst, or `-`).", metavar="FILE")],
    model: Model,
    output: Output = "-",
    samples: Samples = 8,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    verifier: Verifier = "maths",
    engine: Annotated[Literal["transformers"], typer.Option("--engine", help="What samples.")] = "transformers",
    seed: Seed = 0,
    shard: Shard = "1/1",
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Sample responses to every prompt, verify them, and say how accurate they are.

    Every sample has its own seed, made of --seed, the prompt's id and the sample's number.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import numbered, parse_shard
    from cropi_tools.data.errors import UsageError
    from cropi_tools.data.jsonl import is_stream
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.data.output import JsonLinesOutput
    from cropi_tools.data.policies import policy_input, tokenizer_digest

    runtime.set_quiet(quiet)
    if as_json and is_stream(output):
        raise UsageError("--json prints the summary on stdout, where the rollouts go; name a file with -o")
    index, shards = parse_shard(shard)
    from cropi_tools.rewards import check_verifier, verifier_fingerprint

    check_verifier(verifier)
    inputs = {"policy": policy_input(model), **numbered("prompts", prompts)}
    options = {
        "samples": samples,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "verifier": verifier_fingerprint(verifier),
        "engine": engine,
        "seed": seed,
        "shard": shard,
        "limit": limit,
        "dtype": dtype,
    }
    target = JsonLinesOutput(output, Fingerprint.of("cropi-rollout", options, inputs), inputs, force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        _show(target.finished_facts()["summary"], as_json)
        return

    from itertools import islice

    from cropi_tools.data.records import read_prompts, shard_range
    from cropi_tools.engines.protocol import Sampling
    from cropi_tools.engines.transformers_engine import TransformersEngine
    from cropi_tools.policy.loading import load_policy
    from cropi_tools.rewards import VerifierPool, check_record
    from cropi_tools.rollouts import Tallies, chunks, sample_and_verify

    # the whole file is checked before the first sample: a bad line at its end is found now
    count = 0
    for record in read_prompts(prompts):
        check_record(record, verifier)
        count += 1
    start, stop = shard_range(count if limit is None else min(count, limit), index, shards)
    policy = load_policy(model, device, dtype)
    sampler = TransformersEngine(policy)
    sampling = Sampling(max_tokens, temperature)
    tallies = Tallies(target.state)
    wanted = islice(read_prompts(prompts), start + target.lines, stop)
    with VerifierPool(verifier) as pool, runtime.progress("rollouts", stop - start, target.lines) as shown:
        for group in chunks(wanted, samples):
            keys = [(seed, record["id"]) for record in group]
            rows = sample_and_verify(sampler, policy, pool, group, samples, sampling, keys)
            tallies.add(rows)
            target.append(rows)
            target.commit(tallies.saved())
            total = tallies.total()
            shown.advance(len(rows), f"accuracy {total.correct / total.samples:.3f}")
            runtime.stop_if_requested()
    summary = tallies.summary()
    total = tallies.total()
    target.finish(
        ledger={"tokens_generated": total.tokens, "tokens_prompt": total.prompt_tokens, "device": str(policy.device)},
        facts={"tokenizer": tokenizer_digest(model), "summary": summary},
    )
    _show(summary, as_json)


def _show(summary: dict[str, Any], as_json: bool) -> None:
    """The summary as JSON on stdout, or as a table on stderr."""
    from cropi_tools import runtime

    if as_json:
        import json

        print(json.dumps(summary))
        return
    most = max(summary["pass_at"], key=int)
    rows = [*summary["by_source"].items()] if len(summary["by_source"]) > 1 else []
    width = max(len(name) for name in ("source", "all", *summary["by_source"]))
    runtime.notify(f"{'source':{width}}  prompts  accuracy  {'pass@' + most:>8}  tokens  truncated  equal rewards")
    for name, found in [*rows, ("all" if rows else next(iter(summary["by_source"])), summary)]:
        runtime.notify(
            f"{name:{width}}  {found['prompts']:7d}  {found['accuracy']:8.3f}  {found['pass_at'][most]:8.3f}  "
            f"{found['response_tokens']:6.1f}  {found['truncated_fraction']:9.3f}  {found['equal_rewards_fraction']:13.3f}"
        )


main = command(rollout, name="cropi-rollout", example=EXAMPLE)
