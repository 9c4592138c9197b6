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
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.store import Store

EXAMPLE = """
cropi-score grads.zarr -o scores.jsonl
cropi-score train.sketch.zarr --valid target=valid.sketch.zarr -o scores.jsonl
cropi-score probe.zarr --predict pool.jsonl --features pool.features.safetensors -o scores.jsonl
cropi-score halves.zarr --reliability
cropi-score halves.zarr --suspects train.rollouts.jsonl -o suspects.jsonl
"""


def score(options: ScoreOptions) -> None:
    """Cosine of each prompt's gradient with the mean gradient of each validation set.

    Without --valid the exact inner products in the stores are used (cropi-grad --against); with it, the sketches of both sides.
    With --predict the stores are a part of a pool, and the rest of it gets predicted scores, marked as such: select the best of
    them to measure next. Two options score nothing and look at the halves that cropi-grad --halves has
    stored: --reliability compares them, on stdout; --suspects lists prompts to look at, most suspicious first.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import stoppable
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint, numbered

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
    for what, files in (("pool", options.predict), ("features", options.features), ("old scores", options.old)):
        inputs |= numbered(what, files)
    inputs |= numbered("rollouts", options.suspects)
    fingerprint = Fingerprint.of("cropi-score", options.decisive(), inputs)
    target = JsonLinesOutput(options.output, fingerprint, inputs, options.force)
    if not target.open():
        runtime.notify(f"{options.output}: up to date")
        return
    opened = open_stores(options.stores)
    if options.suspects:
        _list_suspects(options, opened, target)
        return
    live = sum(store.rows for store in opened)
    if options.predict:
        with importing():
            from cropi_tools.data.features import Features
            from cropi_tools.scores import predict

        features = Features(options.features)
        known = predict.gather(options, stoppable(_scores(options, opened)))
        predictor = predict.fitted(options, known, features)
        predict.tell_ceiling(opened, options)
        target.append(stoppable(predict.records(known, predictor, features)))
        target.finish(ledger={"device": "cpu"}, facts={"prediction": predict.facts(known, predictor)})
        predicted = target.lines - len(known.fresh)
        runtime.notify(f"{options.output}: {live} of {target.lines} prompts have a score, {predicted} a predicted one")
        return
    target.append(stoppable(_scores(options, opened)))
    if not live:
        runtime.warn("no prompt has a gradient: there is nothing to rank")
    target.finish(ledger={"device": "cpu"})
    runtime.notify(f"{options.output}: {live} of {target.lines} prompts have a score and are ranked")


def _list_suspects(options: ScoreOptions, stores: list[Store], target: JsonLinesOutput) -> None:
    from cropi_tools import runtime
    from cropi_tools.cli.common import stoppable

    with importing():
        from cropi_tools.scores.suspects import CHANCE, audit, suspect_records

    found = audit(stores, options.similarity)
    target.append(stoppable(suspect_records(found, options.suspects, stores[0])))
    target.finish(ledger={"device": "cpu"})
    if found.in_words:
        runtime.warn(f"no prompt is listed: {found.in_words}")
        return
    if found.without_groups:
        runtime.warn(
            "the noise of the validation prompts, which all scores share, is not known for itself (--method jvp, older versions and very few "
            "validation prompts do not tell it): many prompts may be listed by it at once"
        )
    for place, name in enumerate(found.names):
        kind, away = int(found.kind[:, place].sum()), int(found.away[:, place].sum())
        if kind:
            runtime.notify(
                f"{name}: of {kind} prompts whose sources pull towards it {away} pull away by more than noise; without any influence it would "
                f"be {CHANCE:.0%} at most"
            )
        else:
            runtime.notify(
                f"{name}: no source pulls towards it by more than noise, so no prompt of its kind can be told"
            )
    look = (
        "look at their reference answers"
        if target.lines
        else "no prompt pulls away from a target of its kind by more than noise"
    )
    runtime.notify(f"{options.output}: {target.lines} of {len(found.records)} prompts with a gradient; {look}")


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
