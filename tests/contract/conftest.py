"""The chain of real files the contract suite works on, built once, and a folder for each test that holds it all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_table import CASES, CHANGES, leftovers
from shell import Shell

from cropi_tools.data.manifest import read_manifest


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with Shell(tmp_path_factory.mktemp("shell")) as made:
        yield made


@pytest.fixture(scope="session")
def chain(policy_folder: Path, shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs and the result of every row of the table, under the names the table uses.

    Beside them: `other/`, a policy of other weights, and `other-tokenizer/`, the policy with one character of its
    tokenizer exchanged.
    """
    import tiny_policy

    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(policy_folder, folder / "P0")
    tiny_policy.save(folder / "other", seed=1)
    shutil.copytree(policy_folder, folder / "other-tokenizer")
    tokenizer = folder / "other-tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"Z"', '"~"'))
    shutil.copy(Path(tiny_policy.__file__).with_name("parity.py"), folder)
    # a test set must not share questions with the pool
    pool = [{**record, "prompt": f"{place}+{record['prompt']}"} for place, record in enumerate(tiny_policy.prompts(16))]
    test = [
        {**record, "prompt": f"{place}-{record['prompt']}"}
        for place, record in enumerate(tiny_policy.prompts(32, start=100))
    ]
    for name, records in (("raw.jsonl", pool), ("valid.jsonl", test)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    for case in CASES:
        done = shell(case.line, folder)
        assert done.stdout == "", f"{case.name}: stdout is for data, and the data went to a file"
        assert leftovers(folder / case.output) == []
        CHANGES[case.name] = done.changes or 0
        ledger = (read_manifest(folder / case.output) or {}).get("ledger")
        if ledger is not None:
            assert ledger["seconds_start"] + ledger["seconds_work"] == pytest.approx(ledger["seconds"], abs=1e-3)
            assert min(ledger["seconds_start"], ledger["seconds_work"]) >= 0
    return folder


@pytest.fixture
def place(chain: Path, tmp_path: Path) -> Path:
    """The test's folder: links to everything in the chain, to be replaced where a test breaks something."""
    for path in chain.iterdir():
        os.symlink(path, tmp_path / path.name)
    return tmp_path
