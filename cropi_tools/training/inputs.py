"""What cropi-train looks at before it loads torch: whether what it needs is installed, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.digest_set import Seen
from cropi_tools.data.jsonl import Record, is_stream
from cropi_tools.data.manifest import Input, file_input, numbered
from cropi_tools.data.policies import optimizer_input, policy_input, starting_policy
from cropi_tools.data.questions import bare_question, without_examples
from cropi_tools.rewards import checked_verifiers
from cropi_tools.runtime.errors import UsageError
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.trackers import check_trackers


def check_available(options: TrainOptions, several: bool) -> None:
    """Raise what would otherwise end a run later: an engine or tracker that is not installed, or cannot be asked so.

    several: whether this process is one of several.
    """
    if several and options.against:
        raise UsageError("--against watches the passes of one process; leave it out, or run without torchrun")
    if several and options.engine == "vllm":
        raise UsageError(
            "--engine vllm samples for one process; under torchrun give --engine transformers, or --engine verl without torchrun"
        )
    if options.engine == "verl":
        if several:
            raise UsageError("--engine verl starts processes of its own; run it without torchrun")
    elif options.dry_run and any(is_stream(path) for path in options.prompts):
        raise UsageError("--dry-run reads the prompts and leaves nothing for the run; give a file in place of `-`")
    if options.engine == "vllm":
        from cropi_tools.engines.vllm_engine import check_vllm

        check_vllm()
    check_trackers(options.track)


def reference_folder(options: TrainOptions) -> str | None:
    """The policy of the KL term; None without one. InputError: the curriculum's first policy is not to be found."""
    if options.kl == 0:
        return None
    if options.reference == "start":
        return starting_policy(options.model)
    return options.model if options.reference == "stage" else options.reference


def inputs_of(options: TrainOptions) -> dict[str, Input]:
    """All that is read, by the roles that it has. InputError: something is not there."""
    inputs = {"policy": policy_input(options.model), **numbered("prompts", options.prompts)}
    inputs |= {f"evaluation set {name}": file_input(path) for name, path in options.evaluations}
    inputs |= {f"mean {name}": file_input(path) for name, path in options.against}
    reference = reference_folder(options)
    if reference is not None:
        inputs["reference"] = policy_input(reference)
    if options.carry == "full":
        inputs["optimizer"] = optimizer_input(options.model)
    return inputs


def warn_of_shared_questions(records: Sequence[Record], evaluations: Mapping[str, Sequence[Record]]) -> None:
    """Say how many questions of each evaluation set are trained on, whatever stands before them."""
    trained = Seen()
    for record in records:
        trained.add(bare_question(without_examples(record)))
    for name, found in evaluations.items():
        shared = sum(bare_question(without_examples(record)) in trained for record in found)
        if shared:
            runtime.warn(
                f"{shared} of the {len(found)} questions of --eval {name} are among those to train on: its accuracy will say less; "
                "cropi-prompts --exclude keeps them apart"
            )


def verifiers_of(options: TrainOptions) -> dict[str, Any]:
    """What decides the rewards (`rewards.checked_verifiers`). InputError, UsageError: a verifier cannot be used, or gives no partial credit."""
    files = [*options.prompts, *options.sets.values()]
    return checked_verifiers(files, options.verifier, options.allow_verifier, options.partial_credit)
