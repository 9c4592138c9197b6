"""cropi-train: GRPO on the selected prompts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cropi_tools.cli.common import (
    Device,
    Force,
    MaxTokens,
    Model,
    Quiet,
    Samples,
    Seed,
    Temperature,
    Verifier,
    VerifySeconds,
    Version,
    command,
)

if TYPE_CHECKING:
    from cropi_tools.engines.protocol import Engine
    from cropi_tools.policy.loading import Policy

EXAMPLE = """
cropi-train --model P0 selected.jsonl --steps 50 -o P1
cropi-train --model P0 selected.jsonl --steps 50 --eval target=test.jsonl --eval-every 10 -o P1
"""


def train(
    prompts: Annotated[list[str], typer.Argument(help="Prompts to train on (JSONL, or `-`).", metavar="FILE")],
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="The policy folder to write.", metavar="FOLDER")],
    steps: Annotated[int, typer.Option("--steps", help="Updates.", min=1)],
    batch: Annotated[int, typer.Option("--batch", help="Prompts a step.", min=1)] = 128,
    samples: Samples = 8,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    verifier: Verifier = "maths",
    verify_seconds: VerifySeconds = 10.0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="AdamW's rate.", min=0.0)] = 1e-6,
    schedule: Annotated[
        Literal["constant", "linear"], typer.Option("--schedule", help="The rate after warm-up.")
    ] = "constant",
    warmup: Annotated[int, typer.Option("--warmup", help="Steps over which the rate rises linearly.", min=0)] = 0,
    betas: Annotated[str, typer.Option("--betas", help="AdamW's decay rates.", metavar="B1,B2")] = "0.9,0.999",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's weight decay.", min=0.0)] = 0.0,
    max_gradient_norm: Annotated[
        float, typer.Option("--max-gradient-norm", help="Clip the gradient's norm; 0 = never.", min=0.0)
    ] = 1.0,
    clip: Annotated[
        str, typer.Option("--clip", help="PPO clip of the ratio, LOW,HIGH, or one number for both.")
    ] = "0.2",
    aggregation: Annotated[
        Literal["token", "sequence"],
        typer.Option("--aggregation", help="Average over all tokens of the batch, or over responses."),
    ] = "token",
    kl: Annotated[
        float,
        typer.Option("--kl", help="Weight of the KL term (k3) towards --reference; 0 loads no reference.", min=0.0),
    ] = 0.0,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Policy of the KL term. [default: --model]", metavar="FOLDER")
    ] = None,
    entropy: Annotated[float, typer.Option("--entropy", help="Weight of the entropy bonus.", min=0.0)] = 0.0,
    evaluation: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Evaluate on these prompts; may be repeated.", metavar="NAME=FILE"),
    ] = None,
    evaluate_every: Annotated[
        int, typer.Option("--eval-every", help="Steps between evaluations; also at 0 and at the end.", min=1)
    ] = 25,
    evaluation_samples: Annotated[
        int, typer.Option("--eval-samples", help="Samples per evaluation prompt.", min=1)
    ] = 1,
    evaluation_temperature: Annotated[
        float, typer.Option("--eval-temperature", help="Temperature there; 0 = greedy.", min=0.0)
    ] = 0.0,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.", min=1)] = 25,
    seed: Seed = 0,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option("--engine", help="What samples: the policy itself, or vLLM beside it in this process."),
    ] = "transformers",
    engine_memory: Annotated[
        float,
        typer.Option("--engine-memory", help="Share of a GPU's memory that vLLM may fill.", min=0.01, max=1.0),
    ] = 0.4,
    device: Device = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "auto"],
        typer.Option("--dtype", help="Arithmetic: weights stay float32, bfloat16 is autocast (auto: on a GPU)."),
    ] = "auto",
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """GRPO: sample responses from the policy, verify them, follow the objective's gradient, repeat.

    Writes a policy folder that transformers opens, with metrics.jsonl, evaluations.jsonl and timings.jsonl in it.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import numbered, parse_named
    from cropi_tools.data.errors import UsageError
    from cropi_tools.data.manifest import Fingerprint, file_input
    from cropi_tools.data.output import Output
    from cropi_tools.data.policies import policy_input, tokenizer_digest
    from cropi_tools.rewards import check_own_verifiers, check_verifier, verifier_fingerprint

    runtime.set_quiet(quiet)
    if temperature == 0.0:
        raise UsageError("--temperature 0 samples the same response every time: nothing can be learned from it")
    bounds = _pair(clip if "," in clip else f"{clip},{clip}", "--clip")
    sets = dict(parse_named(text, "--eval") for text in evaluation or [])
    check_verifier(verifier)
    if engine == "vllm":
        from cropi_tools.engines.vllm_engine import check_vllm

        check_vllm()
    inputs = {"policy": policy_input(model), **numbered("prompts", prompts)}
    inputs.update({f"evaluation set {name}": file_input(path) for name, path in sets.items()})
    if kl > 0:
        inputs["reference"] = policy_input(reference or model)
    options = {
        "steps": steps,
        "batch": batch,
        "samples": samples,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "verifier": verifier_fingerprint(verifier),
        "verify_seconds": verify_seconds,
        "own_verifiers": check_own_verifiers([*prompts, *sets.values()]),
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "betas": _pair(betas, "--betas"),
        "weight_decay": weight_decay,
        "max_gradient_norm": max_gradient_norm,
        "clip": bounds,
        "aggregation": aggregation,
        "kl": kl,
        "entropy": entropy,
        "eval_every": evaluate_every,
        "eval_samples": evaluation_samples,
        "eval_temperature": evaluation_temperature,
        "save_every": save_every,
        "seed": seed,
        "engine": engine,
        "dtype": dtype,
    }
    target = Output(output, Fingerprint.of("cropi-train", options, inputs), inputs, folder=True, force=force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return

    from cropi_tools.data.records import read_prompts
    from cropi_tools.engines.protocol import Sampling
    from cropi_tools.policy.loading import choose_device, load_policy
    from cropi_tools.rewards import VerifierPool, check_record
    from cropi_tools.training.checkpoints import resume_folder
    from cropi_tools.training.loop import Trainer, TrainSettings
    from cropi_tools.training.update import LossSettings

    records = list(read_prompts(prompts))
    evaluations = {name: list(read_prompts([path])) for name, path in sets.items()}
    for record in (*records, *(record for found in evaluations.values() for record in found)):
        check_record(record, verifier)
    autocast = dtype == "bfloat16" or (dtype == "auto" and choose_device(device).type == "cuda")
    start = resume_folder(target.part, target.state)
    policy = load_policy(str(start or model), device, "float32")._replace(folder=model)
    known = load_policy(reference or model, device, "float32") if kl > 0 else None
    sampler = _engine(engine, policy, "bfloat16" if autocast else "float32", engine_memory)
    settings = TrainSettings(
        steps=steps,
        batch=batch,
        samples=samples,
        sampling=Sampling(max_tokens, temperature),
        loss=LossSettings(temperature, bounds, kl, entropy, aggregation, autocast),
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        betas=_pair(betas, "--betas"),
        weight_decay=weight_decay,
        max_gradient_norm=max_gradient_norm,
        evaluate_every=evaluate_every,
        evaluation_samples=evaluation_samples,
        evaluation_sampling=Sampling(max_tokens, evaluation_temperature),
        save_every=save_every,
        seed=seed,
    )
    with contextlib.closing(sampler), VerifierPool(verifier, seconds=verify_seconds) as pool:
        counters = Trainer(policy, known, sampler, pool, records, evaluations, settings, target).run()
        facts = {
            "tokenizer": tokenizer_digest(model),
            "steps": steps,
            "sampling": sampler.settings(settings.sampling),
            "evaluation_sampling": sampler.settings(settings.evaluation_sampling),
        }
    target.finish(rows=steps, ledger={**counters, "device": str(policy.device)}, facts=facts)
    runtime.notify(f"{output}: trained for {steps} steps on {len(records)} prompts")


def _engine(name: str, policy: Policy, dtype: str, memory: float) -> Engine:
    """What samples: from the policy's present weights, or from a copy in vLLM that follows them."""
    if name == "vllm":
        from cropi_tools.engines.vllm_engine import VllmEngine

        return VllmEngine(policy.folder, policy.tokens, dtype, memory)
    from cropi_tools.engines.transformers_engine import TransformersEngine

    return TransformersEngine(policy)


def _pair(text: str, option: str) -> tuple[float, float]:
    from cropi_tools.data.errors import UsageError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: expected two numbers with a comma between") from None
    return low, high


main = command(train, name="cropi-train", example=EXAMPLE)
