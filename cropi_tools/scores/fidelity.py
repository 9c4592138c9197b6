"""Fidelity: how well a sketch ranks prompts, told by the exact influence of the same prompts (docs/method.md, "How many dimensions").

A store made with cropi-grad --against holds the exact inner product of every gradient with a mean gradient; sketching that mean as the
rows were sketched gives the cosines that scoring by sketches would have used. Both rankings are compared by Spearman's correlation and
by the paper's precision@10 %, beside what the formula for the noise of a sketched cosine predicts for these very prompts.

One sketch gives a whole curve: a countsketch folds to its halves, and the first rows of a dense projection are the smaller projection.
Rows are streamed a block at a time; only the cosines of all prompts are held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cropi_tools import runtime
from cropi_tools.data.means import check_whole, read_facts, read_finished, read_tensors
from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError, UsageError, printable
from cropi_tools.scores.influence import exact_scores
from cropi_tools.scores.rank_metrics import BOOTSTRAP_ROUNDS, bootstrap_interval, precision_at, spearman
from cropi_tools.sketches.project_stores import projection_of
from cropi_tools.sketches.projection import fold, project_rows, sketch_vector
from cropi_tools.sketches.spec import SPARSE, Layout, ProjectionSpec

LEAST_PROMPTS = 20  # below, a tenth is one prompt and an interval says nothing
LARGEST_DIM, SMALLEST_DIM = 65536, 512
DRAWS = 100  # of noise, from which the prediction is averaged
SORTED_PROMPTS = 10_000_000  # prompts an interval may sort in all: a pool of 100 thousand has 100 bootstrap rounds


class SketchAgreement(NamedTuple):
    """One sketch against exact influence; intervals are 95 %, of a bootstrap over prompts.

    noise: root mean square of sketched minus exact cosine. The last three are what the formula predicts, NaN where it needs raw rows.
    """

    dim: int
    spearman: float
    spearman_interval: tuple[float, float]
    precision: float
    precision_interval: tuple[float, float]
    noise: float
    expected_noise: float
    expected_spearman: float
    expected_precision: float


class Fidelity(NamedTuple):
    """The figures of one store and validation set. prompts: those with a gradient; spread: of their exact cosines."""

    store: str
    name: str
    method: str
    keep: float | None
    prompts: int
    spread: float
    agreements: list[SketchAgreement]


def plan_fidelity(
    store: Store, method: str | None, dim: int | None, seed: int, keep: float | None
) -> tuple[ProjectionSpec, list[int]]:
    """The sketch to examine, and the dimensions: `dim`, or every halving of the sketch's own down to 512.

    A sketched store is examined as it is; raw rows are sketched by method (None: countsketch), seed and keep. UsageError when the
    store's sketch is another one, or cannot be made smaller to `dim`.
    """
    made = projection_of(store)
    if made.method == "none":
        spec = ProjectionSpec.create(
            method or "countsketch", Layout.from_json(store.attributes["layout"]), dim or LARGEST_DIM, seed, keep
        )
    else:
        asked = {"--sketch": (method, made.method), "--seed": (seed or None, made.seed), "--keep": (keep, made.keep)}
        for option, (wanted, present) in asked.items():
            if wanted not in (None, present):
                raise UsageError(
                    f"{store.path}: was sketched with {option} {present}, not {wanted}; leave {option} out"
                )
        spec = made
    if dim is not None:
        _check_smaller(spec, dim)
        return spec, [dim]
    dims = [spec.dim]
    while shrinks(spec) and dims[-1] % 128 == 0 and dims[-1] // 2 >= SMALLEST_DIM:
        dims.append(dims[-1] // 2)
    return spec, dims


def shrinks(spec: ProjectionSpec) -> bool:
    """Whether smaller sketches follow from this one."""
    return spec.method == "countsketch" or spec.method in SPARSE


def _check_smaller(spec: ProjectionSpec, dim: int) -> None:
    if spec.method == "countsketch":
        spec.folded(dim)
    elif dim != spec.dim and not (shrinks(spec) and 64 <= dim < spec.dim and dim % 64 == 0):
        raise UsageError(f"a {spec.method} of {spec.dim} dimensions gives none of {dim}; choose the dimension it has")


def shrunk(rows: NDArray[np.float32], spec: ProjectionSpec, dim: int) -> NDArray[np.float32]:
    """Sketches [n, dim] out of sketches [n, spec.dim], up to a factor that cosines do not see."""
    return fold(rows, dim) if spec.method == "countsketch" else rows[:, :dim]


def measure(store: Store, means: Mapping[str, str], spec: ProjectionSpec, dims: Sequence[int]) -> list[Fidelity]:
    """The fidelity of sketch `spec` at `dims` to the exact influence `inner/NAME` of a store's rows, for each NAME of `means`.

    means: files of the mean gradients, which must be those the store was made against. InputError: the store has no such inner
    products, another mean, or one that is zero. Fewer than LEAST_PROMPTS prompts with a gradient give no agreements.
    """
    for name, path in means.items():
        check_mean(store, name, path)
    exact = exact_cosines(store, list(means))
    enough = store.rows >= LEAST_PROMPTS
    agreements = compare(store, means, exact, spec, dims) if enough else {name: [] for name in means}
    return [
        Fidelity(str(store.path), name, spec.method, spec.keep, len(values), spread_of(values), agreements[name])
        for name, values in exact.items()
    ]


def spread_of(values: NDArray[np.float64]) -> float:
    """The standard deviation of cosines [n]; NaN of none."""
    return float(np.std(values)) if len(values) else math.nan


def check_mean(store: Store, name: str, mean: str) -> None:
    """InputError unless the store was made against this very mean gradient, under this name, and it is not zero."""
    against = store.attributes["against"]
    if name not in against:
        others = f" (only with {', '.join(sorted(against))})" if against else ""
        raise InputError(
            f"{store.path}: holds no exact inner products with '{name}'{others}; make it with cropi-grad --against {name}={mean}"
        )
    facts = read_finished(mean)
    if facts.get("content") != against[name]["sha256"]:
        raise InputError(
            f"{mean}: is not the mean gradient that {store.path} holds inner products with as '{name}'; "
            "name that file, or make the store again"
        )
    if facts["norm"] == 0:
        raise InputError(f"{mean}: is zero, none of its prompts has a gradient, so there is no direction to follow")
    check_whole(mean, facts)


def exact_cosines(store: Store, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The exact cosines [rows] of a store's gradients with each of the mean gradients `names`."""
    scores = [record["scores"] for record in exact_scores([store]) if record["scores"] is not None]
    return {name: np.array([score[name] for score in scores]) for name in names}


def compare(
    store: Store,
    means: Mapping[str, str],
    exact: Mapping[str, NDArray[np.float64]],
    spec: ProjectionSpec,
    dims: Sequence[int],
) -> dict[str, list[SketchAgreement]]:
    """For each mean, the agreement of the sketch `spec` with its exact cosines [rows], at each of the dimensions."""
    layout, raw = Layout.from_json(store.attributes["layout"]), store.attributes["projection"]["method"] == "none"
    partial = spec.keep is not None and spec.keep < 1
    targets = {name: _Target(path, spec, layout, dims, store.rows) for name, path in means.items()}
    with runtime.progress("sketches", store.rows) as shown:
        for start, block in store.blocks():
            here = slice(start, start + len(block))
            rows = project_rows(spec, layout, block) if raw else block
            for place, dim in enumerate(dims):
                units = _unit(shrunk(rows, spec, dim))
                for target in targets.values():
                    target.cosines[place, here] = units @ target.directions[place]
            if raw and partial:
                for name, target in targets.items():
                    target.losses[here] = target.loss_of_keeping(block, exact[name][here], layout)
            shown.advance(len(block))
            runtime.stop_if_requested()
    found: dict[str, list[SketchAgreement]] = {}
    for name, target in targets.items():
        cosines = exact[name]
        if partial:
            target.losses *= (1 / (spec.keep or 1) - 1) if raw else math.nan
        found[name] = [
            agreement(values, cosines, np.sqrt((1 - cosines**2) ** 2 / dim + target.losses), dim)
            for values, dim in zip(target.cosines, dims, strict=True)
        ]
    return found


class _Target:
    """A mean gradient: its unit sketches, and what is found along it, [dims, rows] and [rows]."""

    def __init__(self, path: str, spec: ProjectionSpec, layout: Layout, dims: Sequence[int], rows: int) -> None:
        self._tensors, self._norm = read_tensors(path), read_facts(path)["norm"]
        whole = sketch_vector(spec, layout, self._tensors)
        self.directions = [_unit(shrunk(whole[None], spec, dim))[0] for dim in dims]
        self.cosines, self.losses = np.empty((len(dims), rows)), np.zeros(rows)

    def loss_of_keeping(
        self, block: NDArray[np.float32], exact: NDArray[np.float64], layout: Layout
    ) -> NDArray[np.float64]:
        """For unit rows g [n, P], v the mean over its norm and cosines c [n]: the sums of (g v - c (g^2 + v^2) / 2)^2.

        Times 1 / keep - 1 it is the variance that keeping coordinates gives a cosine; with c = 0 it is the S of docs/method.md.
        """
        total, half = np.zeros(len(block)), exact[:, None] / 2
        for name, place in layout.places.items():
            row = block[:, place].astype(np.float64)
            mean = self._tensors[name].double().reshape(-1).numpy() / self._norm
            total += ((row * mean - half * (row**2 + mean**2)) ** 2).sum(axis=1)
        return total


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows [n, d] over their norms; a row of zeros, whose kept coordinates all were zero, stays one."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def agreement(
    found: NDArray[np.float64], exact: NDArray[np.float64], deviation: NDArray[np.float64], dim: int
) -> SketchAgreement:
    """Sketched against exact cosines [n], beside exact cosines with normal noise of the predicted deviation [n]."""
    count = len(exact)
    rounds = min(BOOTSTRAP_ROUNDS, max(100, SORTED_PROMPTS // count))
    draw = np.random.default_rng(0)
    noisy = [
        exact + deviation * draw.standard_normal(count) for _ in range(DRAWS if np.isfinite(deviation).all() else 0)
    ]
    return SketchAgreement(
        dim,
        spearman(found, exact),
        bootstrap_interval(lambda drawn: spearman(found[drawn], exact[drawn]), count, rounds=rounds),
        precision_at(found, exact),
        bootstrap_interval(lambda drawn: precision_at(found[drawn], exact[drawn]), count, rounds=rounds),
        float(np.sqrt(np.mean((found - exact) ** 2))),
        float(np.sqrt(np.mean(deviation**2))),
        float(np.mean([spearman(values, exact) for values in noisy])) if noisy else math.nan,
        float(np.mean([precision_at(values, exact) for values in noisy])) if noisy else math.nan,
    )


def as_json(fidelity: Fidelity) -> dict[str, Any]:
    """The figures as a JSON object; null where there is none."""
    record = {**fidelity._asdict(), "spread": None if math.isnan(fidelity.spread) else fidelity.spread}
    record["agreements"] = [
        {
            key: [_or_none(end) for end in value] if isinstance(value, tuple) else _or_none(value)
            for key, value in found._asdict().items()
        }
        for found in fidelity.agreements
    ]
    return record


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def as_table(fidelity: Fidelity) -> str:
    """The figures as lines of text, in words where there are none."""
    told = printable(f"{fidelity.store}: {fidelity.prompts} prompts with a gradient")
    if not fidelity.agreements:
        return f"{told}, too few to say how well a sketch ranks them: {LEAST_PROMPTS} or more are needed"
    told += f", exact cosines with '{printable(fidelity.name)}' of spread {fidelity.spread:.4g}"
    if fidelity.spread == 0:
        return f"{told}: all prompts have the same influence, so there is nothing to rank"
    kept = f", keeping {fidelity.keep:g}" if fidelity.keep is not None else ""
    heads = ("dim", "Spearman", "precision@10 %", "noise", "formula: noise", "Spearman", "precision@10 %")
    lines = [
        f"{told}; a precision@10 % of .95 is to be expected from {200 / fidelity.spread**2:.2g} dimensions",
        f"{fidelity.method}{kept}",
        "{:>8}  {:<22}  {:<22}  {:>7}   {:>14}  {:>8}  {:>14}".format(*heads),
    ]
    for found in fidelity.agreements:
        figures = (found.noise, found.expected_noise, found.expected_spearman, found.expected_precision)
        noise, expected, rank, precision = ("-" if math.isnan(value) else f"{value:.4f}" for value in figures)
        lines.append(
            f"{found.dim:>8}  {_with_interval(found.spearman, found.spearman_interval):<22}  "
            f"{_with_interval(found.precision, found.precision_interval):<22}  {noise:>7}   {expected:>14}  {rank:>8}  {precision:>14}"
        )
    return "\n".join(lines)


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
