"""Sources by name and folder: what `datasets` saves and what hubs hold, by datasets' own code; the split and no other."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.prompts.datasets import inputs_of, open_dataset
from cropi_tools.prompts.options import has_splits
from cropi_tools.runtime.errors import InputError, UsageError


def rows(split: str) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{split} {i}?", "answer": str(i), "info": {"level": i, "tags": ["a", "b"][: i % 3]}}
        for i in range(1100)
    ]


def found(name: object, split: str | None = None) -> list[dict[str, Any]]:
    return [row for _, row in open_dataset(str(name), split).rows()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits in every form that `datasets` writes: `dict/`, `one/`, and a hub's folder `hub/`."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    both = datasets.DatasetDict({split: datasets.Dataset.from_list(rows(split)) for split in ("train", "test")})
    both.save_to_disk(str(folder / "dict"))
    both["train"].save_to_disk(str(folder / "one"), num_shards=3)
    (folder / "hub" / "data").mkdir(parents=True)
    for split, found in both.items():
        for shard in range(2):
            part = found.shard(2, shard, contiguous=True)
            part.to_parquet(str(folder / "hub" / "data" / f"{split}-0000{shard}-of-00002.parquet"))
    (folder / "hub" / "README.md").write_text("a data set")
    return folder


@pytest.mark.parametrize("name", ["dict", "hub"])
def test_a_folder_with_splits(name: str, saved: Path) -> None:
    for split in ("train", "test"):
        assert found(saved / name, split) == rows(split)
    with pytest.raises(InputError, match=r"holds the splits .*train.*; choose one with --split"):
        open_dataset(str(saved / name))
    with pytest.raises(InputError, match="no split 'tset'; did you mean test"):
        open_dataset(str(saved / name), "tset")


def test_a_folder_of_one_split(saved: Path, tmp_path: Path) -> None:
    assert found(saved / "one") == rows("train")
    for folder, name in (("data", "train-0.jsonl"), ("test", "0.jsonl"), ("validation", "x.jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps({"prompt": folder}) + "\n")
    assert found(tmp_path, "test") == [{"prompt": "test"}]
    assert found(tmp_path, "train") == [{"prompt": "data"}]
    assert found(tmp_path / "data") == [{"prompt": "data"}]
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "rows.csv").write_text("prompt,answer\na,1\n")
    assert found(tmp_path / "loose") == [{"prompt": "a", "answer": "1"}]
    with pytest.raises(InputError, match="its files name no split"):
        open_dataset(str(tmp_path / "loose"), "train")


def test_configurations_are_not_mixed(tmp_path: Path) -> None:
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    with pytest.raises(InputError, match=r"several folders \(.*main, .*socratic\); name one"):
        open_dataset(str(tmp_path))
    assert found(tmp_path / "main") == [{"prompt": "main"}]


def test_a_data_set_by_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network a name can only be a folder; the rest of the way is the same."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    named = open_dataset(f"hf:{saved / 'hub'}", "test")
    places, there = zip(*named.rows(), strict=True)
    assert list(there) == rows("test")
    assert (named.stem, places[1]) == ("hub", f"hf:{saved / 'hub'}: row 2")
    assert named.input.sha256 != open_dataset(f"hf:{saved / 'hub'}").input.sha256, "another split is another input"


def test_without_a_network_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match=r"hf:nobody/nothing: the data set does not open .* name its folder") as raised:
        open_dataset("hf:nobody/nothing")
    assert "\n" not in str(raised.value)


def test_without_the_datasets_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'cropi-tools\[datasets\]'"):
        open_dataset("hf:nobody/nothing")


def test_what_a_folder_lacks_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no data file"):
        open_dataset(str(tmp_path))
    shutil.copytree(saved / "one", tmp_path / "one")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(InputError, match=r"no such file, though state.json names it"):
        open_dataset(str(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state.json: broken JSON"):
        open_dataset(str(tmp_path / "one"))


def test_files_have_no_splits_and_inputs_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.x.jsonl").write_text('{"prompt": "a"}\n')
    opened = open_dataset(str(tmp_path / "a.x.jsonl"))
    assert opened.stem == "a"
    assert list(inputs_of("data", [opened, opened])) == ["data", "data 2"]
    assert [has_splits(name) for name in (str(tmp_path), "hf:a/b", str(tmp_path / "a.x.jsonl"))] == [True, True, False]
    with pytest.raises(UsageError, match=r"--split train: .* is one file"):
        open_dataset(str(tmp_path / "a.x.jsonl"), "train")


def test_a_folder_counts_by_its_contents(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "a"}\n')
    first, second = (open_dataset(str(tmp_path / name)).input.sha256 for name in ("first", "second"))
    assert first == second
    (tmp_path / "second" / "train.jsonl").write_text('{"prompt": "b"}\n')
    assert open_dataset(str(tmp_path / "second")).input.sha256 != first
