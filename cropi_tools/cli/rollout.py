"""cropi-rollout: sample responses and verify them; with a test set it is the evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cropi_tools.cli.entry import entry
from cropi_tools.rollouts.options import RolloutOptions
from cropi_tools.runtime.clock import importing
from cropi_tools.runtime.console import show_json

if TYPE_CHECKING:
    from cropi_tools.data.manifest import Input
    from cropi_tools.rollouts.look import Look

EXAMPLE = """
cropi-rollout --model P0 train.jsonl -n 8 -o train.rollouts.jsonl
cropi-rollout --model P1 test.jsonl -n 4 --json -o test.rollouts.jsonl | jq .accuracy
cropi-rollout --model P1 --refresh train.rollouts.jsonl --where zero-advantage -o train.2.rollouts.jsonl
"""


def rollout(options: RolloutOptions) -> None:
    """Sample responses to every prompt, verify them, and say how accurate they are.

    Every sample has its own seed, made of --seed, the prompt's id and the sample's number. The summary (accuracy and pass@k with
    95 % intervals over prompts, lengths; for every source) goes to stderr, or with --json to stdout.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import warn_of_other_dates
    from cropi_tools.data.dates import asks_for_date
    from cropi_tools.data.hub import policy_folder
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint, numbered
    from cropi_tools.rewards import checked_verifiers
    from cropi_tools.rollouts.look import Look
    from cropi_tools.rollouts.metrics import summary_shape
    from cropi_tools.rollouts.refreshing import Again, index_files

    options = replace(options, model=policy_folder(options.model))
    verifiers = checked_verifiers(options.sources, options.verifier, options.allow_verifier, options.partial_credit)
    inputs = {"policy": _policy(options)}
    dated = asks_for_date(options.model)
    if dated:
        warn_of_other_dates([options.model, *options.sources], options.date)
    inputs |= numbered("rollouts" if options.refresh else "prompts", options.sources)
    again = None
    if options.refresh:
        again = Again(inputs["policy"].sha256, index_files(options.where, options.index))
        inputs |= numbered("index", again.indexes)
    fingerprint = Fingerprint.of("cropi-rollout", options.decisive(verifiers, dated), inputs)
    target = JsonLinesOutput(options.output, fingerprint, inputs, options.force)
    look = Look(options.show or 0)
    if options.dry_run:
        with importing():
            from cropi_tools.rollouts.run import dry_run

        found, summary = dry_run(options, again, look)
        found.tell(options.as_json)
    else:
        if not target.open():
            runtime.notify(f"{options.output}: up to date")
            summary = target.finished_fact("summary", summary_shape)
        else:
            with importing():
                from cropi_tools.rollouts.run import sample

            summary = sample(options, again, target, look)
        show_summary(summary, options.as_json)
        look.read(options.output, summary["samples"])
    _tell(options, look, summary)


def _tell(options: RolloutOptions, look: Look, summary: Mapping[str, Any]) -> None:
    """What --show asks for, and what is off."""
    from cropi_tools.rollouts.remarks import warn_of

    if options.show:
        from cropi_tools.policy.tokens import load_tokens

        look.tell(load_tokens(options.model, options.date).tokenizer)
    warn_of(summary, look, options.verifier)


def _policy(options: RolloutOptions) -> Input:
    """The policy as an input. A folder with the tokenizer alone will do where nothing is sampled from it here."""
    from cropi_tools.data.policies import has_weights, policy_input, tokens_input
    from cropi_tools.runtime.errors import UsageError

    if options.engine != "server" or has_weights(options.model):
        return policy_input(options.model)
    if options.refresh:
        raise UsageError(
            "--refresh notes whose the new samples are: --model must be the served policy, with its weights"
        )
    return tokens_input(options.model)


def show_summary(summary: Mapping[str, Any], as_json: bool) -> None:
    """The summary as JSON on stdout, or as a table on stderr."""
    from cropi_tools import runtime
    from cropi_tools.rollouts.metrics import table

    if as_json:
        show_json(json.dumps(summary))
        return
    for line in table(summary):
        runtime.notify(line)


main = entry(RolloutOptions, rollout, name="cropi-rollout", example=EXAMPLE)
