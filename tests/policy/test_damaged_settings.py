"""Policy folders whose settings are damaged in one node, or whose files are no files: opened, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import BRIEF, JUNK, TEXTS, mutations, one_line, survives

from cropi_tools.data.policies import policy_input
from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime.errors import InputError

VALUES = {**BRIEF, "huge": JUNK["huge"], "no number": JUNK["no number"]}
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def opened(folder: Path) -> None:
    policy_input(folder)
    load_policy(str(folder), "cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", SETTINGS)
def test_every_node_of_the_settings(file: str, policy_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "P")
    refused = 0
    for what, value in mutations(json.loads((folder / file).read_text()), VALUES):
        (folder / file).write_text(json.dumps(value))
        refused += not survives(lambda: opened(folder), f"{file}: {what}", folder)
    assert refused > 10


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [_folder, _pipe, _dangling])
@pytest.mark.parametrize("file", [*SETTINGS, "tokenizer.json", "model.safetensors", "special_tokens_map.json"])
def test_what_is_no_file(file: str, put: Callable[[Path], None], policy_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(policy_folder, tmp_path / "P")
    put(folder / file)
    with pytest.raises(InputError) as caught:
        opened(folder)
    one_line(caught.value, folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", [*SETTINGS, "tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
def test_files_that_hold_nothing_of_use(file: str, policy_folder: Path, tmp_path: Path) -> None:
    for number, (what, content) in enumerate(TEXTS.items()):
        folder = shutil.copytree(policy_folder, tmp_path / f"P{number}")
        (folder / file).write_bytes(content)
        assert not survives(lambda folder=folder: opened(folder), f"{file}: {what}", folder)
