"""cropi-verify: the responses of existing rollouts graded again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cropi_tools.cli.entry import entry
from cropi_tools.rollouts.options import VerifyOptions

if TYPE_CHECKING:
    from cropi_tools.data.manifest import Input

EXAMPLE = """
cropi-verify train.rollouts.jsonl --verifier mine.py:reward -o regraded.jsonl
cropi-verify texts.jsonl --model P0 --max-tokens 1024 -o rollouts.jsonl
cropi-verify 1.jsonl 2.jsonl --model P0 --prompts train.jsonl --verifier recorded -o rollouts.jsonl
"""


def verify(options: VerifyOptions) -> None:
    """Grade the responses of rollouts again, by another verifier or a corrected one; tokens and log-probabilities stay.

    Rollouts of others are read as well (texts, and the dumps of verl) and become rollouts of ours. The summary is that of cropi-rollout: for
    every source accuracy and pass@k with their intervals, and lengths, on stderr.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import warn_of_other_dates
    from cropi_tools.cli.rollout import show_summary
    from cropi_tools.data.dates import asks_for_date
    from cropi_tools.data.hub import policy_folder
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint, numbered
    from cropi_tools.data.policies import tokens_input
    from cropi_tools.rollouts.metrics import summary_shape

    if options.model is not None:
        options = replace(options, model=policy_folder(options.model, weights=False))
    verifiers = _verifiers(options)
    inputs: dict[str, Input] = {}
    dated = False
    if options.model is not None:
        inputs["policy"] = tokens_input(options.model)
        dated = asks_for_date(options.model)
        if dated:
            warn_of_other_dates([options.model, *options.rollouts], options.date)
    inputs |= numbered("rollouts", options.rollouts)
    inputs |= numbered("prompts of the dump", options.prompts)
    # under the name of the command that did this first, so that what it made is up to date
    fingerprint = Fingerprint.of("cropi-rollout", options.decisive(verifiers, dated), inputs)
    target = JsonLinesOutput(options.output, fingerprint, inputs, options.force)
    if not options.dry_run and not target.open():
        runtime.notify(f"{options.output}: up to date")
        show_summary(target.finished_fact("summary", summary_shape), options.as_json)
        return

    from cropi_tools.rollouts.regrading import dry_run, regrade

    if options.dry_run:
        dry_run(options).tell(options.as_json)
        return
    show_summary(regrade(options, target), options.as_json)


def _verifiers(options: VerifyOptions) -> dict[str, Any]:
    """What decides the grades."""
    from cropi_tools.rewards import checked_verifiers
    from cropi_tools.rollouts.options import RECORDED
    from cropi_tools.rollouts.regrading import graded_files

    if options.keeps_rewards:
        return {"verifier": RECORDED}
    files = graded_files(options)
    return checked_verifiers(files, options.verifier, options.allow_verifier, options.partial_credit)


main = entry(VerifyOptions, verify, name="cropi-verify", example=EXAMPLE)
