"""What cropi-grad was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from cropi_tools.options import (
    POLICY,
    SHARE,
    CheckpointActivations,
    CommandOptions,
    Device,
    DryRun,
    Dtype,
    EstimateAsJson,
    Limit,
    Model,
    Option,
    Seed,
    Shard,
    at_least,
    check_file_name,
    named,
    ordered_pair,
    pair,
    refuse,
)
from cropi_tools.runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class GradOptions(CommandOptions):
    """The options of cropi-grad."""

    renamed: ClassVar[Mapping[str, str]] = {
        "--max-tokens": "--tokens-per-pass",
        "--gradient-checkpointing": "--checkpoint-activations",
    }

    rollouts: Annotated[tuple[str, ...], Option("FILE", "Rollouts of cropi-rollout (JSONL, .gz, .zst, or `-`).")]
    model: Model
    output: Annotated[
        str,
        Option("-o --output", "The store to write (X.zarr), or with --mean the mean (X.safetensors).", metavar="PATH"),
    ]
    samples: Annotated[
        int | None,
        Option("-n --samples", "Use the first N samples of each prompt.", "Rollouts", "N", at_least(2)),
    ] = None
    limit: Limit = None
    shard: Shard = (1, 1)
    behavior: Annotated[
        str | None,
        Option("--behavior", "Recompute the behavior policy's log-probabilities with this policy.", "Rollouts", POLICY),
    ] = None
    weighting: Annotated[
        Literal["none", "token", "prefix", "suffix", "trajectory", "sequence"],
        Option(
            "--weighting", "Importance weight of a token: its ratio (the paper), or products of ratios.", "Objective"
        ),
    ] = "token"
    weight_clip: Annotated[
        tuple[float, float] | None,
        Option(
            "--weight-clip",
            "Bounds of the weight; the gradient is kept.",
            "Objective",
            "LO,HI",
            at_least(0),
            ordered_pair,
        ),
    ] = None
    ppo_clip: Annotated[
        tuple[float, float] | None,
        Option(
            "--ppo-clip",
            "Drop the gradient beyond weights 1-LO and 1+HI, as PPO does.",
            "Objective",
            "LO,HI",
            at_least(0),
            pair,
        ),
    ] = None
    self_normalize: Annotated[
        bool, Option("--self-normalize", "Divide weights by their mean over the prompt's tokens.", "Objective")
    ] = False
    advantage: Annotated[
        Literal["group", "centered", "leave-one-out"],
        Option("--advantage", "Reward less the group's mean, over its deviation (group); or without it.", "Objective"),
    ] = "group"
    aggregation: Annotated[
        Literal["sequence", "token", "constant"],
        Option("--aggregation", "What a token's term is divided by: GRPO, DAPO, Dr.GRPO.", "Objective"),
    ] = "sequence"
    policy_temperature: Annotated[
        float,
        Option(
            "--policy-temperature",
            "Temperature of the policy's own distribution in the ratios.",
            "Objective",
            range=at_least(1e-3),
        ),
    ] = 1.0
    mean: Annotated[
        bool, Option("--mean", "Write the mean gradient over all prompts instead of a store.", "Gradients")
    ] = False
    against: Annotated[
        tuple[tuple[str, str], ...],
        Option(
            "--against",
            "Take exact inner products with this mean gradient; may be repeated.",
            "Gradients",
            "NAME=FILE",
            read=named,
        ),
    ] = ()
    halves: Annotated[
        bool,
        Option(
            "--halves",
            "Also by independent halves of the samples (with --mean: of the prompts), told by a hash, for cropi-score --reliability.",
            "Gradients",
        ),
    ] = False
    method: Annotated[
        Literal["auto", "reference", "fast", "jvp"],
        Option(
            "--method",
            "How to differentiate: one prompt a pass (reference), several (fast), whichever fits (auto), "
            "or forward mode (jvp: inner products with --against alone, no norms, no rows).",
            "Gradients",
        ),
    ] = "auto"
    params: Annotated[
        tuple[str, ...],
        Option("--params", "Only parameters of these names (*, ?); may be repeated.", "Gradients", "GLOB"),
    ] = ()
    lora: Annotated[
        int | None, Option("--lora", "Only fresh low-rank adapters of this rank.", "Gradients", "RANK", at_least(1))
    ] = None
    preconditioner: Annotated[
        str | None,
        Option(
            "--preconditioner",
            "Measure in the geometry of Adam: scale coordinates by the optimizer state of this policy.",
            "Gradients",
            POLICY,
        ),
    ] = None
    sketch: Annotated[
        Literal["countsketch", "sparse-jl", "sparse-gaussian", "sjlt", "none"],
        Option(
            "--sketch",
            "How rows are compressed: all coordinates, a kept fraction (the paper), or not at all.",
            "Sketch",
        ),
    ] = "countsketch"
    dim: Annotated[int, Option("--dim", "Sketch dimensions, a multiple of 64.", "Sketch", "N", at_least(64))] = 65536
    keep: Annotated[
        float,
        Option("--keep", "Fraction of coordinates kept by the sparse ones.", "Sketch", range=SHARE),
    ] = 0.1
    tokens_per_pass: Annotated[
        int, Option("--tokens-per-pass", "Tokens of one forward pass, at most.", "Device", "N", at_least(1))
    ] = 16384
    checkpoint_activations: CheckpointActivations = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    dry_run: DryRun = False
    as_json: EstimateAsJson = False

    def check(self) -> None:
        if len(self.means) < len(self.against) or any("/" in name for name in self.means):
            raise UsageError("--against: every mean needs a name of its own, without '/'")
        for name in self.means:
            check_file_name(name, "--against")
        mistakes = [
            (self.as_json and not self.dry_run, "--json prints the estimate of --dry-run; give both, or leave it out"),
            (self.mean and self.against, "--mean writes a mean gradient; --against belongs to a store"),
            (self.mean and self.shard[1] > 1, "--mean takes all prompts at once; --shard belongs to a store"),
            (
                self.method == "jvp" and (self.mean or not self.against),
                "--method jvp gives inner products alone: name means with --against",
            ),
            (
                self.checkpoint_activations and self.method in ("fast", "jvp"),
                f"--checkpoint-activations belongs to --method reference; --method {self.method} has no use for it",
            ),
            (
                self.halves and not self.mean and not self.against,
                "--halves of a store are inner products: name means made with --halves by --against",
            ),
            (
                self.weighting == "none" and (self.weight_clip or self.ppo_clip or self.self_normalize),
                "--weighting none has no weights to clip or normalize",
            ),
            (
                self.halves and not self.mean and self.samples is not None and self.samples < 4,
                f"--halves splits the samples: a half of {self.samples} has no two to compare; take -n 4 or more",
            ),
            (
                self.lora and self.preconditioner,
                "--preconditioner scales a policy's own parameters; the adapters of --lora have no state",
            ),
            (self.lora and self.params, "--lora has gradients for its adapters alone; leave --params out"),
            (self.dim % 64 and self.sketch != "none", f"--dim {self.dim}: expected a multiple of 64"),
        ]
        refuse(mistakes)

    def with_folders(self) -> GradOptions:
        """These options with a folder in place of every policy that the hub knows by name. InputError: `policy_folder`'s."""
        from cropi_tools.data.hub import policy_folder

        return replace(
            self,
            model=policy_folder(self.model),
            behavior=self.behavior and policy_folder(self.behavior),
            preconditioner=self.preconditioner and policy_folder(self.preconditioner, weights=False, optimizer=True),
        )

    @property
    def means(self) -> dict[str, str]:
        """The files of --against by name."""
        return dict(self.against)

    @property
    def kept(self) -> float | None:
        """The fraction of coordinates that a sparse sketch keeps; None for the others."""
        return self.keep if self.sketch.startswith("sparse") else None

    def objective(self, behavior: str | None, metric: Any) -> dict[str, Any]:
        """What a mean and a store must have in common; the parameters are compared by their layout.

        behavior: the hash of the policy of --behavior. metric: of the optimizer state of --preconditioner.
        """
        return {
            "weighting": self.weighting,
            "weight_clip": self.weight_clip and list(self.weight_clip),
            "ppo_clip": self.ppo_clip and list(self.ppo_clip),
            "self_normalize": self.self_normalize,
            "advantage": self.advantage,
            "aggregation": self.aggregation,
            "policy_temperature": self.policy_temperature,
            "behavior": behavior or "sampled",
            "preconditioner": metric,
            "adapter_seed": self.seed if self.lora else None,
        }

    def decisive(self, objective: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the output, besides the inputs. The keys are those of the first outputs, which stay up to date."""
        found = {
            "mean": self.mean,
            **objective,
            "dtype": self.dtype,
            "shard": "/".join(map(str, self.shard)),
            "limit": self.limit,
            "halves": "by hash" if self.halves else False,
            "method": self.method,
            "samples": self.samples,
            "params": list(self.params) or None,
            "lora": self.lora,
            "max_tokens": self.tokens_per_pass,
            "gradient_checkpointing": self.checkpoint_activations,
        }
        if not self.mean and self.method != "jvp":
            dim = None if self.sketch == "none" else self.dim
            found |= {"sketch": self.sketch, "seed": self.seed, "dim": dim, "keep": self.kept}
        return found
