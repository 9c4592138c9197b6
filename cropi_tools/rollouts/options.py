"""What cropi-rollout and cropi-verify were asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.options import (
    POLICY,
    VERIFIERS,
    AllowVerifier,
    AsJson,
    CommandOptions,
    Date,
    Device,
    DryRun,
    Dtype,
    Limit,
    MaxTokens,
    Model,
    Option,
    Output,
    PartialCredit,
    Seed,
    Shard,
    Temperature,
    Verifier,
    VerifySeconds,
    at_least,
    refuse,
)
from cropi_tools.runtime.errors import UsageError

RECORDED = "recorded"
"""In place of a verifier of cropi-verify: the rewards that are in the file stay."""


def status(text: str) -> str:
    """One status of --where, as it was written."""
    from cropi_tools.rollouts.refreshing import parse_wish

    parse_wish([text])
    return text


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(CommandOptions):
    """The options of cropi-rollout."""

    moved: ClassVar[Mapping[str, str]] = {"--verify-only": "cropi-verify FILE"}
    renamed: ClassVar[Mapping[str, str]] = {"--prompts": "an option of cropi-verify"}

    prompts: Annotated[tuple[str, ...], Option("FILE", "Prompts (JSONL, .gz, .zst, or `-`).")] = ()
    model: Model
    output: Output = "-"
    as_json: AsJson = False
    limit: Limit = None
    shard: Shard = (1, 1)
    date: Date = DEFAULT_DATE
    refresh: Annotated[
        tuple[str, ...],
        Option(
            "--refresh",
            "In place of prompts: rollouts of which some prompts are sampled again and the rest is kept; may be repeated.",
            "Rollouts",
            "FILE",
        ),
    ] = ()
    where: Annotated[
        tuple[str, ...],
        Option(
            "--where",
            "Prompts to sample again: zero-advantage, empty, zero-gradient, low-ess[=SHARE] (effective sample size as a share of the "
            "n importance weights, at least 1/n) or all; may be repeated.",
            "Rollouts",
            "STATUS",
            read=status,
        ),
    ] = ()
    index: Annotated[
        tuple[str, ...],
        Option(
            "--index",
            "The gradient store that tells the status, where rewards alone do not; may be repeated.",
            "Rollouts",
            "STORE",
        ),
    ] = ()
    samples: Annotated[
        int | None,
        Option(
            "-n --samples",
            "Samples per prompt.",
            "Sampling",
            "N",
            at_least(1),
            shown="8, with --refresh as many as there were",
        ),
    ] = None
    max_tokens: MaxTokens = 1024
    temperature: Temperature = 1.0
    verifier: Verifier = None
    allow_verifier: AllowVerifier = ()
    verify_seconds: VerifySeconds = 10.0
    partial_credit: PartialCredit = False
    engine: Annotated[
        Literal["transformers", "vllm", "server"],
        Option("--engine", "What samples: in this process, or an OpenAI-compatible server.", "Engine"),
    ] = "transformers"
    server: Annotated[
        str | None,
        Option("--server", "URL of the server; a key is read from OPENAI_API_KEY alone.", "Engine", "URL"),
    ] = None
    served_model: Annotated[
        str | None,
        Option("--served-model", "The model's name at the server.", "Engine", "NAME", shown="the only one there"),
    ] = None
    concurrency: Annotated[
        int, Option("--concurrency", "Most requests at once to a server.", "Engine", "N", at_least(1))
    ] = 64
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    dry_run: DryRun = False
    show: Annotated[
        int | None,
        Option(
            "--show",
            "Print the first N prompts on stderr, as the policy sees them, with a response or two and what these earned.",
            "This run",
            "N",
            at_least(1),
        ),
    ] = None

    def check(self) -> None:
        mistakes = [
            (self.prompts and self.refresh, "--refresh FILE names the rollouts; leave the prompts out"),
            (not self.sources, "name a file of prompts"),
            (self.refresh and not self.where, "--refresh needs --where STATUS, such as --where zero-advantage"),
            (self.where and not self.refresh, "--where chooses prompts of --refresh FILE"),
            (self.index and not self.refresh, "--index tells the status of prompts of --refresh FILE"),
            (self.engine == "server" and not self.server, "--engine server needs --server URL"),
            (self.engine != "server" and self.server, "--server URL is for --engine server"),
            (self.served_model and not self.server, "--served-model names a model of --server URL"),
            (self.show and self.quiet, "--show prints on stderr, where --quiet prints nothing; leave one of them out"),
        ]
        refuse(mistakes)
        if not self.dry_run:
            _check_streams(self.as_json, self.output)

    @property
    def sources(self) -> tuple[str, ...]:
        """The files whose prompts are sampled."""
        return self.refresh or self.prompts

    @property
    def samples_each(self) -> int | None:
        """Samples of each prompt; None, for a refresh: as many as there were."""
        return self.samples or (None if self.refresh else 8)

    def decisive(self, verifiers: Mapping[str, Any], dated: bool) -> dict[str, Any]:
        """What decides the output, besides the inputs.

        verifiers: what decides the grades, of `checked_verifiers`. dated: whether prompts can have the date in them.
        """
        found = {
            **verifiers,
            "verify_seconds": self.verify_seconds,
            **_portion(self),
            "samples": self.samples_each,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "engine": self.engine,
            "seed": self.seed,
            "dtype": self.dtype,
        }
        if self.engine == "server":
            found["served_model"] = self.served_model
        if self.refresh:
            found["where"] = sorted(set(self.where))
        return {**found, "date": self.date} if dated else found


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(CommandOptions):
    """The options of cropi-verify."""

    rollouts: Annotated[
        tuple[str, ...], Option("FILE", "Rollouts (JSONL, .gz, .zst, or `-`): of cropi-rollout, texts, verl's dumps.")
    ]
    model: Annotated[
        str | None,
        Option("--model", "For rollouts that are texts: the policy whose tokenizer reads them.", metavar=POLICY),
    ] = None
    prompts: Annotated[
        tuple[str, ...],
        Option("--prompts", "For verl's dumps: the prompts that were sampled; may be repeated.", metavar="FILE"),
    ] = ()
    max_tokens: Annotated[
        int | None,
        Option(
            "--max-tokens",
            "For rollouts that are texts: the longest response, in tokens, that was allowed.",
            metavar="N",
            range=at_least(1),
            shown="not known",
        ),
    ] = None
    output: Output = "-"
    as_json: AsJson = False
    limit: Limit = None
    shard: Shard = (1, 1)
    date: Date = DEFAULT_DATE
    verifier: Annotated[
        str | None,
        Option(
            "--verifier",
            f"{VERIFIERS}; or {RECORDED}: rewards stay as they are.",
            "Verification",
            "NAME",
            shown="each record's own, else maths",
        ),
    ] = None
    allow_verifier: AllowVerifier = ()
    verify_seconds: VerifySeconds = 10.0
    partial_credit: PartialCredit = False
    dry_run: DryRun = False

    def check(self) -> None:
        if self.keeps_rewards and self.partial_credit:
            raise UsageError(f"--partial-credit: --verifier {RECORDED} grades no answer; leave one of them out")
        if not self.dry_run:
            _check_streams(self.as_json, self.output)

    @property
    def keeps_rewards(self) -> bool:
        """Whether nothing is graded."""
        return self.verifier == RECORDED

    def decisive(self, verifiers: Mapping[str, Any], dated: bool) -> dict[str, Any]:
        """What decides the output, besides the inputs, as `RolloutOptions.decisive`; the keys are those of `cropi-rollout --verify-only`."""
        found = {
            **verifiers,
            "verify_seconds": self.verify_seconds,
            **_portion(self),
            "verify_only": True,
            "max_tokens": self.max_tokens,
        }
        return {**found, "date": self.date} if dated else found


def _portion(options: RolloutOptions | VerifyOptions) -> dict[str, Any]:
    return {"shard": "/".join(map(str, options.shard)), "limit": options.limit}


def _check_streams(as_json: bool, output: str) -> None:
    from cropi_tools.data.jsonl import is_stream

    if as_json and is_stream(output):
        raise UsageError("--json prints the summary on stdout, where the rollouts go; name a file with -o")
