"""What verl is handed: our prompts as its rows, and a reward file that brings our verifiers along.

The package's own source is copied beside the reward file: verl's environment need not have it, its machines may share nothing but this
folder, and a path to where it is installed would bring our other packages before verl's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cropi_tools
from cropi_tools.data.jsonl import Record
from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.prompts.exports import to_verl, write_table
from cropi_tools.rewards.verifiers import BUILT_IN, verifier_of
from cropi_tools.rollouts.grading import reasoning_mark
from cropi_tools.training.options import TrainOptions
from cropi_tools.verl_backend.config import REWARD_FILE, TRAIN_FILE, evaluation_file

PACKAGES = "packages"
FAILED = "verifier.failed"  # why a verifier could not do its work

_REWARD = '''"""The reward of a response, by cropi-tools' verifiers; verl loads this file."""

import sys

sys.path.insert(0, {packages!r})
from cropi_tools.verl_backend.reward import Scorer

compute_score = Scorer({verifier!r}, {seconds!r}, {failed!r}, partial_credit={partial_credit!r}, programs={programs!r})
'''


def prepare(
    folder: Path,
    options: TrainOptions,
    prompts: Sequence[Record],
    evaluations: Mapping[str, Sequence[Record]],
    tokenizer: Any,
) -> None:
    """Write data, reward file and package into `folder`; the same every time."""
    folder.mkdir(exist_ok=True)
    write_table([_row(record, tokenizer, options.date) for record in prompts], folder / TRAIN_FILE)
    for name, records in evaluations.items():
        write_table([_row(record, tokenizer, options.date, name) for record in records], folder / evaluation_file(name))
    copy_package(folder / PACKAGES)
    here = folder.absolute()
    text = _REWARD.format(
        packages=str(here / PACKAGES),
        verifier=None if options.verifier is None else _anywhere(options.verifier),
        seconds=options.verify_seconds,
        partial_credit=options.partial_credit,
        failed=str(here / FAILED),
        programs=_programs(
            [*prompts, *(record for records in evaluations.values() for record in records)], options.verifier
        ),
    )
    (folder / REWARD_FILE).write_text(text, encoding="utf-8")


def _programs(records: Sequence[Record], verifier: str | None) -> list[str]:
    """The files that the records name as their verifiers, which the command line has allowed."""
    names = {verifier_of(record, verifier) for record in records} - {*BUILT_IN, verifier}
    return sorted({_anywhere(name).rpartition(":")[0] for name in names})


def copy_package(target: Path) -> None:
    """Copy this package's source to `target`, a folder that may stand on a path of Python's."""
    shutil.rmtree(target, ignore_errors=True)
    source = Path(cropi_tools.__file__).parent
    shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"))


def _row(record: Record, tokenizer: Any, date: str, evaluation: str | None = None) -> Record:
    """A prompt as verl's row. verl tells its validation by source: an evaluation set's name stands in its place, the source moves to
    `extra_info`, where `reasoning_open` says whether the prompt ends inside the model's reasoning."""
    row = to_verl(record)
    marked = reasoning_mark(tokenizer, prompt_token_ids(tokenizer, record, date))
    row["extra_info"] |= {
        "source": row["data_source"],
        "verifier": _anywhere(row["extra_info"]["verifier"]),
        "reasoning_open": bool(marked),
    }
    row["data_source"] = evaluation or row["data_source"]
    return row


def _anywhere(verifier: str) -> str:
    """FILE.py:FUNCTION as any process finds it, wherever it runs."""
    if not verifier or verifier in BUILT_IN:
        return verifier
    path, _, function = verifier.rpartition(":")
    return f"{Path(path).absolute()}:{function}"
