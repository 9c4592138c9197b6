"""cropi-project: sketches of stored gradients."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cropi_tools.cli.common import Force, Quiet, Seed, Version, command

EXAMPLE = """
cropi-project grads.zarr --dim 8192 -o train.sketch.zarr
cropi-project valid.mean.safetensors --dim 8192 -o valid.sketch.zarr
"""


def project(
    source: Annotated[
        str, typer.Argument(help="A store (raw, or a countsketch to fold), or a mean gradient.", metavar="STORE|MEAN")
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="The store to write.", metavar="STORE")],
    dim: Annotated[
        int,
        typer.Option("--dim", help="Sketch dimensions, a multiple of 64; for a fold, a divisor of the present ones."),
    ],
    sketch: Annotated[
        Literal["countsketch", "sparse-jl"],
        typer.Option("--sketch", help="All coordinates, or the paper's kept fraction."),
    ] = "countsketch",
    keep: Annotated[
        float, typer.Option("--keep", help="Fraction of coordinates kept by sparse-jl.", min=0.0, max=1.0)
    ] = 0.1,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Sparse random projection of stored gradients to --dim dimensions, inner products kept without bias.

    Raw stores (cropi-grad --sketch none) take any sketch, a countsketch folds to a smaller one, a mean gradient becomes one row.
    """
    from cropi_tools import runtime
    from cropi_tools.data.manifest import Fingerprint, file_input
    from cropi_tools.data.output import Output
    from cropi_tools.data.store import Store, store_input

    runtime.set_quiet(quiet)
    is_mean = source.endswith(".safetensors")
    inputs = {"source": file_input(source) if is_mean else store_input(source)}
    kept = keep if sketch == "sparse-jl" else None
    options = {"sketch": sketch, "dim": dim, "keep": kept, "seed": seed}
    target = Output(output, Fingerprint.of("cropi-project", options, inputs), inputs, folder=True, force=force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return

    from cropi_tools.influence import project as work

    opened = None if is_mean else Store(source)
    spec = (
        work.mean_spec(source, sketch, dim, seed, kept)
        if opened is None
        else work.plan(opened, sketch, dim, seed, kept)
    )
    if opened is None:
        work.project_mean(source, spec, target)
    else:
        work.project_store(opened, spec, target)
    runtime.notify(
        f"{output}: {'1 row' if opened is None else f'{len(opened.live)} rows'} of {dim} dimensions ({sketch})"
    )


main = command(project, name="cropi-project", example=EXAMPLE)
