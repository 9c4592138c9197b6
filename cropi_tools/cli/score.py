"""cropi-score: the influence of every prompt on every validation set."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cropi_tools.cli.common import Force, Output, Quiet, Version, command
from cropi_tools.runtime.console import show, show_json

EXAMPLE = """
cropi-score grads.zarr -o scores.jsonl
cropi-score --train train.sketch.zarr --valid target=valid.sketch.zarr -o scores.jsonl
cropi-score halves.zarr --reliability
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
    each: Annotated[
        bool, typer.Option("--each", help="Make every prompt of the validation stores a set of its own, NAME/ID.")
    ] = False,
    similarity: Annotated[
        Literal["cosine", "dot"] | None,
        typer.Option("--similarity", help="Cosine, or inner product, which keeps the norms. [default: cosine]"),
    ] = None,
    norms: Annotated[
        list[str] | None,
        typer.Option(
            "--norms",
            help="Divide by the gradient norms in this store of the same prompts (an earlier stage's, say), for stores of "
            "forward mode; may be repeated.",
            metavar="STORE",
        ),
    ] = None,
    reliability: Annotated[
        bool,
        typer.Option("--reliability", help="Print how well one half of the rollouts predicts the other's ranking."),
    ] = False,
    ratio: Annotated[
        str | None,
        typer.Option(
            "--ratio",
            help="With --reliability: the share of all prompts that will be selected; its precision is printed. [default: 0.1]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --reliability: print it as JSON.")] = False,
    output: Output = "-",
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Cosine of each prompt's gradient with the mean gradient of each validation set.

    Without --valid the exact inner products in the stores are used (cropi-grad --against); with it, the sketches of both sides.
    --reliability scores nothing: it compares the halves that cropi-grad --halves has stored, on stdout.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import parse_named, stoppable
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.data.store import open_stores, store_input
    from cropi_tools.runtime.errors import UsageError
    from cropi_tools.scores.influence import exact_scores, read_norms, sketch_scores

    runtime.set_quiet(quiet)
    pool = [*(stores or []), *(train or [])]
    if not pool:
        raise UsageError("no store of the pool's gradients: name one")
    if reliability:
        if valid or norms or output != "-" or force:
            raise UsageError(
                "--reliability compares the halves in the stores and prints on stdout; leave --valid, --norms, -o and --force out"
            )
        _print_reliability(pool, similarity, ratio, as_json)
        return
    if ratio is not None:
        raise UsageError("--ratio is of --reliability; cropi-select has one of its own")
    if as_json:
        raise UsageError("--json is of --reliability; scores are JSON lines already")
    if each and not valid:
        raise UsageError("--each takes the prompts of validation stores; name them with --valid")
    if norms and (valid or similarity == "dot"):
        raise UsageError(
            "--norms is for cosines of exact inner products; leave it out with --valid and --similarity dot"
        )
    measure = similarity or "cosine"
    targets: dict[str, list[str]] = {}
    for text in valid or []:
        name, path = parse_named(text, "--valid")
        targets.setdefault(name, []).append(path)
    inputs = {f"gradients {place}": store_input(path) for place, path in enumerate(pool, 1)}
    for name, paths in targets.items():
        inputs.update({f"validation set {name} {place}": store_input(path) for place, path in enumerate(paths, 1)})
    inputs.update({f"norms {place}": store_input(path) for place, path in enumerate(norms or [], 1)})
    options = {"sets": sorted(targets), "each": each, "similarity": measure}
    target = JsonLinesOutput(output, Fingerprint.of("cropi-score", options, inputs), inputs, force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return
    opened = open_stores(pool)
    if targets:
        sets = {name: open_stores(paths) for name, paths in targets.items()}
        records = sketch_scores(opened, sets, measure, each)
    else:
        records = exact_scores(opened, measure, read_norms(open_stores(norms), opened[0]) if norms else None)
    target.append(stoppable(records))
    live = sum(store.rows for store in opened)
    if not live:
        runtime.warn("no prompt has a gradient: there is nothing to rank")
    target.finish(ledger={"device": "cpu"})
    runtime.notify(f"{output}: {live} of {target.lines} prompts have a score")


def _print_reliability(
    pool: list[str], similarity: Literal["cosine", "dot"] | None, ratio: str | None, as_json: bool
) -> None:
    import json

    from cropi_tools.data.store import open_stores
    from cropi_tools.scores.reliability import RATIO, as_table, measure
    from cropi_tools.scores.reliability import as_json as figures

    found = measure(open_stores(pool), similarity, RATIO if ratio is None else ratio)
    if as_json:
        show_json(json.dumps(figures(found), ensure_ascii=False, allow_nan=False))
    else:
        show(as_table(found))


main = command(score, name="cropi-score", example=EXAMPLE)
