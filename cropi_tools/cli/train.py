"""cropi-train: GRPO on the selected prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cropi_tools.cli.common import (
    POLICY,
    AllowVerifier,
    Date,
    Device,
    DryRun,
    Force,
    MaxTokens,
    Model,
    PartialCredit,
    Quiet,
    Samples,
    Seed,
    Temperature,
    Verifier,
    VerifySeconds,
    Version,
    command,
)
from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.runtime.console import show

if TYPE_CHECKING:
    from cropi_tools.data.output import Output

EXAMPLE = """
cropi-train --model P0 selected.jsonl --steps 50 -o P1
cropi-train --model P0 selected.jsonl --steps 50 --preset dapo --batch 128 --minibatch 128 -o P1
cropi-train --model P0 selected.jsonl --steps 50 --eval target=test.jsonl --eval-every 10 -o P1
torchrun --nproc-per-node 8 --no-python cropi-train --model P0 selected.jsonl --steps 50 -o P1
"""


def train(
    context: typer.Context,
    prompts: Annotated[list[str], typer.Argument(help="Prompts to train on (JSONL, or `-`).", metavar="FILE")],
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="The policy folder to write.", metavar="FOLDER")],
    steps: Annotated[int, typer.Option("--steps", help="Rounds of sampling and learning.", min=1)],
    preset: Annotated[
        Literal["paper", "dapo", "dr_grpo"] | None,
        typer.Option("--preset", help="A published recipe's values for all options that are not given."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Prompts a step.", min=1)] = 128,
    minibatch: Annotated[
        int, typer.Option("--minibatch", help="Prompts an update; 0 = all of a step's, on-policy.", min=0)
    ] = 0,
    samples: Samples = 8,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    verifier: Verifier = None,
    allow_verifier: AllowVerifier = None,
    verify_seconds: VerifySeconds = 10.0,
    partial_credit: PartialCredit = False,
    dynamic_sampling: Annotated[
        int,
        typer.Option(
            "--dynamic-sampling", help="Most rounds a step that replace groups of equal rewards; 0 = off.", min=0
        ),
    ] = 0,
    loss: Annotated[
        Literal["grpo", "dapo", "dr_grpo"],
        typer.Option(
            "--loss", help="--aggregation and --advantage by name: sequence, token, constant; group, group, centered."
        ),
    ] = "dapo",
    aggregation: Annotated[
        Literal["sequence", "token", "constant"] | None,
        typer.Option("--aggregation", help="Average over responses, over all tokens, or over --max-tokens a response."),
    ] = None,
    advantage: Annotated[
        Literal["group", "centered", "leave-one-out"] | None,
        typer.Option("--advantage", help="Rewards normalised in their group, only centered, or less the others' mean."),
    ] = None,
    clip: Annotated[
        str, typer.Option("--clip", help="PPO clip of the ratio, LOW,HIGH, or one number for both.")
    ] = "0.2",
    kl: Annotated[
        float,
        typer.Option("--kl", help="Weight of the KL term (k3) towards --reference; 0 loads no reference.", min=0.0),
    ] = 0.0,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            help="Policy of the KL term: `stage` (--model), `start` (of the whole curriculum), or a policy as --model takes it.",
            metavar=POLICY,
        ),
    ] = "stage",
    entropy: Annotated[float, typer.Option("--entropy", help="Weight of the entropy bonus.", min=0.0)] = 0.0,
    mask_truncated: Annotated[
        bool,
        typer.Option(
            "--mask-truncated/--no-mask-truncated", help="No gradient from responses that --max-tokens cut off."
        ),
    ] = False,
    importance_cap: Annotated[
        float,
        typer.Option(
            "--importance-cap",
            help="Cap of the weights policy / engine (truncated importance sampling); 0 = off.",
            min=0.0,
        ),
    ] = 0.0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="AdamW's rate.", min=0.0)] = 1e-6,
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], typer.Option("--schedule", help="The rate after warm-up.")
    ] = "constant",
    warmup: Annotated[int, typer.Option("--warmup", help="Steps over which the rate rises linearly.", min=0)] = 0,
    betas: Annotated[str, typer.Option("--betas", help="AdamW's decay rates.", metavar="B1,B2")] = "0.9,0.999",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's weight decay.", min=0.0)] = 0.0,
    max_gradient_norm: Annotated[
        float, typer.Option("--max-gradient-norm", help="Clip the gradient's norm; 0 = never.", min=0.0)
    ] = 1.0,
    lora: Annotated[
        int, typer.Option("--lora", help="Train adapters (LoRA) of this rank in place of the weights; 0 = off.", min=0)
    ] = 0,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora-alpha", help="Adapters are scaled by this / rank. [default: 2 x rank]", min=0.0),
    ] = None,
    carry: Annotated[
        Literal["weights", "full"],
        typer.Option("--carry", help="Begin with --model's weights alone, or with its optimizer state too."),
    ] = "weights",
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
    collapse: Annotated[
        float,
        typer.Option(
            "--collapse",
            help="Stop when entropy or length falls to this share without a better reward; 0 = never.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.05,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="Show the figures in tensorboard or wandb too; may be repeated.", metavar="WHERE"),
    ] = None,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.", min=1)] = 25,
    keep: Annotated[int, typer.Option("--keep", help="Newest checkpoints that are kept.", min=1)] = 1,
    seed: Seed = 0,
    engine: Annotated[
        Literal["transformers", "vllm", "verl"],
        typer.Option("--engine", help="What samples: the policy itself, or vLLM in this process; or verl does all."),
    ] = "transformers",
    engine_memory: Annotated[
        float,
        typer.Option("--engine-memory", help="Share of a GPU's memory that vLLM may fill.", min=0.01, max=1.0),
    ] = 0.4,
    verl_python: Annotated[
        str,
        typer.Option(
            "--verl-python", help="Python of the environment that has verl, for --engine verl.", metavar="FILE"
        ),
    ] = "python",
    verl_option: Annotated[
        list[str] | None,
        typer.Option(
            "--verl-option", help="One more setting of verl's, such as trainer.nnodes=2.", metavar="KEY=VALUE"
        ),
    ] = None,
    date: Date = DEFAULT_DATE,
    device: Device = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "auto"],
        typer.Option("--dtype", help="Arithmetic: weights stay float32, bfloat16 is autocast (auto: on a GPU)."),
    ] = "auto",
    tokens_per_pass: Annotated[
        int, typer.Option("--tokens-per-pass", help="Tokens in one forward pass; halved when memory runs out.", min=1)
    ] = 16384,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Compute activations twice to hold fewer.")
    ] = False,
    dry_run: DryRun = False,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """GRPO: sample responses from the policy, verify them, follow the objective's gradient, repeat.

    Writes a policy folder that transformers opens, with training.json (the resolved options), metrics.jsonl, evaluations.jsonl and
    timings.jsonl in it. Under torchrun the policy and the work are shared out over all processes.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import parse_named, warn_of_other_dates
    from cropi_tools.data.dates import asks_for_date, parse_date
    from cropi_tools.data.hub import policy_folder
    from cropi_tools.data.manifest import Fingerprint, file_input, numbered
    from cropi_tools.data.output import Output
    from cropi_tools.data.policies import optimizer_input, policy_input
    from cropi_tools.rewards import checked_verifiers
    from cropi_tools.runtime.errors import UsageError
    from cropi_tools.training.presets import LOSSES

    runtime.set_quiet(quiet)
    given = _with_preset(context, preset)
    if given["temperature"] == 0.0:
        raise UsageError("--temperature 0 samples the same response every time: nothing can be learned from it")
    if given["samples"] == 1:
        raise UsageError("-n 1: a response is compared with others of its prompt; give 2 or more")
    if lora and carry == "full":
        raise UsageError(
            "--carry full with --lora: adapters begin anew, so there is no optimizer state of them to carry"
        )
    bounds = _pair(given["clip"] if "," in given["clip"] else f"{given['clip']},{given['clip']}", "--clip")
    sets = dict(parse_named(text, "--eval") for text in evaluation or [])
    if engine == "vllm":
        from cropi_tools.engines.vllm_engine import check_vllm

        check_vllm()
    model = policy_folder(model, optimizer=carry == "full")
    inputs = {"policy": policy_input(model), **numbered("prompts", prompts)}
    inputs.update({f"evaluation set {name}": file_input(path) for name, path in sets.items()})
    known = None
    if given["kl"] > 0:
        known = _reference(reference, model)
        inputs["reference"] = policy_input(known)
    if carry == "full":
        inputs["optimizer"] = optimizer_input(model)
    verifiers = checked_verifiers([*prompts, *sets.values()], verifier, allow_verifier or [], partial_credit)
    named = LOSSES[given["loss"]]
    options = {
        "steps": steps,
        "batch": given["batch"],
        "minibatch": given["minibatch"],
        "samples": given["samples"],
        "max_tokens": given["max_tokens"],
        "temperature": given["temperature"],
        "verifier": verifiers.pop("verifier"),
        "verify_seconds": verify_seconds,
        **verifiers,
        "dynamic_sampling": given["dynamic_sampling"],
        "aggregation": aggregation or named["aggregation"],
        "advantage": advantage or named["advantage"],
        "clip": bounds,
        "kl": given["kl"],
        "entropy": given["entropy"],
        "mask_truncated": given["mask_truncated"],
        "importance_cap": importance_cap,
        "learning_rate": given["learning_rate"],
        "schedule": given["schedule"],
        "warmup": given["warmup"],
        "betas": _pair(given["betas"], "--betas"),
        "weight_decay": given["weight_decay"],
        "max_gradient_norm": given["max_gradient_norm"],
        "lora": lora,
        "lora_alpha": (2.0 * lora if lora_alpha is None else lora_alpha) if lora else 0.0,
        "carry": carry,
        "eval_every": evaluate_every,
        "eval_samples": evaluation_samples,
        "eval_temperature": evaluation_temperature,
        "collapse": collapse,
        "save_every": save_every,
        "keep": keep,
        "seed": seed,
        "engine": engine,
        "dtype": dtype,
        "date": parse_date(date),
        **({"verl_options": verl_option or []} if engine == "verl" else {}),
    }
    from cropi_tools.training.trackers import check_trackers

    check_trackers(track or [])
    decisive = dict(options)
    if asks_for_date(model):
        warn_of_other_dates([model, *prompts, *sets.values()], options["date"])
    else:
        del decisive["date"]
    target = Output(output, Fingerprint.of("cropi-train", decisive, inputs), inputs, folder=True, force=force)

    job: dict[str, Any] = {
        "model": model,
        "reference": known,
        "prompts": prompts,
        "evaluations": sets,
        "verifier": verifier,
        "options": options,
        "trackers": track or [],
        "device": device,
        "engine_memory": engine_memory,
        "tokens_per_pass": tokens_per_pass,
        "checkpoint_activations": checkpoint_activations,
    }
    if engine == "verl":
        _by_verl(job, verl_python, verl_option or [], target, dry_run)
        return
    if dry_run:
        _estimate(job)
        return

    from cropi_tools.training.distributed import Ranks, several

    if several() and engine == "vllm":
        raise UsageError(
            "--engine vllm samples for one process; under torchrun give --engine transformers, or --engine verl without torchrun"
        )
    with Ranks.of_torchrun(device) if several() else Ranks() as ranks:
        # one speaks; what goes wrong all may say
        runtime.set_quiet(quiet or not ranks.first)
        opened, target.state = ranks.first_does(lambda: (target.open(), target.state))
        if not opened:
            if ranks.first:
                runtime.notify(f"{output}: up to date")
            return

        from cropi_tools.training.run import Job, train

        train(Job(**job), target, ranks)


def _reference(reference: str, model: str) -> str:
    """The folder of --reference."""
    from cropi_tools.data.hub import policy_folder
    from cropi_tools.data.policies import starting_policy

    if reference == "stage":
        return model
    return starting_policy(model) if reference == "start" else policy_folder(reference)


def _by_verl(job: dict[str, Any], python: str, extra: list[str], target: Output, dry_run: bool) -> None:
    import shlex

    from cropi_tools import runtime
    from cropi_tools.data.records import read_prompts
    from cropi_tools.runtime.errors import UsageError
    from cropi_tools.verl_backend.run import WORK, VerlJob, command, train

    for text in extra:
        if "=" not in text:
            raise UsageError(f"--verl-option {text}: expected KEY=VALUE")
    if job["trackers"]:
        raise UsageError(
            "--track with --engine verl: verl has trackers of its own; --verl-option trainer.logger=[console,file,wandb]"
        )
    more = ("tokens_per_pass", "checkpoint_activations")
    wish = VerlJob(
        options={**job["options"], **{name: job[name] for name in more}},
        model=job["model"],
        reference=job["reference"],
        verifier=job["verifier"],
        prompts=list(read_prompts(job["prompts"])),
        evaluations={name: list(read_prompts([path])) for name, path in job["evaluations"].items()},
        python=python,
        extra=extra,
    )
    if dry_run:
        show(shlex.join(command(wish, target.part / WORK)))
    elif target.open():
        train(wish, target)
    else:
        runtime.notify(f"{target.path}: up to date")


def _estimate(job: dict[str, Any]) -> None:
    from cropi_tools import runtime
    from cropi_tools.data.jsonl import is_stream
    from cropi_tools.runtime.errors import UsageError
    from cropi_tools.training.estimate import estimate
    from cropi_tools.training.run import Job

    if any(is_stream(path) for path in job["prompts"]):
        raise UsageError("--dry-run reads the prompts and leaves nothing for the run; give a file in place of `-`")
    runtime.set_quiet(True)
    for line in estimate(Job(**job)).lines():
        show(line)


def _with_preset(context: typer.Context, preset: str | None) -> dict[str, Any]:
    """The options' values, those of the preset in place of defaults: what was given on the command line stays."""
    from cropi_tools.training.presets import PRESETS

    given = dict(context.params)
    for name, value in PRESETS[preset].items() if preset else ():
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            given[name] = value
    return given


def _pair(text: str, option: str) -> tuple[float, float]:
    from cropi_tools.runtime.errors import UsageError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: expected two numbers with a comma between") from None
    return low, high


main = command(train, name="cropi-train", example=EXAMPLE)
