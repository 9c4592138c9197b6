"""Where rows come from: a file, a folder (one that `save_to_disk` made, or files as they lie on a hub), or, by name, a
data set of the Hugging Face hub.

`Dataset.digest` identifies the content, so that a moved or repeated download is the same input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi_tools.data.jsonl import Record, decoded, is_stream
from cropi_tools.data.manifest import Input, file_digest, folder_digest
from cropi_tools.prompts.families import near, plain
from cropi_tools.prompts.options import HUB
from cropi_tools.prompts.tables import file_rows, kind_of
from cropi_tools.runtime.errors import InputError, UsageError, first_line

_SPLITS = ("train", "validation", "test", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Dataset:
    """Rows of one source. `stem` names them where they have no names of their own; `input` is what the manifest records."""

    stem: str
    input: Input
    files: tuple[str, ...]
    hub: Any = None

    def rows(self) -> Iterator[tuple[str, Record]]:
        """Each row with its place for messages; see `tables.file_rows`."""
        if self.hub is not None:
            yield from _hub_rows(self.hub, self.input.path)
        for path in self.files:
            yield from file_rows(path)


def open_dataset(name: str, split: str | None = None) -> Dataset:
    """Find the files of a source and hash them. `name`: a file, `-`, a folder, or `hf:NAME[:CONFIG]`.

    `split` chooses among several; one that is not needed is an error where files show that there is no such split.
    InputError: nothing there, several splits or configurations and none chosen, no network and no copy.
    """
    if name.startswith(HUB):
        return _hub_dataset(name, split or "train")
    path = Path(name)
    if is_stream(name) or not path.is_dir():
        if split is not None:
            raise UsageError(f"--split {split}: {name} is one file; leave --split out")
        stem = "stdin" if is_stream(name) else path.name.split(".")[0]
        return Dataset(stem, Input(name, file_digest(name)), (name,))
    files = _saved_files(path, split) or _folder_files(path, split)
    digests = {str(file.relative_to(path)): file_digest(file) for file in files}
    return Dataset(path.resolve().name, Input(name, folder_digest(digests)), tuple(map(str, files)))


def inputs_of(name: str, datasets: Sequence[Dataset]) -> dict[str, Input]:
    """The inputs of sources, as `name`, `name 2`, ...: known by their place, so that a moved file is still the same."""
    return {name if place == 1 else f"{name} {place}": found.input for place, found in enumerate(datasets, 1)}


# ------------------------------------------------------------------------------------------------------------- folders


def _saved_files(folder: Path, split: str | None) -> list[Path] | None:
    """The Arrow files of a folder that `datasets` saved; None for another folder."""
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"{folder / 'dataset_dict.json'}: 'splits' must be a list of names; save the data set again"
            )
        chosen = _chosen_split(folder, names, split)
        return _saved_files(folder / chosen, None)
    if not (folder / "state.json").is_file():
        return None
    state = _read_json(folder / "state.json")
    listed = state.get("_data_files", [])
    if not isinstance(listed, list) or not all(
        isinstance(file, dict) and isinstance(file.get("filename"), str) for file in listed
    ):
        raise InputError(f"{folder / 'state.json'}: '_data_files' must be a list of files; save the data set again")
    files = [folder / file["filename"] for file in listed]
    if not files:
        raise InputError(f"{folder}: state.json names no data file; save the data set again")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file, though state.json names it; save the data set again")
    if split is not None and state.get("_split") not in (None, split):
        raise InputError(f"{folder}: holds the split {state['_split']}, not {split}")
    return files


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder as hubs keep them: of one configuration, of one split."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if kind_of(path) and path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    found = [path for path in found if path.name not in ("dataset_infos.json", "dataset_info.json")]
    if not found:
        raise InputError(f"{folder}: the folder holds no data file (parquet, JSONL, JSON, CSV, TSV, Arrow)")
    homes = sorted({str(_home(path, folder)) for path in found})
    if len(homes) > 1:
        some = ", ".join(homes[:6]) + (", ..." if len(homes) > 6 else "")
        raise InputError(f"{folder}: holds data in several folders ({some}); name one of them, or a file")
    splits: dict[str, list[Path]] = {}
    for path in found:
        splits.setdefault(_split_of(path, folder) or "", []).append(path)
    if split is None and len(splits) == 1:
        return found
    named = sorted(name for name in splits if name)
    if not named:
        raise InputError(f"{folder}: its files name no split; leave --split out")
    return splits[_chosen_split(folder, named, split)]


def _home(path: Path, folder: Path) -> Path:
    """The folder a file belongs to, `data` and folders of splits left out."""
    home = path.parent
    while home != folder and (home.name == "data" or home.name in _SPLITS):
        home = home.parent
    return home


def _split_of(path: Path, folder: Path) -> str | None:
    """The split that a file's name or folder begins with: `train-00000-of-00002.parquet`, `test.jsonl`, `test/0.parquet`."""
    name = path.name.replace("_", "-").replace(".", "-").split("-")[0]
    for word in (name, *(part for part in path.relative_to(folder).parts[:-1])):
        if word in _SPLITS:
            return word
    return None


def _chosen_split(folder: Path, names: list[str], split: str | None) -> str:
    if split is None:
        if len(names) == 1:
            return names[0]
        raise InputError(
            f"{folder}: holds the splits {', '.join(names)}; choose one with --split, or name one of its files"
        )
    if split not in names:
        raise InputError(f"{folder}: no split {split!r}{near(split, names)}")
    return split


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = decoded(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: broken JSON; save the data set again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; save the data set again")
    return value


# ----------------------------------------------------------------------------------------------------------------- hub


def _hub_dataset(name: str, split: str) -> Dataset:
    try:
        import datasets
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise InputError(
            f"{name}: reading by name needs the datasets package; pip install 'cropi-tools[datasets]'"
        ) from None
    dataset, _, configuration = name.removeprefix(HUB).partition(":")
    if not dataset:
        raise UsageError(f"{name}: expected {HUB}NAME or {HUB}NAME:CONFIGURATION, such as {HUB}openai/gsm8k:main")
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        found = datasets.load_dataset(dataset, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        raise InputError(
            f"{name}: the data set does not open ({reason}); without a network download it elsewhere and name its folder"
        ) from None
    digests = {str(number): file_digest(file["filename"]) for number, file in enumerate(found.cache_files)}
    return Dataset(
        dataset.rstrip("/").rpartition("/")[2], Input(name, folder_digest({**digests, "split": split})), (), found
    )


def _hub_rows(found: Any, name: str) -> Iterator[tuple[str, Record]]:
    number = 0
    for table in found.with_format("arrow").iter(1024):
        for row in table.to_pylist():
            number += 1
            yield f"{name}: row {number}", plain(row)
