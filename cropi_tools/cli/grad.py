"""cropi-grad: the off-policy gradient of every prompt, or their mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cropi_tools.cli.common import Device, Dtype, Force, Limit, Model, Quiet, Seed, Shard, Version, command

EXAMPLE = """
cropi-grad --model P0 valid.rollouts.jsonl --mean -o valid.mean.safetensors
cropi-grad --model P0 train.rollouts.jsonl --against target=valid.mean.safetensors -o grads.zarr
"""


def grad(
    rollouts: Annotated[
        list[str], typer.Argument(help="Rollouts of cropi-rollout (JSONL, .gz, .zst, or `-`).", metavar="FILE")
    ],
    model: Model,
    output: Annotated[
        str,
        typer.Option("-o", "--output", help="The store to write (X.zarr), or with --mean the mean (X.safetensors)."),
    ],
    mean: Annotated[
        bool, typer.Option("--mean", help="Write the mean gradient over all prompts instead of a store.")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help="Take exact inner products with this mean gradient; may be repeated.", metavar="NAME=FILE"
        ),
    ] = None,
    weighting: Annotated[
        Literal["token", "none"],
        typer.Option("--weighting", help="Importance weight of a token: its ratio (the paper), or none."),
    ] = "token",
    policy_temperature: Annotated[
        float,
        typer.Option(
            "--policy-temperature", help="Temperature of the policy's own distribution in the ratios.", min=1e-3
        ),
    ] = 1.0,
    behavior: Annotated[
        str | None,
        typer.Option(
            "--behavior", help="Recompute the behavior policy's log-probabilities with this policy.", metavar="FOLDER"
        ),
    ] = None,
    sketch: Annotated[
        Literal["countsketch", "sparse-jl", "none"],
        typer.Option(
            "--sketch", help="How rows are compressed: all coordinates, the paper's kept fraction, or not at all."
        ),
    ] = "countsketch",
    dim: Annotated[int, typer.Option("--dim", help="Sketch dimensions, a multiple of 64.")] = 65536,
    keep: Annotated[
        float, typer.Option("--keep", help="Fraction of coordinates kept by sparse-jl.", min=0.0, max=1.0)
    ] = 0.1,
    seed: Seed = 0,
    max_store: Annotated[
        float, typer.Option("--max-store", help="Largest raw store (--sketch none), in GB.", min=0.0)
    ] = 20.0,
    shard: Shard = "1/1",
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """The off-policy gradient of every prompt from its stored rollouts, sketched while it is in memory.

    Prompts whose samples all have the same reward have no gradient; they are skipped before the forward pass and recorded.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import numbered, parse_named, parse_shard
    from cropi_tools.data.errors import UsageError
    from cropi_tools.data.manifest import Fingerprint, file_input
    from cropi_tools.data.output import Output
    from cropi_tools.data.policies import policy_input, tokenizer_digest

    runtime.set_quiet(quiet)
    index, shards = parse_shard(shard)
    means = dict(parse_named(text, "--against") for text in against or [])
    if mean and means:
        raise UsageError("--mean writes a mean gradient; --against belongs to a store")
    if mean and shards > 1:
        raise UsageError("--mean takes all prompts at once; --shard belongs to a store")
    inputs = {
        "policy": policy_input(model),
        **numbered("rollouts", rollouts),
        **{f"mean {n}": file_input(p) for n, p in means.items()},
    }
    if behavior:
        inputs["behavior policy"] = policy_input(behavior)
    objective = {
        "weighting": weighting,
        "policy_temperature": policy_temperature,
        "behavior": inputs["behavior policy"].sha256 if behavior else "sampled",
        "aggregation": "sequence",
    }
    options = {"mean": mean, **objective, "dtype": dtype, "shard": shard, "limit": limit}
    if not mean:
        options.update(
            sketch=sketch,
            seed=seed,
            dim=None if sketch == "none" else dim,
            keep=keep if sketch == "sparse-jl" else None,
        )
    target = Output(output, Fingerprint.of("cropi-grad", options, inputs), inputs, folder=not mean, force=force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return

    from cropi_tools.data.policies import same_tokenizer
    from cropi_tools.influence import collect
    from cropi_tools.influence.gradients import GradientComputer, GradientSettings
    from cropi_tools.influence.projection import Layout, ProjectionSpec
    from cropi_tools.policy.loading import load_policy

    for path in rollouts:
        same_tokenizer(path, model)
    policy = load_policy(model, device, dtype)
    work = collect.survey(rollouts, policy.vocabulary, (index, shards), limit)
    settings = GradientSettings(weighting, policy_temperature)
    computer = GradientComputer(policy, settings, load_policy(behavior, device, dtype) if behavior else None)
    layout = Layout.of(computer.parameters)
    facts: dict[str, Any] = {
        "policy": inputs["policy"].sha256,
        "tokenizer": tokenizer_digest(model),
        "objective": objective,
    }
    if mean:
        counts = collect.collect_mean(computer, work, target, layout, facts)
    else:
        if not work.live:
            runtime.warn(
                f"none of the {work.prompts} prompts has samples of different rewards: there is nothing to rank"
            )
        spec = ProjectionSpec.create(
            sketch, layout, None if sketch == "none" else dim, seed, keep if sketch == "sparse-jl" else None
        )
        if sketch == "none":
            collect.fits(target.path, work.live, layout.size, int(max_store * 1e9))
        known = collect.Against(means, layout, facts["policy"], objective, policy.device)
        attributes = {**facts, "projection": spec.to_json(), "layout": layout.to_json(), "device": str(policy.device)}
        counts = collect.collect_store(computer, work, target, spec, layout, known, attributes)
    skipped = ", ".join(f"{count} {status}" for status, count in collect.without_gradient(counts).items())
    runtime.notify(
        f"{output}: {counts.get('ok', 0)} of {work.prompts} prompts have a gradient{f' ({skipped})' if skipped else ''}"
    )


main = command(grad, name="cropi-grad", example=EXAMPLE)
