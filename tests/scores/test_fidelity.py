"""cropi-project --fidelity: the agreement of sketched with exact influence, against a plain numpy account of the same sketches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import naive_sketch
import numpy as np
import pytest
import torch
from gradient_stores import LAYOUT, make_store
from numpy.typing import NDArray

from cropi_tools.cli.project import project
from cropi_tools.data.means import content_hash, read_facts, write_mean
from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.scores.fidelity import Fidelity, agreement, as_json, as_table, measure, plan_fidelity, shrunk
from cropi_tools.sketches.options import ProjectOptions
from cropi_tools.sketches.projection import fold, project_rows
from cropi_tools.sketches.spec import ProjectionSpec

PROMPTS = 50


def tensors_of(vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    return {name: vector[place] for name, place in LAYOUT.places.items()}


def gradients(count: int, seed: int = 0) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Rows of very different lengths and cosines with the mean, both with a few large coordinates, as gradients have."""
    draw = np.random.default_rng(seed)
    size = np.exp(draw.normal(size=LAYOUT.size))
    mean = draw.normal(size=LAYOUT.size) * size
    rows = [
        (tilt * mean + draw.normal(size=LAYOUT.size) * size) * np.exp(2 * draw.normal())
        for tilt in draw.normal(size=count) / 2
    ]
    return [row.astype(np.float32) for row in rows], mean.astype(np.float32)


def cosines(rows: NDArray[Any], mean: NDArray[Any]) -> NDArray[np.float64]:
    rows, mean = rows.astype(np.float64), mean.astype(np.float64)
    return np.array([row @ mean / (np.linalg.norm(row) * np.linalg.norm(mean) or 1) for row in rows])


class Pool:
    """A folder of stores of the same gradients, with the mean gradient they were made against."""

    def __init__(self, folder: Path, rows: Sequence[NDArray[np.float32]], mean: NDArray[np.float32]) -> None:
        self.folder, self.rows, self.vector = folder, rows, mean
        self.mean = self.write(folder / "mean.safetensors", mean)
        self.exact = cosines(np.stack(rows), mean) if rows else np.zeros(0)

    def write(self, path: Path, mean: NDArray[np.float32]) -> str:
        tensors = {name: torch.from_numpy(mean[LAYOUT.places[name]].reshape(shape)) for name, shape in LAYOUT.entries}
        facts = {"content": content_hash(tensors), "norm": float(np.linalg.norm(mean.astype(np.float64)))}
        facts["layout"] = LAYOUT.sha256
        write_mean(path, tensors, {**facts, "parameters": LAYOUT.to_json()})
        return str(path)

    def store(self, spec: ProjectionSpec, name: str = "s.zarr", **changed: Any) -> Store:
        """The rows by `spec`, one prompt without an advantage among them."""
        made: list[NDArray[np.float32] | None] = (
            list(project_rows(spec, LAYOUT, np.stack(self.rows))) if self.rows else []
        )
        wide, norms = (
            self.vector.astype(np.float64),
            [float(np.linalg.norm(row.astype(np.float64))) for row in self.rows],
        )
        inner = [{"target": float(row.astype(np.float64) @ wide)} for row in self.rows]
        at = min(3, len(made))
        for column, empty in ((made, None), (norms, 0.0), (inner, {})):
            column.insert(at, empty)  # type: ignore[attr-defined]
        against = {"target": {"norm": float(np.linalg.norm(wide)), "sha256": read_facts(self.mean)["content"]}}
        settings: dict[str, Any] = {"inner": inner, "against": against, "norms": norms, **changed}
        return make_store(self.folder / name, made, spec, **settings)


def the_spec(method: str, dim: int | None = None, seed: int = 0, keep: float | None = None) -> ProjectionSpec:
    return ProjectionSpec.create(method, LAYOUT, dim, seed, keep)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals take most of the time and matter to one test."""
    monkeypatch.setattr("cropi_tools.scores.fidelity.BOOTSTRAP_ROUNDS", 100)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool(tmp_path_factory.mktemp("pool"), *gradients(PROMPTS))


@pytest.fixture(scope="module")
def raw(pool: Pool) -> Store:
    return pool.store(the_spec("none"), "raw.zarr")


def naive_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([sum(other < value for other in values) for value in values], np.float64)


def plain_account(pool: Pool, sketch: Callable[[dict[str, Any]], NDArray[np.float64]]) -> tuple[float, float, float]:
    """Spearman, precision@10 % and noise, without ties, of sketches by definition."""
    mean = sketch(tensors_of(pool.vector))
    found = cosines(np.stack([sketch(tensors_of(row)) for row in pool.rows]), mean)
    rank = float(np.corrcoef(naive_ranks(found), naive_ranks(pool.exact))[0, 1])
    best, truth = (sorted(range(PROMPTS), key=lambda p: -values[p])[: PROMPTS // 10] for values in (found, pool.exact))
    noise = math.sqrt(sum((a - b) ** 2 for a, b in zip(found, pool.exact, strict=True)) / PROMPTS)
    return rank, len(set(best) & set(truth)) / len(truth), noise


def only(found: list[Fidelity]) -> Fidelity:
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("spec", "sketch"),
    [
        (the_spec("countsketch", 128, 7), lambda t: naive_sketch.countsketch(t, 7, 128, 128, 128)),
        (the_spec("sjlt", 64, 7), lambda t: naive_sketch.sjlt(t, 7, 64, 4)),
        (the_spec("sparse-jl", 64, 7, 0.3), lambda t: naive_sketch.sparse_jl(t, 7, 64, 0.3)),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_figures_of_raw_rows_are_those_of_the_sketch_by_definition(
    pool: Pool, raw: Store, spec: ProjectionSpec, sketch: Any
) -> None:
    planned, dims = plan_fidelity(raw, spec.method, spec.dim, 7, spec.keep)
    assert (planned, dims) == (spec, [spec.dim])
    found = only(measure(raw, {"target": pool.mean}, planned, dims))
    assert (found.prompts, found.method, found.keep) == (PROMPTS, spec.method, spec.keep)
    assert found.spread == pytest.approx(np.std(pool.exact), rel=1e-5)
    agreed = found.agreements[0]
    rank, precision, noise = plain_account(pool, sketch)
    assert (agreed.dim, agreed.precision) == (spec.dim, precision)
    assert agreed.spearman == pytest.approx(rank, abs=1e-4)
    assert agreed.noise == pytest.approx(noise, rel=1e-3)
    assert 0.3 < rank < 0.999, "a sketch of this size is neither perfect nor blind, so that the test can fail"


def test_a_sketched_store_is_examined_at_every_halving(pool: Pool) -> None:
    store = pool.store(the_spec("countsketch", 1024, 5), "halved.zarr")
    spec, dims = plan_fidelity(store, None, None, 0, None)
    assert dims == [1024, 512]
    found = only(measure(store, {"target": pool.mean}, spec, dims))
    for agreed in found.agreements:
        dim = agreed.dim
        rank, precision, noise = plain_account(pool, lambda t, dim=dim: naive_sketch.countsketch(t, 5, dim, 1024, 1024))
        assert agreed.precision == precision
        assert agreed.spearman == pytest.approx(rank, abs=1e-3)
        assert agreed.noise == pytest.approx(noise, rel=2e-2)  # rows in float16
    assert plan_fidelity(store, None, 64, 0, None) == (spec, [64])


def test_raw_and_sketched_stores_agree(pool: Pool, raw: Store) -> None:
    spec = the_spec("countsketch", 512, 2)
    sketched = pool.store(spec, "sketched.zarr")
    dims = [512, 128]
    one, other = (only(measure(store, {"target": pool.mean}, spec, dims)).agreements for store in (raw, sketched))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.precision == theirs.precision
        assert mine.noise == pytest.approx(theirs.noise, rel=1e-2)
        assert mine.expected_noise == pytest.approx(theirs.expected_noise, rel=1e-6)


@pytest.mark.parametrize("spec", [the_spec("sparse-jl", 256, 1, 0.4), the_spec("sparse-gaussian", 256, 1, 0.4)])
def test_the_first_rows_of_a_dense_projection_are_the_smaller_one(pool: Pool, spec: ProjectionSpec) -> None:
    rows = np.stack(pool.rows[:3])
    smaller = project_rows(the_spec(spec.method, 64, 1, 0.4), LAYOUT, rows)
    # scaled by 1 / sqrt(keep dim)
    np.testing.assert_allclose(
        shrunk(project_rows(spec, LAYOUT, rows), spec, 64) * 2, smaller, rtol=1e-4, atol=1e-4 * abs(smaller).max()
    )


def test_a_countsketch_shrinks_by_folding(pool: Pool) -> None:
    spec, rows = the_spec("countsketch", 256, 1), np.stack(pool.rows[:3])
    whole = project_rows(spec, LAYOUT, rows)
    np.testing.assert_array_equal(shrunk(whole, spec, 64), fold(whole, 64))
    expected = naive_sketch.countsketch(tensors_of(rows[0]), 1, 64, 256, 256)
    np.testing.assert_allclose(shrunk(whole, spec, 64)[0], expected, atol=1e-4 * np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("method", "keep"), [("countsketch", None), ("sjlt", None), ("sparse-jl", 0.2), ("sparse-gaussian", 0.2)]
)
def test_the_formula_predicts_the_noise(pool: Pool, raw: Store, method: str, keep: float | None) -> None:
    """Over many seeds, within a quarter; with a fifth kept it would be too small by half without the loss of keeping."""
    square, expected = [], []
    for seed in range(20):
        found = only(measure(raw, {"target": pool.mean}, the_spec(method, 256, seed, keep), [256])).agreements[0]
        square.append(found.noise**2)
        expected.append(found.expected_noise)
    assert len({round(value, 9) for value in expected}) == 1
    assert math.sqrt(np.mean(square)) == pytest.approx(expected[0], rel=0.25)
    if keep:
        assert expected[0] > 2 * math.sqrt(np.mean((1 - pool.exact**2) ** 2) / 256)


def test_the_prediction_of_ranks_is_that_of_normal_noise() -> None:
    """Normal scores with normal noise: the rank correlation is 6/pi asin(r/2), r the correlation."""
    exact = np.random.default_rng(3).normal(size=3000) * 0.05
    found = agreement(exact, exact, np.full(3000, 0.05), 400)
    assert (found.spearman, found.precision, found.noise) == (pytest.approx(1), 1, 0)
    assert found.expected_spearman == pytest.approx(6 / math.pi * math.asin(math.sqrt(0.5) / 2), abs=0.01)
    assert found.expected_noise == pytest.approx(0.05)


def test_method_md_says_what_ten_and_two_hundred_over_the_square_of_the_spread_give() -> None:
    exact = np.random.default_rng(4).normal(size=3000) * 0.1
    for factor, rank, precision in ((10, 0.95, 0.79), (200, 0.997, 0.95)):
        dim = round(factor / 0.1**2)
        found = agreement(exact, exact, (1 - exact**2) / math.sqrt(dim), dim)
        assert found.expected_spearman == pytest.approx(rank, abs=0.01)
        assert found.expected_precision == pytest.approx(precision, abs=0.02)


def test_stored_rows_of_a_kept_fraction_have_no_prediction(pool: Pool) -> None:
    """What keeping loses cannot be told from the sketches."""
    store = pool.store(the_spec("sparse-jl", 128, 0, 0.3), "kept.zarr")
    spec, dims = plan_fidelity(store, None, None, 0, None)
    assert dims == [128]
    found = only(measure(store, {"target": pool.mean}, spec, dims))
    assert math.isnan(found.agreements[0].expected_precision)
    line = json.loads(json.dumps(as_json(found), allow_nan=False))["agreements"][0]
    assert line["expected_noise"] is None
    assert 0 < line["noise"] < 1
    assert as_table(found).splitlines()[-1].split()[-3:] == ["-", "-", "-"]


def test_json_and_table(pool: Pool, raw: Store, capsys: pytest.CaptureFixture[str]) -> None:
    project(ProjectOptions(source=str(raw.path), fidelity=(("target", pool.mean),), dim=256, as_json=True))
    found = json.loads(capsys.readouterr().out)
    assert {**found, "agreements": None, "spread": None} == {
        "store": str(raw.path),
        "name": "target",
        "method": "countsketch",
        "keep": None,
        "prompts": PROMPTS,
        "spread": None,
        "agreements": None,
    }
    line = found["agreements"][0]
    for figure in ("spearman", "precision"):
        low, high = line[f"{figure}_interval"]
        assert low <= line[figure] <= high
        assert low < high
    project(ProjectOptions(source=str(raw.path), fidelity=(("target", pool.mean),), dim=256))
    text = capsys.readouterr().out.splitlines()
    assert text[1] == "countsketch"
    assert text[3].split()[:2] == ["256", f"{line['spearman']:.3f}"]
    assert f"{line['precision']:.3f} [" in text[3]
    project(ProjectOptions(source=str(raw.path), fidelity=(("target", pool.mean),), dim=64, sketch="sparse-jl"))
    assert "sparse-jl, keeping 0.1" in capsys.readouterr().out


def test_another_mean_is_refused(pool: Pool, raw: Store) -> None:
    other = pool.write(pool.folder / "other.safetensors", pool.vector * 2)
    with pytest.raises(InputError, match=r"other.safetensors: is not the mean gradient .* 'target'"):
        measure(raw, {"target": other}, the_spec("countsketch", 64), [64])
    with pytest.raises(InputError, match=r"no exact inner products with 'any' \(only with target\); .*--against any="):
        measure(raw, {"any": pool.mean}, the_spec("countsketch", 64), [64])
    bare = pool.store(the_spec("none"), "bare.zarr", against={})
    with pytest.raises(InputError, match="with 'target'; make it with cropi-grad --against"):
        measure(bare, {"target": pool.mean}, the_spec("countsketch", 64), [64])


def test_a_mean_of_nothing_is_refused(tmp_path: Path) -> None:
    pool = Pool(tmp_path, gradients(2)[0], np.zeros(LAYOUT.size, np.float32))
    with pytest.raises(InputError, match="is zero"):
        measure(pool.store(the_spec("none")), {"target": pool.mean}, the_spec("countsketch", 64), [64])


@pytest.mark.parametrize("count", [0, 19])
def test_too_few_prompts_are_said_in_words(tmp_path: Path, count: int) -> None:
    pool = Pool(tmp_path, *gradients(count))
    found = only(measure(pool.store(the_spec("none")), {"target": pool.mean}, the_spec("countsketch", 64), [64]))
    assert f"{count} prompts with a gradient, too few" in as_table(found)
    line = as_json(found)
    assert (line["prompts"], line["agreements"], line["spread"] is None) == (count, [], count == 0)


def test_a_pool_with_nothing_to_rank_is_said_in_words(tmp_path: Path) -> None:
    rows, mean = gradients(1)
    pool = Pool(tmp_path, rows * 25, mean)
    found = only(measure(pool.store(the_spec("none")), {"target": pool.mean}, the_spec("countsketch", 64), [64]))
    assert "nothing to rank" in as_table(found)
    assert as_json(found)["agreements"][0]["spearman"] is None


def test_a_sketch_that_keeps_nothing_of_a_row_is_no_error(tmp_path: Path) -> None:
    rows, mean = gradients(30)
    rows[0] = np.zeros(LAYOUT.size, np.float32)
    rows[0][1] = 1.0
    pool = Pool(tmp_path, rows, mean)
    spec = next(
        spec
        for spec in (the_spec("sparse-jl", 64, seed, 0.3) for seed in range(20))
        if not project_rows(spec, LAYOUT, rows[0][None]).any()
    )
    assert math.isfinite(
        only(measure(pool.store(the_spec("none")), {"target": pool.mean}, spec, [64])).agreements[0].noise
    )


def test_what_a_store_cannot_give_is_refused(pool: Pool, raw: Store) -> None:
    folded = pool.store(the_spec("countsketch", 256, 4), "refused.zarr")
    for given, said in (
        ({"method": "sparse-jl"}, "leave --sketch out"),
        ({"seed": 5}, "leave --seed out"),
        ({"keep": 0.5}, "leave --keep out"),
        ({"dim": 192}, "choose a divisor"),
    ):
        with pytest.raises(UsageError, match=said):
            plan_fidelity(folded, **{"method": None, "dim": None, "seed": 0, "keep": None, **given})  # type: ignore[arg-type]
    jl = pool.store(the_spec("sparse-jl", 256, 4, 0.5), "refused-jl.zarr")
    assert plan_fidelity(jl, None, 128, 0, None)[1] == [128]
    for dim in (512, 100):
        with pytest.raises(UsageError, match="choose the dimension it has"):
            plan_fidelity(jl, None, dim, 0, None)
    sjlt = pool.store(the_spec("sjlt", 256, 4), "refused-sjlt.zarr")
    assert plan_fidelity(sjlt, None, None, 0, None)[1] == [256]
    with pytest.raises(UsageError, match="choose the dimension it has"):
        plan_fidelity(sjlt, None, 128, 0, None)
    with pytest.raises(UsageError, match="keep"):
        plan_fidelity(raw, "countsketch", 64, 0, 0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs --dim and -o"),
        ({"dim": 64}, "needs --dim and -o"),
        ({"output": "x.zarr"}, "needs --dim and -o"),
        ({"dim": 64, "output": "x.zarr", "as_json": True}, "--json is of"),
        ({"fidelity": (("target", "m"),), "output": "x.zarr"}, "leave -o and --force out"),
        ({"store_check": True, "force": True}, "leave -o and --force out"),
        ({"store_check": True, "fidelity": (("target", "m"),)}, "one at a time"),
        ({"store_check": True, "dim": 64}, "leave --dim"),
    ],
)
def test_senseless_combinations_are_usage_errors(raw: Store, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ProjectOptions(source=str(raw.path), **options)


def test_questions_about_a_mean_are_usage_errors(pool: Pool) -> None:
    with pytest.raises(UsageError, match="about a store"):
        ProjectOptions(source=pool.mean, store_check=True)


def test_check_prints_one_line(raw: Store, capsys: pytest.CaptureFixture[str]) -> None:
    project(ProjectOptions(source=str(raw.path), store_check=True))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"whole; {PROMPTS} of {PROMPTS + 1} prompts have a gradient (1 zero-advantage)" in said
    assert "none of 716 dimensions; inner products with target;" in said
    project(ProjectOptions(source=str(raw.path), store_check=True, as_json=True))
    found = json.loads(capsys.readouterr().out)
    assert (found["live"], found["dim"], found["sets"]) == (PROMPTS, LAYOUT.size, ["target"])
