"""Scores against brute-force cosines of the vectors themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from forward_stores import forward_store
from gradient_stores import LAYOUT, make_store, spec, unseal

from cropi_tools.cli.score import score
from cropi_tools.data.store import open_stores
from cropi_tools.runtime.errors import InputError
from cropi_tools.scores.influence import exact_scores, mean_sketch, read_norms, sketch_scores
from cropi_tools.scores.options import ScoreOptions
from cropi_tools.sketches.projection import project_rows


def vectors(count: int, seed: int) -> list[np.ndarray]:
    """Gradients of very different norms, with something in common."""
    draw = np.random.default_rng(seed)
    common = np.random.default_rng(99).normal(size=LAYOUT.size)
    return [
        ((draw.normal(size=LAYOUT.size) + draw.uniform(-1, 1) * common) * 10 ** draw.uniform(-6, 3)).astype(np.float32)
        for _ in range(count)
    ]


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first.astype(np.float64), second.astype(np.float64)
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def test_exact_scores_equal_brute_force(tmp_path: Path) -> None:
    train = [*vectors(5, 1), None, *vectors(3, 2)]
    means = {"target": np.mean(vectors(4, 3), axis=0), "other": vectors(1, 4)[0]}
    inner = [
        {} if row is None else {name: float(row.astype(np.float64) @ mean) for name, mean in means.items()}
        for row in train
    ]
    against = {name: {"norm": float(np.linalg.norm(mean)), "sha256": name} for name, mean in means.items()}
    store = make_store(tmp_path / "t.zarr", train, spec("none"), inner=inner, against=against)
    found = list(exact_scores([store]))
    assert [record["id"] for record in found] == [f"p{n}" for n in range(9)]
    for record, row in zip(found, train, strict=True):
        if row is None:
            assert (record["scores"], record["norm"], record["status"]) == (None, None, "zero-advantage")
        else:
            assert record["scores"] == pytest.approx(
                {name: cosine(row, mean) for name, mean in means.items()}, abs=1e-6
            )
            assert record["norm"] == pytest.approx(float(np.linalg.norm(row)), rel=1e-6)


def test_sketch_scores_equal_brute_force_cosines_of_the_sketches(tmp_path: Path) -> None:
    """The mean is of gradients, each with its own norm: the mean of unit rows would give other scores by far."""
    train, valid = vectors(70, 1), [*vectors(6, 3), None, None]
    projection = spec(dim=64)
    rows, targets = (
        project_rows(projection, LAYOUT, np.stack(train)),
        project_rows(projection, LAYOUT, np.stack(valid[:6])),
    )
    store = make_store(tmp_path / "t.zarr", list(rows), projection)
    target = make_store(tmp_path / "v.zarr", [*targets, None, None], projection, prefix="v")
    mean = targets.astype(np.float64).sum(0) / 8  # all prompts count, those without a gradient as zero
    np.testing.assert_allclose(mean_sketch([target]), mean, atol=2e-3 * np.abs(mean).max())
    found = [record["scores"]["target"] for record in sketch_scores([store], {"target": [target]})]
    np.testing.assert_allclose(found, [cosine(row, mean) for row in rows], atol=2e-3)
    unit_mean = (targets / np.linalg.norm(targets, axis=1, keepdims=True)).mean(0)
    assert np.abs(np.array(found) - [cosine(row, unit_mean) for row in rows]).max() > 0.1


def test_dot_is_the_inner_product_with_the_mean(tmp_path: Path) -> None:
    """Exact and by sketches alike: the cosine times both norms, however small or large they are."""
    train, valid = vectors(9, 1), vectors(3, 3)
    projection = spec(dim=64)
    rows, targets = (project_rows(projection, LAYOUT, np.stack(given)) for given in (train, valid))
    inner = [{"t": 0.1 * n - 0.3} for n in range(9)]
    against = {"t": {"norm": 0.5, "sha256": "x"}}
    store = make_store(tmp_path / "t.zarr", list(rows), projection, inner=inner, against=against, norms=[2.0] * 9)
    assert [r["scores"]["t"] for r in exact_scores([store], "dot")] == pytest.approx([i["t"] for i in inner], abs=1e-7)
    target = make_store(tmp_path / "v.zarr", [*targets, None], projection, prefix="v")
    mean = targets.astype(np.float64).sum(0) / 4
    found = [record["scores"]["v"] for record in sketch_scores([store], {"v": [target]}, "dot")]
    scale = np.linalg.norm(rows, axis=1) * np.linalg.norm(mean)
    np.testing.assert_allclose(np.array(found) / scale, rows.astype(np.float64) @ mean / scale, atol=2e-3)
    assert max(found) > 1.0, "a dot product is not cut to a cosine's range"


def test_each_prompt_of_a_validation_set_as_a_set(tmp_path: Path) -> None:
    projection = spec(dim=64)
    rows, targets = (project_rows(projection, LAYOUT, np.stack(vectors(n, n))) for n in (30, 20))
    store = make_store(tmp_path / "t.zarr", list(rows), projection)
    parts = [
        make_store(tmp_path / f"v{a}.zarr", [None, *targets[a:b]], projection, prefix=f"v{a}-")
        for a, b in ((0, 12), (12, 20))
    ]
    names = [f"x/v{a}-{n + 1}" for a, count in ((0, 12), (12, 8)) for n in range(count)]
    for similarity, norms in (("cosine", False), ("dot", True)):
        records = list(sketch_scores([store], {"x": parts}, similarity, each=True))  # type: ignore[arg-type]
        assert list(records[0]["scores"]) == names
        found = np.array([list(record["scores"].values()) for record in records])
        expected = np.array([[cosine(row, target) for target in targets] for row in rows])
        scale = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(targets, axis=1) if norms else 1.0
        np.testing.assert_allclose(found / scale, expected, atol=2e-3)


def test_each_needs_a_gradient_in_the_set(tmp_path: Path) -> None:
    store = make_store(tmp_path / "t.zarr", [np.ones(64, np.float32)], spec())
    dead = make_store(tmp_path / "v.zarr", [None], spec(), prefix="v")
    with pytest.raises(InputError, match="'v': none of its prompts has a gradient"):
        list(sketch_scores([store], {"v": [dead]}, each=True))


def test_norms_from_another_store(tmp_path: Path) -> None:
    """Forward mode gives products, an earlier stage norms: their quotient may pass 1 and is not cut."""
    store = forward_store(tmp_path / "f.zarr", 5)
    norms = [
        make_store(tmp_path / "0.zarr", [None], spec(), prefix="p2-", policy="earlier"),
        make_store(tmp_path / "1.zarr", [np.ones(64, np.float32)] * 5, spec(), norms=[2.0] * 5, policy="earlier"),
    ]
    found = list(exact_scores([store], norms=read_norms(norms, store)))
    assert [r["scores"] and r["scores"]["t"] for r in found] == [0.0, 0.5, None, 1.5, 2.0]
    assert [r["norm"] for r in found] == [2.0, 2.0, None, 2.0, 2.0]
    plain = list(exact_scores([store], "dot"))
    assert [r["scores"] and r["scores"]["t"] for r in plain] == [0.0, 1.0, None, 3.0, 4.0]
    assert {r["norm"] for r in plain} == {None}


def test_the_command_takes_norms(tmp_path: Path) -> None:
    store = forward_store(tmp_path / "f.zarr", 5)
    norms = [make_store(tmp_path / f"n{n}.zarr", [np.ones(64, np.float32)] * 5, spec(), norms=[n] * 5) for n in (2, 4)]
    out = tmp_path / "scores.jsonl"
    first, second = (
        ScoreOptions(stores=(str(store.path),), output=str(out), norms=(str(found.path),)) for found in norms
    )
    score(first)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["scores"] and record["scores"]["t"] for record in records] == [0.0, 0.5, None, 1.5, 2.0]
    with pytest.raises(InputError, match="the contents of norms 1; --force replaces it"):
        score(second)


def test_norms_that_do_not_belong(tmp_path: Path) -> None:
    store = forward_store(tmp_path / "f.zarr", 5)
    with pytest.raises(InputError, match=r"f\.zarr: .*forward mode and holds no norms.*--similarity dot.*--norms"):
        list(exact_scores([store]))
    with pytest.raises(InputError, match="holds no norms"):
        read_norms([store], store)
    some = make_store(tmp_path / "n.zarr", [np.ones(64, np.float32)] * 3, spec(), norms=[2.0] * 3)
    with pytest.raises(InputError, match=r"f\.zarr: prompt 'p3' has no gradient norm in the stores of --norms"):
        list(exact_scores([store], norms=read_norms([some], store)))
    other = make_store(tmp_path / "o.zarr", [np.ones(64, np.float32)], spec(), layout=[["w", [3]]])
    with pytest.raises(InputError, match=r"o\.zarr: its gradients are over other parameters than those of .*f\.zarr"):
        read_norms([other], store)


def test_forward_mode_has_no_sketches_to_score_by(tmp_path: Path) -> None:
    store = forward_store(tmp_path / "f.zarr", 5)
    target = make_store(tmp_path / "v.zarr", [np.ones(64, np.float32)], spec(), prefix="v")
    with pytest.raises(InputError, match="different projections"):
        list(sketch_scores([store], {"v": [target]}))
    with pytest.raises(InputError, match="holds inner products alone"):
        list(sketch_scores([store], {"v": [store]}))


def test_a_single_row_scores_one_with_itself_and_minus_one_with_its_opposite(tmp_path: Path) -> None:
    projection = spec(dim=64)
    row = project_rows(projection, LAYOUT, np.stack(vectors(1, 5)))[0]
    store = make_store(tmp_path / "t.zarr", [row, -3 * row], projection)
    target = make_store(tmp_path / "v.zarr", [1e4 * row], projection, prefix="v")
    scores = [record["scores"]["v"] for record in sketch_scores([store], {"v": [target]})]
    assert scores == pytest.approx([1.0, -1.0], abs=1e-3)
    assert max(map(abs, scores)) <= 1.0


def test_shards_score_as_one_store(tmp_path: Path) -> None:
    projection = spec(dim=64)
    train, valid = (
        project_rows(projection, LAYOUT, np.stack(vectors(9, 1))),
        project_rows(projection, LAYOUT, np.stack(vectors(5, 2))),
    )
    whole = [make_store(tmp_path / "t.zarr", list(train), projection)]
    whole_target = [make_store(tmp_path / "v.zarr", list(valid), projection, prefix="v")]
    parts = [
        make_store(tmp_path / f"t{i}.zarr", list(train[a:b]), projection, prefix=f"{i}")
        for i, (a, b) in enumerate([(0, 4), (4, 9)])
    ]
    target = [
        make_store(tmp_path / f"v{i}.zarr", list(valid[a:b]), projection, prefix=f"v{i}")
        for i, (a, b) in enumerate([(0, 1), (1, 5)])
    ]
    expected = [record["scores"]["x"] for record in sketch_scores(whole, {"x": whole_target})]
    assert [record["scores"]["x"] for record in sketch_scores(parts, {"x": target})] == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("column", ["vector", "sketch_norm", "inner/target", "gradient_norm"])
def test_nan_is_refused_with_the_prompt(tmp_path: Path, column: str) -> None:
    projection = spec("none")
    against = {"target": {"norm": 1.0, "sha256": "x"}}
    make_store(tmp_path / "t.zarr", [None, *vectors(3, 1)], projection, inner=[{"target": 0.0}] * 4, against=against)
    array: Any = zarr.open_group(str(tmp_path / "t.zarr"), mode="r+")[column]
    array[1] = np.nan
    store = unseal(tmp_path / "t.zarr")
    with pytest.raises(InputError, match="'p2' is not finite"):
        list(
            exact_scores([store])
            if column in ("inner/target", "gradient_norm")
            else sketch_scores([store], {"v": [store]})
        )


def test_cosines_beyond_one_are_refused(tmp_path: Path) -> None:
    against = {"target": {"norm": 1.0, "sha256": "x"}}
    store = make_store(
        tmp_path / "t.zarr", vectors(1, 1), spec("none"), inner=[{"target": 3.0}], norms=[2.0], against=against
    )
    with pytest.raises(InputError, match=r"'p0' has cosines .*1\.5"):
        list(exact_scores([store]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projection": spec(dim=64, seed=1)}, "different projections: seed 0 against 1"),
        ({"projection": spec(dim=128)}, "different projections: dim 64 against 128"),
        ({"policy": "Q"}, "different policies: P against Q"),
        ({"objective": {"weighting": "none"}}, "different objectives: weighting token against none"),
    ],
)
def test_stores_of_another_kind_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    first, projection = (
        make_store(tmp_path / "a.zarr", [np.ones(64, np.float32)], spec(dim=64)),
        change.pop("projection", spec(dim=64)),
    )
    second = make_store(tmp_path / "b.zarr", [np.ones(projection.dim, np.float32)], projection, prefix="b", **change)
    with pytest.raises(InputError, match=words):
        list(sketch_scores([first], {"v": [second]}))
    with pytest.raises(InputError, match=words):
        open_stores([first.path, second.path])


def test_other_refusals(tmp_path: Path) -> None:
    rows = [np.ones(64, np.float32)]
    plain = make_store(tmp_path / "a.zarr", rows, spec(dim=64))
    with pytest.raises(InputError, match=r"a\.zarr: holds no inner products"):
        list(exact_scores([plain]))
    dead = make_store(tmp_path / "dead.zarr", [None, None], spec(dim=64), prefix="d")
    with pytest.raises(InputError, match="'v': none of its prompts has a gradient"):
        list(sketch_scores([plain], {"v": [dead]}))
    with pytest.raises(InputError, match=r"'p0' is in .*a\.zarr too"):
        open_stores([plain.path, make_store(tmp_path / "c.zarr", rows, spec(dim=64)).path])
    stores = [
        make_store(
            tmp_path / f"{n}.zarr",
            rows,
            spec(dim=64),
            prefix=n,
            inner=[{"t": 0.0}],
            against={"t": {"norm": 1.0, "sha256": n}},
        )
        for n in ("x", "y")
    ]
    with pytest.raises(InputError, match=r"y\.zarr: its inner products are against other means"):
        list(exact_scores(stores))


def test_a_store_without_any_gradient_scores_nothing(tmp_path: Path) -> None:
    dead = make_store(tmp_path / "dead.zarr", [None, None], spec(dim=64))
    target = make_store(tmp_path / "v.zarr", [np.ones(64, np.float32)], spec(dim=64), prefix="v")
    assert [record["scores"] for record in sketch_scores([dead], {"v": [target]})] == [None, None]
