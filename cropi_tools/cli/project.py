"""cropi-project: sketches of stored gradients."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cropi_tools.cli.common import AsJson, Force, Quiet, Seed, Version, command
from cropi_tools.runtime.console import show, show_json

EXAMPLE = """
cropi-project grads.zarr --dim 8192 -o train.sketch.zarr
cropi-project valid.mean.safetensors --dim 8192 -o valid.sketch.zarr
cropi-project grads.zarr --fidelity target=valid.mean.safetensors
"""


def project(
    source: Annotated[
        str, typer.Argument(help="A store (raw, or a countsketch to fold), or a mean gradient.", metavar="STORE|MEAN")
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="The store to write, of --dim dimensions.", metavar="STORE")
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option("--dim", help="Sketch dimensions, a multiple of 64; for a fold, a divisor of the present ones."),
    ] = None,
    sketch: Annotated[
        Literal["countsketch", "sparse-jl", "sparse-gaussian", "sjlt"] | None,
        typer.Option(
            "--sketch",
            help="How rows are compressed: all coordinates, or a kept fraction (the paper). [default: countsketch]",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep", help="Fraction of coordinates kept by the sparse ones. [default: 0.1]", min=0.0, max=1.0
        ),
    ] = None,
    fidelity: Annotated[
        list[str] | None,
        typer.Option(
            "--fidelity",
            help="Print how well the sketch ranks prompts, by the exact products with this mean in the store; may be repeated.",
            metavar="NAME=MEAN",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Print whether the store is whole.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Sparse random projection of stored gradients to --dim dimensions, inner products kept without bias.

    Raw stores (cropi-grad --sketch none) take any sketch, a countsketch folds to a smaller one, a mean gradient becomes one row.
    With --fidelity or --check nothing is written: what they find goes to stdout.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import parse_named
    from cropi_tools.data.manifest import Fingerprint, file_input
    from cropi_tools.data.output import Output
    from cropi_tools.data.store import Store, store_input
    from cropi_tools.runtime.errors import UsageError

    runtime.set_quiet(quiet)
    is_mean = source.endswith(".safetensors")
    if fidelity or check:
        if fidelity and check:
            raise UsageError("--fidelity and --check are two questions; ask one at a time")
        if output or force:
            raise UsageError("--fidelity and --check print what they find and write nothing; leave -o and --force out")
        if is_mean:
            raise UsageError(f"{source}: is a mean gradient; --fidelity and --check are about a store")
        if check:
            if dim or sketch or keep is not None or seed:
                raise UsageError("--check reads a store as it is; leave --dim, --sketch, --keep and --seed out")
            _print_check(source, as_json)
        else:
            means = dict(parse_named(text, "--fidelity") for text in fidelity or [])
            _print_fidelity(source, means, sketch, dim, seed, keep, as_json)
        return
    if output is None or dim is None:
        raise UsageError("a sketch needs --dim and -o STORE; without -o, ask for --fidelity or --check")
    if as_json:
        raise UsageError("--json is of --fidelity and --check; a sketch goes to -o")

    method, kept = sketch or "countsketch", _kept(sketch, keep)
    inputs = {"source": file_input(source) if is_mean else store_input(source)}
    options = {"sketch": method, "dim": dim, "keep": kept, "seed": seed}
    target = Output(output, Fingerprint.of("cropi-project", options, inputs), inputs, folder=True, force=force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return

    from cropi_tools.sketches import project_stores as work

    target.begin_work()

    opened = None if is_mean else Store(source)
    spec = (
        work.mean_spec(source, method, dim, seed, kept)
        if opened is None
        else work.plan(opened, method, dim, seed, kept)
    )
    if opened is None:
        work.project_mean(source, spec, target)
    else:
        work.project_store(opened, spec, target)
    runtime.notify(f"{output}: {'1 row' if opened is None else f'{opened.rows} rows'} of {dim} dimensions ({method})")


def _kept(sketch: str | None, keep: float | None) -> float | None:
    """The fraction a sketch keeps: --keep, or 0.1 for the sparse ones."""
    return 0.1 if keep is None and sketch in ("sparse-jl", "sparse-gaussian") else keep


def _print_fidelity(
    path: str, means: dict[str, str], sketch: str | None, dim: int | None, seed: int, keep: float | None, as_json: bool
) -> None:
    import json

    from cropi_tools.data.store import Store
    from cropi_tools.scores import fidelity

    store = Store(path)
    if store.attributes["projection"]["method"] == "none":
        keep = _kept(sketch, keep)
    spec, dims = fidelity.plan_fidelity(store, sketch, dim, seed, keep)
    for found in fidelity.measure(store, means, spec, dims):
        if as_json:
            show_json(json.dumps(fidelity.as_json(found), allow_nan=False))
        else:
            show(fidelity.as_table(found))


def _print_check(path: str, as_json: bool) -> None:
    import json

    from cropi_tools.data.store_check import check_store

    found = check_store(path)
    if as_json:
        show_json(json.dumps({"store": path, **found}, allow_nan=False))
        return
    others = ", ".join(f"{count} {status}" for status, count in found["by_status"].items() if status != "ok")
    rows = f"{found['projection']} of {found['dim']} dimensions" if found["projection"] else "no rows (forward mode)"
    products = f"inner products with {', '.join(found['sets'])}" if found["sets"] else "no inner products"
    show(
        f"{path}: whole; {found['live']} of {found['prompts']} prompts have a gradient{f' ({others})' if others else ''}; "
        f"{rows}; {products}{' in halves too' if found['halves'] else ''}; {found['bytes'] / 1e6:.1f} MB"
    )


main = command(project, name="cropi-project", example=EXAMPLE)
