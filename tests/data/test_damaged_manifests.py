"""Manifests and progress files that are damaged, foreign or newer: whoever reads them takes them or refuses them in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from manifests import manifest
from mutations import BRIEF, TEXTS, mutations, one_line, survives, write

from cropi_tools.data.dates import other_dates
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.manifest import Fingerprint, manifest_path, read_manifest
from cropi_tools.data.metadata import OBJECT
from cropi_tools.data.output import Output
from cropi_tools.data.policies import policy_input, same_tokenizer, starting_policy
from cropi_tools.rollouts.metrics import SAVED, Tallies, Tally, summary_shape, table
from cropi_tools.rollouts.options import VerifyOptions
from cropi_tools.rollouts.regrading import _tokenizer
from cropi_tools.runtime.errors import InputError

FINGERPRINT = Fingerprint("cropi-test", {"date": "2024-07-26", "n": 3}, {"prompts": "0" * 64})


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files are written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tallies() -> Tallies:
    found = Tallies()
    sample = {"token_ids": [1, 2], "reward": 1.0, "outcome": "correct"}
    found.add({"source": s, "prompt_token_ids": [1], "samples": [sample] * 4} for s in ("a", "b", "a"))
    return found


def finished(path: Path, folder: bool = False) -> Path:
    """An output, with a manifest that has an entry of each kind."""
    output = Output(path, FINGERPRINT, {}, folder=folder)
    assert output.open()
    (output.part / "data.jsonl" if folder else output.part).write_text("{}\n")
    facts = {"tokenizer": "0" * 64, "sampling": {"engine": "transformers"}, "summary": tallies().summary()}
    output.finish(rows=1, skipped={"repeated": 2}, ledger={"device": "cpu"}, facts=facts)
    return path


def readers(path: Path, policy: Path) -> list[Any]:
    """Everything that reads the manifest of an output."""

    def again(force: bool = False, folder: bool = False) -> None:
        output = Output(path, FINGERPRINT, {}, folder=folder, force=force)
        output.open()
        output._release_lock()

    def show() -> None:
        target = JsonLinesOutput(str(path), FINGERPRINT, {})
        if target.open():
            raise AssertionError("it is done already")
        table(target.finished_fact("summary", summary_shape))

    if path.is_dir():
        return [lambda: again(folder=True), lambda: again(force=True, folder=True)]
    return [
        again,
        show,
        lambda: same_tokenizer(str(path), str(policy)),
        lambda: other_dates([path], "2024-07-27"),
        lambda: _tokenizer(VerifyOptions(rollouts=(str(path),))),
    ]


@pytest.mark.parametrize("folder", [False, True])
def test_every_node_of_a_manifest(folder: bool, tmp_path: Path, policy_folder: Path) -> None:
    path = finished(tmp_path / "X", folder)
    beside = manifest_path(path)
    whole = json.loads(beside.read_text())
    refused = 0
    for what, value in mutations(whole, BRIEF):
        write(beside, value)
        read = survives(lambda: read_manifest(path), what, path.name)
        # what cannot be read at all is refused to all of them
        for number, reader in enumerate(readers(path, policy_folder)[: None if read else 1]):
            write(beside, value)
            refused += not survives(reader, f"{what}, reader {number}", path.name)
            if folder and not path.exists():  # --force was given, and its old result set aside
                finished(path, folder)
    assert refused > 50


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_a_manifest_of_nothing(content: bytes, tmp_path: Path, policy_folder: Path) -> None:
    path = finished(tmp_path / "X.jsonl")
    beside = manifest_path(path)
    beside.write_bytes(content)
    for reader in readers(path, policy_folder):
        assert not survives(reader, "its bytes", beside)


def test_a_newer_manifest_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = finished(tmp_path / "X.jsonl")
    write(manifest_path(path), {**json.loads(manifest_path(path).read_text()), "schema": 7})
    with pytest.raises(InputError, match=r"made by a newer cropi-tools \(schema 7\); upgrade") as caught:
        read_manifest(path)
    one_line(caught.value, manifest_path(path))


def test_a_manifest_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "X.jsonl").touch()
    manifest_path(tmp_path / "X.jsonl").mkdir()
    with pytest.raises(InputError, match="is no file") as caught:
        read_manifest(tmp_path / "X.jsonl")
    one_line(caught.value)
    assert read_manifest(tmp_path / ("x" * 250)) is None  # there can be none of so long a name
    assert read_manifest(tmp_path / "X.jsonl" / "Y") is None


def test_every_node_of_a_policys_manifest(tmp_path: Path, policy_folder: Path) -> None:
    """A policy that cropi-train made: hashed files, and the policy before it."""
    folder = shutil.copytree(policy_folder, tmp_path / "P1")
    stat = (folder / "config.json").stat()
    outputs = {"config.json": {"sha256": "1" * 64, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}}
    before = policy_input(policy_folder)
    inputs = {"policy": {"path": before.path, "sha256": before.sha256}}
    whole = manifest("cropi-train", outputs=outputs, inputs=inputs, options={"learning_rate": 1e-6, "steps": 3})
    write(folder / "manifest.json", whole)
    assert starting_policy(str(folder)) == before.path
    for what, value in mutations(whole):
        write(folder / "manifest.json", value)
        survives(lambda: policy_input(folder), what, folder)
        survives(lambda: starting_policy(str(folder)), what, folder)
    write(folder / "manifest.json", whole)
    own = policy_input(folder)
    write(folder / "manifest.json", {**whole, "inputs": {"policy": {"path": str(folder), "sha256": own.sha256}}})
    with pytest.raises(InputError, match="trained from itself"):
        starting_policy(str(folder))


def interrupted(path: Path, folder: bool) -> Path:
    """Unfinished work, in place of what is there; the path of what it says of itself."""
    shutil.rmtree(path.with_name(path.name + ".part"), ignore_errors=True)
    for left in path.parent.glob(path.name + ".part*"):
        left.unlink()
    output = Output(path, FINGERPRINT, {}, folder=folder)
    assert output.open()
    (output.part / "data" if folder else output.part).write_text("{}\n{}\n")
    counters = {"sources": tallies().saved(), "sampled": tallies().total().saved(), "served_model": "P"}
    output.commit({"lines": 2, "bytes": 6, "counters": counters})
    output._release_lock()
    return output._state_path


@pytest.mark.parametrize("folder", [False, True])
def test_every_node_of_a_progress_file(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "X"
    state = interrupted(path, folder)
    whole = json.loads(state.read_text())

    def resume() -> None:
        if folder:
            output = Output(path, FINGERPRINT, {}, folder=True)
            try:
                assert output.open()
                output.resumed({"counters?": SAVED})
                output.seconds()
            finally:
                output._release_lock()
            return
        target = JsonLinesOutput(str(path), FINGERPRINT, {})
        try:
            assert target.open()
            kept = target.resumed(SAVED)
            Tallies(kept.get("sources")).summary()
            Tally(**kept.get("sampled", {})).add({"samples": [], "prompt_token_ids": []})
        finally:
            if target._stream is not None:
                target._stream.close()
            assert target._file is not None
            target._file._release_lock()

    refused = 0
    for what, value in mutations(whole):
        interrupted(path, folder)
        write(state, value)
        refused += not survives(resume, what, "X.part")
    assert refused > 500
    for what, content in TEXTS.items():
        interrupted(path, folder)
        state.write_bytes(content)
        assert not survives(resume, what, state)


def test_the_words_of_a_finish_that_was_killed(tmp_path: Path) -> None:
    """`X.part.json` holds the manifest while the file takes its name."""
    path = finished(tmp_path / "X.jsonl")
    described = json.loads(manifest_path(path).read_text())
    state = {"fingerprint": FINGERPRINT.to_json(), "seconds": 1.0, "committed": {"lines": 1}, "manifest": described}

    def recover() -> None:
        output = Output(path, FINGERPRINT, {})
        try:
            output.open()
        finally:
            output._release_lock()

    for what, value in mutations(state, within=("manifest",)):
        manifest_path(path).unlink(missing_ok=True)
        write(tmp_path / "X.jsonl.part.json", value)
        survives(recover, what, "X.jsonl")


def test_a_fact_that_is_no_longer_there(tmp_path: Path) -> None:
    path = finished(tmp_path / "X.jsonl")
    target = JsonLinesOutput(str(path), FINGERPRINT, {})
    assert not target.open()
    with pytest.raises(InputError, match="has no strange; give --force"):
        target.finished_fact("strange", lambda _: OBJECT)
