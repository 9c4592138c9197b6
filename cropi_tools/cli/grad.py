"""cropi-grad: the off-policy gradient of every prompt, or their mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cropi_tools.cli.common import POLICY, Device, Dtype, Force, Limit, Model, Quiet, Seed, Shard, Version, command

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
    halves: Annotated[
        bool,
        typer.Option(
            "--halves",
            help="Also by independent halves of the samples (with --mean: of the prompts), told by a hash, for cropi-score --reliability.",
        ),
    ] = False,
    method: Annotated[
        Literal["auto", "reference", "fast", "jvp"],
        typer.Option(
            "--method",
            help="How to differentiate: one prompt a pass (reference), several (fast), whichever fits (auto), "
            "or forward mode (jvp: inner products with --against alone, no norms, no rows).",
        ),
    ] = "auto",
    weighting: Annotated[
        Literal["none", "token", "prefix", "suffix", "trajectory", "sequence"],
        typer.Option("--weighting", help="Importance weight of a token: its ratio (the paper), or products of ratios."),
    ] = "token",
    weight_clip: Annotated[
        str | None,
        typer.Option("--weight-clip", help="Bounds of the weight; the gradient is kept.", metavar="LO,HI"),
    ] = None,
    ppo_clip: Annotated[
        str | None,
        typer.Option(
            "--ppo-clip", help="Drop the gradient beyond weights 1-LO and 1+HI, as PPO does.", metavar="LO,HI"
        ),
    ] = None,
    self_normalize: Annotated[
        bool, typer.Option("--self-normalize", help="Divide weights by their mean over the prompt's tokens.")
    ] = False,
    advantage: Annotated[
        Literal["group", "centered", "leave-one-out"],
        typer.Option("--advantage", help="Reward less the group's mean, over its deviation (group); or without it."),
    ] = "group",
    aggregation: Annotated[
        Literal["sequence", "token", "constant"],
        typer.Option("--aggregation", help="What a token's term is divided by: GRPO, DAPO, Dr.GRPO."),
    ] = "sequence",
    policy_temperature: Annotated[
        float,
        typer.Option(
            "--policy-temperature", help="Temperature of the policy's own distribution in the ratios.", min=1e-3
        ),
    ] = 1.0,
    behavior: Annotated[
        str | None,
        typer.Option(
            "--behavior", help="Recompute the behavior policy's log-probabilities with this policy.", metavar=POLICY
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("-n", "--samples", help="Use the first N samples of each prompt.", min=2, metavar="N")
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option("--params", help="Only parameters of these names (*, ?); may be repeated.", metavar="GLOB"),
    ] = None,
    lora: Annotated[
        int | None, typer.Option("--lora", help="Only fresh low-rank adapters of this rank.", min=1, metavar="RANK")
    ] = None,
    preconditioner: Annotated[
        str | None,
        typer.Option(
            "--preconditioner",
            help="Measure in the geometry of Adam: scale coordinates by the optimizer state of this policy.",
            metavar=POLICY,
        ),
    ] = None,
    sketch: Annotated[
        Literal["countsketch", "sparse-jl", "sparse-gaussian", "sjlt", "none"],
        typer.Option(
            "--sketch", help="How rows are compressed: all coordinates, a kept fraction (the paper), or not at all."
        ),
    ] = "countsketch",
    dim: Annotated[int, typer.Option("--dim", help="Sketch dimensions, a multiple of 64.")] = 65536,
    keep: Annotated[
        float, typer.Option("--keep", help="Fraction of coordinates kept by the sparse ones.", min=0.0, max=1.0)
    ] = 0.1,
    seed: Seed = 0,
    max_store: Annotated[
        float, typer.Option("--max-store", help="Largest raw store (--sketch none), in GB.", min=0.0)
    ] = 20.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Tokens of one forward pass, at most.", min=1)
    ] = 16384,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute activations anew in the backward pass: less memory."),
    ] = False,
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
    from cropi_tools.cli.common import numbered, parse_named, parse_pair, parse_shard
    from cropi_tools.data.hub import policy_folder
    from cropi_tools.data.manifest import Fingerprint, file_input
    from cropi_tools.data.output import Output
    from cropi_tools.data.policies import metric_of, optimizer_input, policy_input
    from cropi_tools.runtime.errors import UsageError

    runtime.set_quiet(quiet)
    index, shards = parse_shard(shard)
    named = [parse_named(text, "--against") for text in against or []]
    means = dict(named)
    if len(means) < len(named) or any("/" in name for name in means):
        raise UsageError("--against: every mean needs a name of its own, without '/'")
    weight_bounds, ppo_bounds = parse_pair(weight_clip, "--weight-clip"), parse_pair(ppo_clip, "--ppo-clip")
    if mean and means:
        raise UsageError("--mean writes a mean gradient; --against belongs to a store")
    if mean and shards > 1:
        raise UsageError("--mean takes all prompts at once; --shard belongs to a store")
    if method == "jvp" and (mean or not means):
        raise UsageError("--method jvp gives inner products alone: name means with --against")
    if gradient_checkpointing and method in ("fast", "jvp"):
        raise UsageError(f"--gradient-checkpointing belongs to --method reference; --method {method} has no use for it")
    if halves and not mean and not means:
        raise UsageError("--halves of a store are inner products: name means made with --halves by --against")
    if weight_bounds and weight_bounds[0] > weight_bounds[1]:
        raise UsageError(f"--weight-clip {weight_clip}: the lower bound is above the upper")
    if weighting == "none" and (weight_clip or ppo_clip or self_normalize):
        raise UsageError("--weighting none has no weights to clip or normalize")
    if halves and samples is not None and samples < 4 and not mean:
        raise UsageError(f"--halves splits the samples: a half of {samples} has no two to compare; take -n 4 or more")
    if lora and preconditioner:
        raise UsageError("--preconditioner scales a policy's own parameters; the adapters of --lora have no state")
    if lora and params:
        raise UsageError("--lora has gradients for its adapters alone; leave --params out")
    model = policy_folder(model)
    behavior = policy_folder(behavior) if behavior else None
    preconditioner = policy_folder(preconditioner, weights=False, optimizer=True) if preconditioner else None
    inputs = {
        "policy": policy_input(model),
        **numbered("rollouts", rollouts),
        **{f"mean {n}": file_input(p) for n, p in means.items()},
    }
    if behavior:
        inputs["behavior policy"] = policy_input(behavior)
    if preconditioner:
        inputs["optimizer state"] = optimizer_input(preconditioner)
    # what a mean and a store must have in common; the parameters are compared by their layout
    objective = {
        "weighting": weighting,
        "weight_clip": weight_bounds and list(weight_bounds),
        "ppo_clip": ppo_bounds and list(ppo_bounds),
        "self_normalize": self_normalize,
        "advantage": advantage,
        "aggregation": aggregation,
        "policy_temperature": policy_temperature,
        "behavior": inputs["behavior policy"].sha256 if behavior else "sampled",
        "preconditioner": metric_of(preconditioner, inputs["optimizer state"].sha256) if preconditioner else None,
        "adapter_seed": seed if lora else None,
    }
    options: dict[str, Any] = {"mean": mean, **objective, "dtype": dtype, "shard": shard, "limit": limit}
    options |= {
        "halves": "by hash" if halves else False,
        "method": method,
        "samples": samples,
        "params": params,
        "lora": lora,
    }
    options |= {"max_tokens": max_tokens, "gradient_checkpointing": gradient_checkpointing}
    kept = keep if sketch.startswith("sparse") else None
    if not mean and method != "jvp":
        options |= {"sketch": sketch, "seed": seed, "dim": None if sketch == "none" else dim, "keep": kept}
    target = Output(output, Fingerprint.of("cropi-grad", options, inputs), inputs, folder=not mean, force=force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return

    from cropi_tools.gradients.prompt_objective import GradientSettings
    from cropi_tools.gradients.run import Request, compute
    from cropi_tools.objective import Estimator

    estimator = Estimator(weighting, weight_bounds, ppo_bounds, self_normalize)
    settings = GradientSettings(estimator, policy_temperature, aggregation, advantage)
    counts, prompts = compute(
        Request(
            rollouts=rollouts,
            model=model,
            behavior=behavior,
            preconditioner=preconditioner,
            settings=settings,
            facts={"policy": inputs["policy"].sha256, "objective": objective},
            against=means,
            mean=mean,
            halves=halves,
            method=method,
            samples=samples,
            params=params or [],
            lora=lora,
            sketch=sketch,
            dim=dim,
            keep=kept,
            seed=seed,
            max_store=int(max_store * 1e9),
            max_tokens=max_tokens,
            recompute=gradient_checkpointing,
            shard=(index, shards),
            limit=limit,
            device=device,
            dtype=dtype,
        ),
        target,
    )
    live, tokens, as_rows = (counts.pop(key, 0) for key in ("ok", "tokens", "tokens_as_rows"))
    skipped = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    saved = f"; {tokens:,} tokens, {as_rows:,} with a row a sample" if tokens < as_rows else ""
    runtime.notify(f"{output}: {live} of {prompts} prompts have a gradient{f' ({skipped})' if skipped else ''}{saved}")


main = command(grad, name="cropi-grad", example=EXAMPLE)
