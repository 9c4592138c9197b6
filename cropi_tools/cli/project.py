"""cropi-project: sketches of stored gradients."""

from __future__ import annotations

from cropi_tools.cli.entry import entry
from cropi_tools.runtime.clock import importing
from cropi_tools.runtime.console import show, show_json
from cropi_tools.sketches.options import ProjectOptions

EXAMPLE = """
cropi-project grads.zarr --dim 8192 -o train.sketch.zarr
cropi-project valid.mean.safetensors --dim 8192 -o valid.sketch.zarr
cropi-project grads.zarr --fidelity target=valid.mean.safetensors
"""


def project(options: ProjectOptions) -> None:
    """Sparse random projection of stored gradients to --dim dimensions, inner products kept without bias.

    Raw stores (cropi-grad --sketch none) take any sketch, a countsketch folds to a smaller one, a mean gradient becomes one row.
    With --fidelity or --check nothing is written: what they find goes to stdout.
    """
    from cropi_tools import runtime
    from cropi_tools.data.manifest import Fingerprint, file_input
    from cropi_tools.data.output import Output

    with importing():
        from cropi_tools.data.store import Store, store_input

    if options.store_check:
        _print_check(options)
        return
    if options.fidelity:
        _print_fidelity(options)
        return
    assert options.dim is not None
    if options.dry_run:
        _print_estimate(options, options.dim)
        return
    assert options.output is not None
    inputs = {"source": file_input(options.source) if options.is_mean else store_input(options.source)}
    fingerprint = Fingerprint.of("cropi-project", options.decisive(), inputs)
    target = Output(options.output, fingerprint, inputs, folder=True, force=options.force)
    if not target.open():
        runtime.notify(f"{options.output}: up to date")
        return

    with importing():
        from cropi_tools.sketches import project_stores

    target.begin_work()
    how = (options.method, options.dim, options.seed, options.kept)
    if options.is_mean:
        project_stores.project_mean(options.source, project_stores.mean_spec(options.source, *how), target)
        rows = "1 row"
    else:
        store = Store(options.source)
        project_stores.project_store(store, project_stores.plan(store, *how), target)
        rows = f"{store.rows} rows"
    runtime.notify(f"{options.output}: {rows} of {options.dim} dimensions ({options.method})")


def _print_estimate(options: ProjectOptions, dim: int) -> None:
    with importing():
        from cropi_tools.data.store import Store
        from cropi_tools.sketches import project_stores

    how = (options.method, dim, options.seed, options.kept)
    if options.is_mean:
        found = project_stores.estimate_mean(options.source, project_stores.mean_spec(options.source, *how))
    else:
        store = Store(options.source)
        found = project_stores.estimate(store, project_stores.plan(store, *how))
    found.tell(options.as_json)


def _print_fidelity(options: ProjectOptions) -> None:
    import json

    with importing():
        from cropi_tools.data.store import Store
        from cropi_tools.scores import fidelity

    store = Store(options.source)
    keep = options.kept if store.attributes["projection"]["method"] == "none" else options.keep
    spec, dims = fidelity.plan_fidelity(store, options.sketch, options.dim, options.seed, keep)
    for found in fidelity.measure(store, dict(options.fidelity), spec, dims):
        if options.as_json:
            show_json(json.dumps(fidelity.as_json(found), allow_nan=False))
        else:
            show(fidelity.as_table(found))


def _print_check(options: ProjectOptions) -> None:
    import json

    from cropi_tools.data.store_check import check_store

    found = check_store(options.source)
    if options.as_json:
        show_json(json.dumps({"store": options.source, **found}, allow_nan=False))
        return
    others = ", ".join(f"{count} {status}" for status, count in found["by_status"].items() if status != "ok")
    rows = f"{found['projection']} of {found['dim']} dimensions" if found["projection"] else "no rows (forward mode)"
    products = f"inner products with {', '.join(found['sets'])}" if found["sets"] else "no inner products"
    show(
        f"{options.source}: whole; {found['live']} of {found['prompts']} prompts have a gradient{f' ({others})' if others else ''}; "
        f"{rows}; {products}{' in halves too' if found['halves'] else ''}; {found['bytes'] / 1e6:.1f} MB"
    )


main = entry(ProjectOptions, project, name="cropi-project", example=EXAMPLE)
