"""cropi-score: the influence of every prompt on every validation set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cropi_tools.cli.entry import entry
from cropi_tools.runtime.clock import importing
from cropi_tools.runtime.console import show, show_json
from cropi_tools.scores.options import ScoreOptions

if TYPE_CHECKING:
    from cropi_tools.data.jsonl import Record
    from cropi_tools.data.store import Store

EXAMPLE = """
cropi-score grads.zarr -o scores.jsonl
cropi-score train.sketch.zarr --valid target=valid.sketch.zarr -o scores.jsonl
cropi-score halves.zarr --reliability
"""


def score(options: ScoreOptions) -> None:
    """Cosine of each prompt's gradient with the mean gradient of each validation set.

    Without --valid the exact inner products in the stores are used (cropi-grad --against); with it, the sketches of both sides.
    --reliability scores nothing: it compares the halves that cropi-grad --halves has stored, on stdout.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import stoppable
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint

    with importing():
        from cropi_tools.data.store import open_stores, store_input

    if options.reliability:
        _print_reliability(options)
        return
    if options.dry_run:
        from cropi_tools.scores.estimate import estimate

        stores = open_stores(options.stores)
        estimate(_scores(options, stores), sum(store.prompts for store in stores)).tell(options.as_json)
        return
    inputs = {f"gradients {place}": store_input(path) for place, path in enumerate(options.stores, 1)}
    for name, paths in options.targets.items():
        inputs |= {f"validation set {name} {place}": store_input(path) for place, path in enumerate(paths, 1)}
    inputs |= {f"norms {place}": store_input(path) for place, path in enumerate(options.norms, 1)}
    fingerprint = Fingerprint.of("cropi-score", options.decisive(), inputs)
    target = JsonLinesOutput(options.output, fingerprint, inputs, options.force)
    if not target.open():
        runtime.notify(f"{options.output}: up to date")
        return
    opened = open_stores(options.stores)
    target.append(stoppable(_scores(options, opened)))
    live = sum(store.rows for store in opened)
    if not live:
        runtime.warn("no prompt has a gradient: there is nothing to rank")
    target.finish(ledger={"device": "cpu"})
    runtime.notify(f"{options.output}: {live} of {target.lines} prompts have a score and are ranked")


def _scores(options: ScoreOptions, stores: list[Store]) -> Iterator[Record]:
    with importing():
        from cropi_tools.data.store import open_stores
        from cropi_tools.scores.influence import exact_scores, read_norms, sketch_scores

    if options.valid:
        sets = {name: open_stores(paths) for name, paths in options.targets.items()}
        return sketch_scores(stores, sets, options.measure, options.each)
    norms = read_norms(open_stores(options.norms), stores[0]) if options.norms else None
    return exact_scores(stores, options.measure, norms)


def _print_reliability(options: ScoreOptions) -> None:
    import json

    from cropi_tools.data.store import open_stores
    from cropi_tools.scores.reliability import RATIO, as_table, measure
    from cropi_tools.scores.reliability import as_json as figures

    found = measure(open_stores(options.stores), options.similarity, options.ratio or RATIO)
    if options.as_json:
        show_json(json.dumps(figures(found), ensure_ascii=False, allow_nan=False))
    else:
        show(as_table(found))


main = entry(ScoreOptions, score, name="cropi-score", example=EXAMPLE)
