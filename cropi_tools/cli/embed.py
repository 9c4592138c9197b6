"""cropi-embed: features of prompts, which scores are predicted from."""

from __future__ import annotations

from dataclasses import replace

from cropi_tools.cli.entry import entry
from cropi_tools.features.options import EmbedOptions
from cropi_tools.runtime.clock import importing

EXAMPLE = """
cropi-embed --model P0 train.jsonl -o train.features.safetensors
"""


def embed(options: EmbedOptions) -> None:
    """What a policy makes of each prompt before it answers: its hidden states, from one forward pass over the prompt.

    cropi-score --predict takes them to predict the scores of prompts that were never sampled. They are made once for a pool and serve
    all stages.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import warn_of_other_dates
    from cropi_tools.data.dates import asks_for_date
    from cropi_tools.data.hub import policy_folder
    from cropi_tools.data.manifest import Fingerprint, numbered
    from cropi_tools.data.output import Output
    from cropi_tools.data.policies import policy_input

    options = replace(options, model=policy_folder(options.model))
    inputs = {"policy": policy_input(options.model), **numbered("prompts", options.prompts)}
    dated = asks_for_date(options.model)
    if dated:
        warn_of_other_dates([options.model, *options.prompts], options.date)
    fingerprint = Fingerprint.of("cropi-embed", options.decisive(dated), inputs)
    target = Output(options.output, fingerprint, inputs, force=options.force)
    if not target.open():
        runtime.notify(f"{options.output}: up to date")
        return

    with importing():
        from cropi_tools.features import run

    done = run.embed(options, inputs["policy"].sha256, target)
    runtime.notify(f"{options.output}: features of {done} prompts")


main = entry(EmbedOptions, embed, name="cropi-embed", example=EXAMPLE)
