"""cropi-project's work: sketches of stored gradients equal those made while the gradient was in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive_policy
import naive_sketch
import numpy as np
import pytest
import tiny_policy
import torch
from gradient_stores import LAYOUT, make_store, matrix, open_output, spec

from cropi_tools.cli.grad import grad
from cropi_tools.data.means import content_hash, write_mean
from cropi_tools.data.store import Store, StoreWriter
from cropi_tools.gradients.options import GradOptions
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.sketches.project_stores import mean_spec, plan, project_mean, project_store
from cropi_tools.sketches.spec import Layout

DENSE = ("sparse-jl", "sparse-gaussian")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What cropi-grad makes of the same rollouts: raw rows, sketches, a mean."""
    folder = tmp_path_factory.mktemp("stores")
    made = [naive_policy.rollout(n) for n in range(5)]
    made[2] = made[2]._replace(samples=[sample._replace(reward=1.0) for sample in made[2].samples])
    rollouts = (str(naive_policy.write(folder / "r.jsonl", made)),)
    policy = str(tiny_policy.save(folder / "P0"))
    found: dict[str, Any] = {"mean": str(folder / "mean.safetensors")}
    grad(GradOptions(rollouts=rollouts, model=policy, output=found["mean"], mean=True, quiet=True))
    for method in ("none", "countsketch", "sjlt", *DENSE):
        path, against = folder / f"{method}.zarr", (("target", found["mean"]),)
        asked: Any = {"sketch": method, "dim": 1024, "keep": 0.2, "seed": 3, "quiet": True}
        grad(GradOptions(rollouts=rollouts, model=policy, output=str(path), against=against, **asked))
        found[method] = Store(path)
    found["layout"] = Layout.from_json(found["none"].attributes["layout"])
    return found


@pytest.mark.parametrize("method", ["countsketch", "sjlt", *DENSE])
def test_raw_rows_give_the_sketch_of_the_gradients(stores: dict[str, Any], method: str, tmp_path: Path) -> None:
    raw, direct = stores["none"], stores[method]
    projection = plan(raw, method, 1024, 3, 0.2 if method in DENSE else None)
    assert projection.to_json() == direct.attributes["projection"]
    project_store(raw, projection, open_output(tmp_path / "s.zarr"))
    found = Store(tmp_path / "s.zarr")
    scale = np.linalg.norm(matrix(direct), axis=1, keepdims=True)
    np.testing.assert_allclose(matrix(found) / scale, matrix(direct) / scale, atol=1e-3)
    for column in ("sketch_norm", "gradient_norm", "inner/target"):
        np.testing.assert_allclose(found.column(column), direct.column(column), rtol=1e-5)
    kept = ("id", "source", "status", "row", "pass_rate")
    assert [[entry[key] for key in kept] for entry in list(found.entries())] == [
        [entry[key] for key in kept] for entry in list(direct.entries())
    ]
    assert [entry["row"] for entry in list(found.entries())] == [0, 1, None, 2, 3]


def test_fold_equals_the_definition_of_the_smaller_sketch(stores: dict[str, Any], tmp_path: Path) -> None:
    """Against Python integers, coordinate by coordinate: hash_dim and segment stay those of the larger one."""
    projection = plan(stores["countsketch"], "countsketch", 128, 0, None)
    project_store(stores["countsketch"], projection, open_output(tmp_path / "f.zarr"))
    found = matrix(Store(tmp_path / "f.zarr"))
    raw = matrix(stores["none"])
    for row, values in zip(found[:2], raw, strict=False):
        tensors = {name: values[place].astype(np.float32) for name, place in stores["layout"].places.items()}
        expected = naive_sketch.countsketch(tensors, 3, 128, 1024, 1024)
        np.testing.assert_allclose(row, expected, atol=2e-3 * np.linalg.norm(expected))


def test_mean_to_one_row_equals_the_mean_of_the_sketched_rows(stores: dict[str, Any], tmp_path: Path) -> None:
    projection = mean_spec(stores["mean"], "countsketch", 1024, 3, None)
    project_mean(stores["mean"], projection, open_output(tmp_path / "m.zarr"))
    found = Store(tmp_path / "m.zarr")
    expected = matrix(stores["countsketch"]).sum(0) / 5  # one of the five prompts has no gradient
    np.testing.assert_allclose(matrix(found)[0], expected, atol=1e-3 * np.linalg.norm(expected))
    assert found.column("gradient_norm")[0] == pytest.approx(
        np.linalg.norm(matrix(stores["none"]).sum(0) / 5), rel=1e-4
    )


def test_a_killed_mean_is_not_added_twice(
    stores: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection = mean_spec(stores["mean"], "countsketch", 64, 3, None)

    def dying(self: StoreWriter, counters: Any, **described: Any) -> None:
        self.commit({"any": 1})
        self._index.close()
        raise KeyboardInterrupt

    output = open_output(tmp_path / "m.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", dying)
        with pytest.raises(KeyboardInterrupt):
            project_mean(stores["mean"], projection, output)
    output._release_lock()
    project_mean(stores["mean"], projection, open_output(tmp_path / "m.zarr"))
    assert len(list(Store(tmp_path / "m.zarr").entries())) == 1


def test_a_killed_projection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    rows = [None if n % 7 == 3 else draw.normal(size=LAYOUT.size).astype(np.float32) for n in range(150)]
    raw = make_store(tmp_path / "raw.zarr", rows, spec("none"))
    project_store(raw, spec(dim=64), open_output(tmp_path / "whole.zarr"))
    commit, count = StoreWriter.commit, 0

    def dying(self: StoreWriter, counters: Any) -> None:
        nonlocal count
        commit(self, counters)
        count += 1
        if count == 1:
            self._index.close()
            raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "commit", dying)
    output = open_output(tmp_path / "s.zarr")
    with pytest.raises(KeyboardInterrupt):
        project_store(raw, spec(dim=64), output)
    output._release_lock()
    project_store(raw, spec(dim=64), open_output(tmp_path / "s.zarr"))
    assert (matrix(Store(tmp_path / "s.zarr")) == matrix(Store(tmp_path / "whole.zarr"))).all()
    assert (tmp_path / "s.zarr" / "index.jsonl").read_bytes() == (tmp_path / "whole.zarr" / "index.jsonl").read_bytes()


def test_plans_that_cannot_be_made_are_refused(stores: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="only raw gradients"):
        plan(stores["sparse-jl"], "countsketch", 64, 0, None)
    with pytest.raises(UsageError, match="only raw gradients"):
        plan(stores["countsketch"], "sparse-jl", 64, 0, 0.1)
    with pytest.raises(UsageError, match="choose a divisor"):
        plan(stores["countsketch"], "countsketch", 192, 0, None)


def test_a_store_of_forward_mode_has_nothing_to_project(tmp_path: Path) -> None:
    attributes = {"policy": "P", "projection": None, "layout": LAYOUT.to_json(), "against": {}}
    writer = StoreWriter(open_output(tmp_path / "forward.zarr"), 1, 0, attributes)
    writer.add_scalars({"id": "p0", "source": "s", "status": "ok", "pass_rate": 0.5, "inner": {}})
    writer.finish({}, skipped={})
    with pytest.raises(InputError, match=r"forward.zarr: holds inner products alone"):
        plan(Store(tmp_path / "forward.zarr"), "countsketch", 64, 0, None)


def test_a_mean_of_a_layout_by_hand(tmp_path: Path) -> None:
    """Tensors are sketched by name, in whatever order the file holds them."""
    draw = np.random.default_rng(1)
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in LAYOUT.entries}
    facts = {"policy": "P", "tokenizer": "T", "objective": {}, "parameters": LAYOUT.to_json(), "norm": 1.0}
    mean = {name: torch.from_numpy(value) for name, value in reversed(tensors.items())}
    write_mean(tmp_path / "m.safetensors", mean, {**facts, "content": content_hash(mean)})
    project_mean(str(tmp_path / "m.safetensors"), spec(dim=64), open_output(tmp_path / "m.zarr"))
    expected = naive_sketch.countsketch(tensors, 0, 64, 64, 64)
    np.testing.assert_allclose(matrix(Store(tmp_path / "m.zarr"))[0], expected, atol=1e-3 * np.linalg.norm(expected))
