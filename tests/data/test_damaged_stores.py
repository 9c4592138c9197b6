"""Stores and means whose metadata are damaged: whoever reads them takes them or refuses them in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_stores import LAYOUT, make_store, open_output, spec, unseal
from mutations import BRIEF, JUNK, TEXTS, mutations, one_line, survives, write

from cropi_tools.data.means import content_hash, write_mean
from cropi_tools.data.store import Store, StoreWriter, open_stores, store_input
from cropi_tools.data.store_check import check_store
from cropi_tools.gradients.targets import Against
from cropi_tools.runtime.errors import CropiError, InputError
from cropi_tools.scores import fidelity
from cropi_tools.scores.influence import exact_scores, read_norms, sketch_scores
from cropi_tools.scores.reliability import measure
from cropi_tools.sketches import project_stores

ROWS = 24
NODES = ("zarr.json", "vector/zarr.json", "inner/t/zarr.json", "sketch_norm/zarr.json", "manifest.json")

# what zarr leaves open when it fails half-way is closed by the garbage collector, in whatever test comes next
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files are written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def whole_store(path: Path, projection: str = "countsketch") -> Path:
    """A store with halves, and groups in them, as it was before there were checksums: damage does not show at once."""
    made = spec(projection)
    draw = np.random.default_rng(0)
    rows = [None if n == 2 else draw.normal(size=made.dim).astype(np.float32) for n in range(ROWS)]
    norms = [9.0] * ROWS
    half = {"gradient_norm": 5.0, "inner": {"t": 0.25}, "groups": {"t": [0.1, 0.2]}}
    against = {"t": {"norm": 1.5, "sha256": "0" * 64, "halves": [1.0, 2.0], "groups": [2, 2]}}
    original = StoreWriter.add

    def add(self: StoreWriter, entry: dict[str, Any], row: Any) -> None:
        original(self, entry if row is None else {**entry, "halves": [half, half]}, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "add", add)
        make_store(path, rows, made, inner=[{"t": 0.1 + n / 100} for n in range(ROWS)], against=against, norms=norms)
    unseal(path)
    return path


def use(path: Path, also: Path) -> None:
    """All that is done with a store, by the rooms that do it; also: another of its kind."""
    store_input(path)
    (store,) = open_stores([path])
    for action in (
        lambda: check_store(path),
        lambda: list(exact_scores([store])),
        lambda: list(exact_scores([Store(also)], norms=read_norms([store], Store(also)))),
        lambda: list(sketch_scores([store], {"v": [Store(also)]})),
        lambda: list(sketch_scores([Store(also)], {"v": [store]}, each=True)),
        lambda: measure([store]),
        lambda: fidelity.plan_fidelity(store, None, None, 0, None),
        lambda: projected(store),
    ):
        survives(action, "after it was opened")


def projected(store: Store) -> None:
    target = store.path.with_name("folded.zarr")
    made = project_stores.plan(store, "countsketch", 64, 0, None)
    output = open_output(target)
    try:
        project_stores.project_store(store, made, output)
    finally:
        output._release_lock()
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(output.part, ignore_errors=True)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    whole_store(folder / "s.zarr")
    whole_store(folder / "raw.zarr", "none")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of zarr, of codecs and types that it does not know
@pytest.mark.parametrize("node", NODES)
def test_every_node_of_the_metadata(node: str, stores: Path, tmp_path: Path) -> None:
    path = shutil.copytree(stores / "s.zarr", tmp_path / "s.zarr")
    use(path, stores / "s.zarr")
    whole = json.loads((path / node).read_text())
    for what, value in mutations(whole, BRIEF):
        write(path / node, value)
        survives(lambda: use(path, stores / "s.zarr"), f"{node}: {what}", "s.zarr")
    for what, content in TEXTS.items():
        (path / node).write_bytes(content)
        survives(lambda: use(path, stores / "s.zarr"), f"{node}: {what}", "s.zarr")
        assert not survives(lambda: check_store(path), f"{node}: {what}", "s.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("line", [0, 2, ROWS - 1])
def test_every_node_of_the_index(line: int, stores: Path, tmp_path: Path) -> None:
    path = shutil.copytree(stores / "s.zarr", tmp_path / "s.zarr")
    lines = (path / "index.jsonl").read_text().splitlines()
    refused = 0
    for what, value in mutations(json.loads(lines[line]), JUNK if line == 2 else BRIEF):
        write(path / "index.jsonl", value)
        damaged = (path / "index.jsonl").read_text()
        (path / "index.jsonl").write_text("\n".join([*lines[:line], damaged, *lines[line + 1 :]]) + "\n")
        refused += not survives(lambda: use(path, stores / "s.zarr"), what, "s.zarr")
    assert refused > 20


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_nodes_of_the_wrong_kind(stores: Path, tmp_path: Path) -> None:
    """An array in place of the group and the reverse, shapes of trillions, folders in place of files, nodes that are not there."""
    group = json.loads((stores / "s.zarr" / "zarr.json").read_text())
    array = json.loads((stores / "s.zarr" / "vector" / "zarr.json").read_text())

    def put(node: str, value: Any) -> Callable[[Path], None]:
        return lambda path: write(path / node, value)

    def folder_at(node: str) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            (path / node).unlink()
            (path / node).mkdir()

        return change

    def column(**changes: Any) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            node = path / "inner" / "t" / "zarr.json"
            write(node, {**json.loads(node.read_text()), **changes})

        return change

    grid = {"name": "regular", "configuration": {"chunk_shape": [0, 64]}}
    wide = {"name": "regular", "configuration": {"chunk_shape": [10**12, 64]}}
    changes = {
        "the root is an array": put("zarr.json", array),
        "vector is a group": put("vector/zarr.json", group),
        "inner/t is a group": put("inner/t/zarr.json", group),
        "chunks of no row": put("vector/zarr.json", {**array, "chunk_grid": grid}),
        "chunks of a trillion rows": put("vector/zarr.json", {**array, "chunk_grid": wide}),
        "a trillion rows": put("vector/zarr.json", {**array, "shape": [10**12, 64]}),
        "a trillion coordinates": put("vector/zarr.json", {**array, "shape": [ROWS - 1, 10**12]}),
        "three dimensions": put("vector/zarr.json", {**array, "shape": [ROWS - 1, 64, 1]}),
        "less rows than the index": put("vector/zarr.json", {**array, "shape": [ROWS - 2, 64]}),
        "rows of texts": put("vector/zarr.json", {**array, "data_type": "string", "fill_value": ""}),
        "rows of whole numbers": put("vector/zarr.json", {**array, "data_type": "int16", "fill_value": 0}),
        "a trillion scalars": column(shape=[10**12]),
        "scalars of whole numbers": column(data_type="int32", fill_value=0),
        "an unknown codec": column(codecs=[{"name": "magic", "configuration": {}}]),
        "an odd fill value": column(fill_value="odd"),
        "no vector": lambda path: shutil.rmtree(path / "vector"),
        "no column": lambda path: shutil.rmtree(path / "inner"),
        "no group": lambda path: (path / "zarr.json").unlink(),
        "no index": lambda path: (path / "index.jsonl").unlink(),
        "zarr.json is a folder": folder_at("zarr.json"),
        "index.jsonl is a folder": folder_at("index.jsonl"),
        "manifest.json is a folder": folder_at("manifest.json"),
        "newer": put("zarr.json", {**group, "attributes": {**group["attributes"], "schema": 7}}),
    }
    for number, (what, change) in enumerate(changes.items()):
        path = shutil.copytree(stores / "s.zarr", tmp_path / f"{number}.zarr")
        change(path)
        with pytest.raises(CropiError) as caught:
            check_store(path)
        said = one_line(caught.value, f"{number}.zarr")
        assert what != "newer" or "made by a newer cropi-tools (schema 7); upgrade" in said
        survives(lambda path=path: use(path, stores / "s.zarr"), what, f"{number}.zarr")


def test_every_node_of_the_checksums(tmp_path: Path) -> None:
    """With a manifest that agrees with them."""
    path = make_store(tmp_path / "s.zarr", [np.ones(64, np.float32)] * 3, spec()).path
    whole = json.loads((path / "checksums.json").read_text())
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["outputs"]["checksums.json"]
    write(path / "manifest.json", manifest)
    check_store(path)
    damaged = [*mutations(whole)]
    for what, value in damaged:
        write(path / "checksums.json", value)
        survives(lambda: [check_store(path), *Store(path).blocks()], what, "s.zarr")
    for what, content in TEXTS.items():
        (path / "checksums.json").write_bytes(content)
        assert not survives(lambda: Store(path), what, path / "checksums.json")


@pytest.mark.slow
def test_every_node_of_a_means_header(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(*shape, generator=draw) for name, shape in LAYOUT.entries}
    half = {name: tensor * 2 for name, tensor in tensors.items()}
    objective = {"weighting": "token"}
    from cropi_tools.gradients.half_sums import DIM, groups_spec

    facts: dict[str, Any] = {"policy": "P", "tokenizer": "T", "objective": objective, "layout": LAYOUT.sha256}
    facts |= {"parameters": LAYOUT.to_json(), "norm": 3.5, "prompts": 4, "counters": {"tokens": 7, "ok": 4}}
    facts |= {"content": content_hash(tensors, half)}
    projection = groups_spec(LAYOUT).to_json()
    facts["halves"] = {"prompts": [2, 2], "live": [2, 2], "norms": [1.0, 2.0], "groups": [1, 2]}
    facts["halves"]["projection"] = projection
    store = make_store(
        tmp_path / "s.zarr",
        [np.ones(64, np.float32)] * 3,
        spec(),
        inner=[{"t": 0.1}] * 3,
        against={"t": {"norm": 3.5, "sha256": facts["content"]}},
    )

    def read() -> None:
        against = Against({"t": str(path)}, LAYOUT, "P", objective, halves=True)
        against.half_products({"t": 1.0, "t/first half": 2.0}, 1)
        against.group_products(np.ones(DIM, np.float32), 0)

    def make_rows() -> None:
        output = open_output(tmp_path / "row.zarr")
        try:
            project_stores.project_mean(
                str(path), project_stores.mean_spec(str(path), "countsketch", 64, 0, None), output
            )
        finally:
            output._release_lock()
            for left in (output.part, output.path):
                shutil.rmtree(left, ignore_errors=True)

    write_mean(path, tensors, facts, half, torch.zeros(3, DIM))
    read()
    make_rows()
    fidelity.check_mean(store, "t", str(path))
    refused = 0
    for what, value in mutations(facts, BRIEF):
        write_mean(path, tensors, value, half, torch.zeros(3, DIM))
        refused += not survives(read, what, path)
        survives(make_rows, what)
        survives(lambda: fidelity.check_mean(store, "t", str(path)), what)
    assert refused > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_every_node_of_an_unfinished_store(tmp_path: Path) -> None:
    """cropi-grad and cropi-project go on from it."""
    rows = [np.ones(64, np.float32)] * 4
    attributes: dict[str, Any] = {"policy": "P", "objective": {}, "layout": LAYOUT.to_json(), "device": "cpu"}
    attributes |= {"projection": spec().to_json(), "against": {"t": {"norm": 1.0, "sha256": "0"}}}
    entry = {"id": "", "source": "s", "pass_rate": 0.5, "status": "ok", "gradient_norm": 8.0, "inner": {"t": 0.1}}
    path = tmp_path / "s.zarr"

    def fill(writer: StoreWriter, start: int, stop: int) -> None:
        for place in range(start, stop):
            writer.add({**entry, "id": f"p{place}"}, rows[place])

    output = open_output(path)
    writer = StoreWriter(output, 4, 64, attributes)
    fill(writer, 0, 2)
    writer.commit({"ok": 2})
    writer._index.close()
    output._release_lock()
    kept = shutil.copytree(output.part, tmp_path / "kept")

    def resume() -> None:
        output = open_output(path)
        writer = None
        try:
            writer = StoreWriter(output, 4, 64, attributes)
            fill(writer, writer.records, 4)
            writer.finish({}, skipped={})
        finally:
            if writer is not None:
                writer._index.close()
            output._release_lock()

    damage: list[tuple[str, str, Any]] = []
    for node in ("progress.json", "zarr.json", "vector/zarr.json"):
        damage += [(f"{node}: {what}", node, v) for what, v in mutations(json.loads((kept / node).read_text()), BRIEF)]
    first, *others = (kept / "index.jsonl").read_text().splitlines()
    refused = 0
    for what, value in mutations(json.loads(first), BRIEF):
        damage.append((f"index.jsonl: {what}", "index.jsonl", value))
    for what, node, value in damage:
        for left in (path, output.part):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(kept, output.part)
        write(output.part / node, value)
        if node == "index.jsonl":
            damaged = "\n".join([(output.part / node).read_text(), *others]) + "\n"
            (output.part / node).write_text(damaged)
            progress = json.loads((output.part / "progress.json").read_text())
            progress["committed"]["bytes"] = len(damaged.encode())
            write(output.part / "progress.json", progress)
        refused += not survives(resume, what, "s.zarr")
    assert refused > 100


def test_a_store_that_is_no_more_than_its_name(tmp_path: Path) -> None:
    (tmp_path / "s.zarr").write_text("")
    with pytest.raises(InputError) as caught:
        Store(tmp_path / "s.zarr")
    one_line(caught.value, tmp_path / "s.zarr")
