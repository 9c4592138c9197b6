"""cropi-score: the influence of every prompt on every validation set."""

from __future__ import annotations

from typing import Annotated

import typer

from cropi_tools.cli.common import Force, Output, Quiet, Version, command

EXAMPLE = """
cropi-score grads.zarr -o scores.jsonl
cropi-score --train train.sketch.zarr --valid target=valid.sketch.zarr -o scores.jsonl
"""


def score(
    stores: Annotated[
        list[str] | None, typer.Argument(help="Stores of the pool's gradients (shards together).", metavar="STORE")
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option("--train", help="The same as STORE; may be repeated.", metavar="STORE")
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            "--valid", help="A validation set's store; the same name again adds a shard.", metavar="NAME=STORE"
        ),
    ] = None,
    output: Output = "-",
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Cosine of each prompt's gradient with the mean gradient of each validation set.

    Without --valid the exact inner products in the stores are used (cropi-grad --against); with it, the sketches of both sides.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import parse_named, stoppable
    from cropi_tools.data.errors import UsageError
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.data.output import JsonLinesOutput
    from cropi_tools.data.store import open_stores, store_input
    from cropi_tools.influence.scoring import exact_scores, sketch_scores

    runtime.set_quiet(quiet)
    pool = [*(stores or []), *(train or [])]
    if not pool:
        raise UsageError("no store of the pool's gradients: name one")
    targets: dict[str, list[str]] = {}
    for text in valid or []:
        name, path = parse_named(text, "--valid")
        targets.setdefault(name, []).append(path)
    inputs = {f"gradients {place}": store_input(path) for place, path in enumerate(pool, 1)}
    for name, paths in targets.items():
        inputs.update({f"validation set {name} {place}": store_input(path) for place, path in enumerate(paths, 1)})
    target = JsonLinesOutput(output, Fingerprint.of("cropi-score", {"sets": sorted(targets)}, inputs), inputs, force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return
    opened = open_stores(pool)
    records = (
        sketch_scores(opened, {name: open_stores(paths) for name, paths in targets.items()})
        if targets
        else exact_scores(opened)
    )
    target.append(stoppable(records))
    live = sum(len(store.live) for store in opened)
    if not live:
        runtime.warn("no prompt has a gradient: there is nothing to rank")
    target.finish(ledger={"device": "cpu"})
    runtime.notify(f"{output}: {live} of {target.lines} prompts have a score")


main = command(score, name="cropi-score", example=EXAMPLE)
