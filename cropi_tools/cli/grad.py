"""cropi-grad: the off-policy gradient of every prompt, or their mean."""

from __future__ import annotations

from cropi_tools.cli.entry import entry
from cropi_tools.gradients.options import GradOptions
from cropi_tools.runtime.clock import importing

EXAMPLE = """
cropi-grad --model P0 valid.rollouts.jsonl --mean -o valid.mean.safetensors
cropi-grad --model P0 train.rollouts.jsonl --against target=valid.mean.safetensors -o grads.zarr
"""


def grad(options: GradOptions) -> None:
    """The off-policy gradient of every prompt from its stored rollouts, sketched while it is in memory.

    Prompts whose samples all have the same reward have no gradient; they are skipped before the forward pass and recorded.
    """
    from cropi_tools import runtime
    from cropi_tools.data.manifest import Fingerprint, file_input, numbered
    from cropi_tools.data.output import Output
    from cropi_tools.data.policies import metric_of, optimizer_input, policy_input

    options = options.with_folders()
    inputs = {
        "policy": policy_input(options.model),
        **numbered("rollouts", options.rollouts),
        **{f"mean {name}": file_input(path) for name, path in options.against},
    }
    behavior = metric = None
    if options.behavior:
        inputs["behavior policy"] = policy_input(options.behavior)
        behavior = inputs["behavior policy"].sha256
    if options.preconditioner:
        inputs["optimizer state"] = optimizer_input(options.preconditioner)
        metric = metric_of(options.preconditioner, inputs["optimizer state"].sha256)
    objective = options.objective(behavior, metric)
    facts = {"policy": inputs["policy"].sha256, "objective": objective}
    if options.dry_run:
        with importing():
            from cropi_tools.gradients.estimate import estimate

        estimate(options, facts).tell(options.as_json)
        return
    target = Output(
        options.output,
        Fingerprint.of("cropi-grad", options.decisive(objective), inputs),
        inputs,
        folder=not options.mean,
        force=options.force,
    )
    if not target.open():
        runtime.notify(f"{options.output}: up to date")
        return

    with importing():
        from cropi_tools.gradients.run import run

    counts, prompts = run(options, facts, target)
    live, tokens, as_rows = (counts.pop(key, 0) for key in ("ok", "tokens", "tokens_as_rows"))
    skipped = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    saved = f"; {tokens:,} tokens, {as_rows:,} with a row a sample" if tokens < as_rows else ""
    runtime.notify(
        f"{options.output}: {live} of {prompts} prompts have a gradient{f' ({skipped})' if skipped else ''}{saved}"
    )


main = entry(GradOptions, grad, name="cropi-grad", example=EXAMPLE)
