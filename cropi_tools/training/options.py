"""What cropi-train was asked: one record, from the command line to the update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.options import (
    POLICY,
    AllowVerifier,
    CheckpointActivations,
    CommandOptions,
    Date,
    Device,
    DryRun,
    EstimateAsJson,
    MaxTokens,
    Model,
    Option,
    PartialCredit,
    Range,
    Seed,
    Verifier,
    VerifySeconds,
    above,
    at_least,
    between,
    named,
    pair,
    pair_or_both,
    refuse,
    setting,
)
from cropi_tools.runtime.errors import UsageError
from cropi_tools.training.against import REFUSED, Against
from cropi_tools.training.presets import PRESETS

if TYPE_CHECKING:
    from cropi_tools.engines.protocol import Sampling

COLLAPSE = 0.05
"""What --collapse is where it is not given."""
ENGINE_MEMORY, PYTHON = 0.4, "python"

WRITTEN = (
    *("steps", "batch", "minibatch", "samples", "max_tokens", "temperature", "verifier", "verify_seconds"),
    *("own_verifiers", "partial_credit", "dynamic_sampling", "aggregation", "advantage", "clip", "kl", "entropy"),
    *("mask_truncated", "importance_cap", "learning_rate", "schedule", "warmup", "betas", "weight_decay"),
    *("max_gradient_norm", "lora", "lora_alpha", "carry", "eval_every", "eval_samples", "eval_temperature"),
    *("collapse", "save_every", "keep", "seed", "engine", "dtype", "date"),
)
"""The keys of training.json and of the fingerprint, in the order of the first outputs, which stay up to date."""

LATER = ("state", "save_dtype")
"""Keys of both where they are not the default: the first outputs know no such options."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(CommandOptions):
    """The options of cropi-train."""

    renamed: ClassVar[Mapping[str, str]] = {
        "--loss": "--aggregation and --advantage",
        "--keep": "--checkpoints",
        "--lora-alpha": "twice the rank of --lora",
    }

    prompts: Annotated[tuple[str, ...], Option("FILE", "Prompts to train on (JSONL, or `-`).")]
    model: Model
    output: Annotated[str, Option("-o --output", "The policy folder to write.", metavar="FOLDER")]
    steps: Annotated[int, Option("--steps", "Rounds of sampling and learning.", "Optimizer", "N", at_least(1))]
    preset: Annotated[
        Literal["paper", "dapo", "dr_grpo"] | None,
        Option("--preset", "A published recipe's values for all options that are not given.", "Objective"),
    ] = None
    batch: Annotated[int, Option("--batch", "Prompts a step.", "Sampling", "N", at_least(1))] = 128
    samples: Annotated[
        int, Option("-n --samples", "Responses a prompt, which are compared.", "Sampling", "N", at_least(2))
    ] = 8
    max_tokens: MaxTokens = 1024
    temperature: Annotated[
        float, Option("--temperature", "Sampling temperature.", "Sampling", range=at_least(1e-3))
    ] = 1.0
    dynamic_sampling: Annotated[
        int,
        Option(
            "--dynamic-sampling",
            "Most rounds a step that replace groups of equal rewards; 0 is none.",
            "Sampling",
            "N",
            at_least(0),
        ),
    ] = 0
    date: Date = DEFAULT_DATE
    verifier: Verifier = None
    allow_verifier: AllowVerifier = ()
    verify_seconds: VerifySeconds = 10.0
    partial_credit: PartialCredit = False
    aggregation: Annotated[
        Literal["sequence", "token", "constant"],
        Option(
            "--aggregation", "Average over responses, over all tokens, or over --max-tokens a response.", "Objective"
        ),
    ] = "token"
    advantage: Annotated[
        Literal["group", "centered", "leave-one-out"],
        Option(
            "--advantage",
            "Rewards normalized in their group, only centered, or less the mean of the others.",
            "Objective",
        ),
    ] = "group"
    clip: Annotated[
        tuple[float, float],
        Option(
            "--clip",
            "PPO keeps ratios within 1-LOW and 1+HIGH, LOW below 1; one number is both.",
            "Objective",
            "LOW,HIGH",
            above(0),
            pair_or_both,
        ),
    ] = (0.2, 0.2)
    kl: Annotated[
        float, Option("--kl", "Weight of the KL term (k3); 0 loads no reference.", "Objective", range=at_least(0))
    ] = 0.0
    reference: Annotated[
        str,
        Option(
            "--reference",
            "Policy of the KL term: `stage` (--model), `start` (of the whole curriculum), or a policy as --model takes it.",
            "Objective",
            POLICY,
        ),
    ] = "stage"
    entropy: Annotated[float, Option("--entropy", "Weight of the entropy bonus.", "Objective", range=at_least(0))] = 0.0
    mask_truncated: Annotated[
        bool,
        Option(
            "--mask-truncated/--no-mask-truncated", "No gradient from responses that --max-tokens cut off.", "Objective"
        ),
    ] = False
    importance_cap: Annotated[
        float,
        Option(
            "--importance-cap",
            "Cap of the weights policy / engine (truncated importance sampling); 0 is no weights.",
            "Objective",
            range=at_least(0),
        ),
    ] = 0.0
    minibatch: Annotated[
        int, Option("--minibatch", "Prompts an update; 0 is all of a step's, on-policy.", "Optimizer", "N", at_least(0))
    ] = 0
    learning_rate: Annotated[float, Option("--learning-rate", "AdamW's rate.", "Optimizer", range=at_least(0))] = 1e-6
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], Option("--schedule", "The rate after warm-up.", "Optimizer")
    ] = "constant"
    warmup: Annotated[
        int, Option("--warmup", "Steps over which the rate rises linearly.", "Optimizer", "N", at_least(0))
    ] = 0
    betas: Annotated[
        tuple[float, float],
        Option("--betas", "AdamW's decay rates.", "Optimizer", "B1,B2", Range(0, 1, open_high=True), pair),
    ] = (0.9, 0.999)
    weight_decay: Annotated[
        float, Option("--weight-decay", "AdamW's weight decay.", "Optimizer", range=at_least(0))
    ] = 0.0
    max_gradient_norm: Annotated[
        float, Option("--max-gradient-norm", "Clip the gradient's norm; 0 is never.", "Optimizer", range=at_least(0))
    ] = 1.0
    carry: Annotated[
        Literal["weights", "full"],
        Option("--carry", "Begin with --model's weights alone, or with its optimizer state too.", "Optimizer"),
    ] = "weights"
    collapse: Annotated[
        float | None,
        Option(
            "--collapse",
            "Stop when entropy or length falls to this share without a better reward; 0 is never.",
            "Optimizer",
            "SHARE",
            between(0, 1),
            shown=f"{COLLAPSE:g}",
        ),
    ] = None
    lora: Annotated[
        int,
        Option(
            "--lora",
            "Train adapters (LoRA) of this rank in place of the weights, scaled by 2; 0 is none.",
            "Adapters",
            "RANK",
            at_least(0),
        ),
    ] = 0
    against: Against = ()
    evaluations: Annotated[
        tuple[tuple[str, str], ...],
        Option("--eval", "Evaluate on these prompts; may be repeated.", "Evaluation", "NAME=FILE", read=named),
    ] = ()
    eval_every: Annotated[
        int,
        Option("--eval-every", "Steps between evaluations; also at 0 and at the end.", "Evaluation", "N", at_least(1)),
    ] = 25
    eval_samples: Annotated[
        int, Option("--eval-samples", "Responses per evaluation prompt.", "Evaluation", "N", at_least(1))
    ] = 1
    eval_temperature: Annotated[
        float,
        Option(
            "--eval-temperature",
            "Sampling temperature of the evaluation; 0 is greedy.",
            "Evaluation",
            range=at_least(0),
        ),
    ] = 0.0
    save_every: Annotated[
        int, Option("--save-every", "Steps between checkpoints.", "Checkpoints", "N", at_least(1))
    ] = 25
    checkpoints: Annotated[
        int, Option("--checkpoints", "Newest checkpoints that are kept.", "Checkpoints", "N", at_least(1))
    ] = 1
    state: Annotated[
        Literal["keep", "drop"],
        Option("--state", "The optimizer's state in the finished policy: twice its size.", "Checkpoints"),
    ] = "keep"
    save_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Option(
            "--save-dtype",
            "Number format of the finished policy's weights; bfloat16 is half the size and loses small updates.",
            "Checkpoints",
        ),
    ] = "float32"
    track: Annotated[
        tuple[str, ...],
        Option("--track", "Show the figures in tensorboard or wandb too; may be repeated.", "Report", "WHERE"),
    ] = ()
    engine: Annotated[
        Literal["transformers", "vllm", "verl"],
        Option("--engine", "What samples: the policy itself, or vLLM in this process; or verl does all.", "Engine"),
    ] = "transformers"
    engine_memory: Annotated[
        float,
        Option(
            "--engine-memory",
            "Share of a GPU's memory that vLLM may fill, in verl too.",
            "Engine",
            "SHARE",
            between(0.01, 1),
        ),
    ] = ENGINE_MEMORY
    verl_python: Annotated[
        str, Option("--verl-python", "Python of the environment that has verl, for --engine verl.", "Engine", "FILE")
    ] = PYTHON
    verl_option: Annotated[
        tuple[str, ...],
        Option(
            "--verl-option",
            "One more setting of verl's, such as trainer.nnodes=2; may be repeated.",
            "Engine",
            "KEY=VALUE",
            read=setting,
        ),
    ] = ()
    device: Device = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "auto"],
        Option("--dtype", "Arithmetic: weights stay float32, bfloat16 is autocast (auto: on a GPU).", "Device"),
    ] = "auto"
    tokens_per_pass: Annotated[
        int,
        Option(
            "--tokens-per-pass",
            "Tokens of one forward pass, at most; halved when memory runs out.",
            "Device",
            "N",
            at_least(1),
        ),
    ] = 16384
    checkpoint_activations: CheckpointActivations = False
    seed: Seed = 0
    dry_run: DryRun = False
    as_json: EstimateAsJson = False

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> Self:
        """What was given comes before the preset's values, those before the defaults."""
        recipe = PRESETS.get(given.get("preset", ""), {})
        return cls(**{**recipe, **given})

    def __post_init__(self) -> None:
        # before the ranges, which say no reason
        if self.temperature == 0:
            raise UsageError("--temperature 0 samples the same response every time: nothing can be learned from it")
        if self.samples == 1:
            raise UsageError("--samples 1: a response is compared with others of its prompt; give 2 or more")
        super().__post_init__()

    def check(self) -> None:
        mistakes = [
            (
                self.clip[0] >= 1,
                f"--clip {self.clip[0]:g},{self.clip[1]:g}: the lower one is a share; give less than 1",
            ),
            (
                self.as_json and (self.engine == "verl" or not self.dry_run),
                "--json prints the estimate of --dry-run, which --engine verl has none of; leave it out",
            ),
            (len(self.sets) < len(self.evaluations), "--eval: every set needs a name of its own"),
            (
                self.lora and self.carry == "full",
                "--carry full with --lora: adapters begin again, so there is no optimizer state of them to carry",
            ),
            *((bool(self.against) and is_so(self), said) for is_so, said in REFUSED),
            *(
                (
                    given and self.engine not in engines,
                    f"{flag}: --engine {self.engine} has no use for it; leave it out",
                )
                for flag, given, engines in (
                    ("--verl-option", self.verl_option, ("verl",)),
                    ("--verl-python", self.verl_python != PYTHON, ("verl",)),
                    ("--engine-memory", self.engine_memory != ENGINE_MEMORY, ("vllm", "verl")),
                )
            ),
        ]
        refuse(mistakes)

    @property
    def sets(self) -> dict[str, str]:
        """The files of --eval by name."""
        return dict(self.evaluations)

    @property
    def sampling(self) -> Sampling:
        """How responses to train on are sampled."""
        from cropi_tools.engines.protocol import Sampling

        return Sampling(self.max_tokens, self.temperature)

    @property
    def evaluation_sampling(self) -> Sampling:
        """How responses of evaluations are sampled."""
        from cropi_tools.engines.protocol import Sampling

        return Sampling(self.max_tokens, self.eval_temperature)

    @property
    def lora_alpha(self) -> float:
        """What adapters are scaled by, times their rank."""
        return 2.0 * self.lora

    @property
    def collapse_share(self) -> float:
        """The share of entropy or length at which the policy has collapsed; 0: it is not watched."""
        return COLLAPSE if self.collapse is None else self.collapse

    def with_folders(self) -> TrainOptions:
        """These options with a folder in place of every policy that the hub knows by name. InputError: `policy_folder`'s."""
        from cropi_tools.data.hub import policy_folder

        named = self.kl > 0 and self.reference not in ("stage", "start")
        return replace(
            self,
            model=policy_folder(self.model, optimizer=self.carry == "full"),
            reference=policy_folder(self.reference) if named else self.reference,
        )

    def resolved(self, own_verifiers: Mapping[str, str]) -> dict[str, Any]:
        """What training.json says. own_verifiers: those that records name, with their fingerprints."""
        from cropi_tools.rewards.verifiers import DEFAULT

        special = {
            "verifier": self.verifier or DEFAULT,
            "own_verifiers": dict(own_verifiers),
            "collapse": self.collapse_share,
            "keep": self.checkpoints,
        }
        found = {key: special[key] if key in special else getattr(self, key) for key in WRITTEN}
        found |= {key: getattr(self, key) for key in LATER if getattr(self, key) != getattr(type(self), key)}
        if self.engine == "verl":
            found["verl_options"] = list(self.verl_option)
        return found

    def decisive(self, verifiers: Mapping[str, Any], dated: bool) -> dict[str, Any]:
        """What decides the policy, besides the inputs.

        verifiers: what decides the rewards. dated: whether the policy's chat template can ask for the date.
        """
        found = {**self.resolved(verifiers["own_verifiers"]), **verifiers}
        if not dated:
            del found["date"]
        return found
