"""Readers of records that no short command line reaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Reader(NamedTuple):
    """A reader that no short command line reaches: what is called on the folder, and the file that is spoilt."""

    name: str
    file: str
    read: Callable[[Path], object]


def read_verl_log(place: Path) -> object:
    """The figures of a run by verl."""
    from training_runs import options

    from cropi_tools.verl_backend.results import write_figures

    asked = options(
        max_tokens=4, batch=2, samples=2, dynamic_sampling=1, eval_samples=1, learning_rate=1e-3, steps=2, minibatch=0
    )
    target = place / "figures"
    target.mkdir(exist_ok=True)
    return write_figures(place, target, asked, {"t": [{}]})


def read_pending(place: Path) -> object:
    """The rollouts that a stopped training kept."""
    from cropi_tools.training.checkpoints import read_pending

    return read_pending(place, {"pending": 2})


def write_verl_rows(place: Path) -> object:
    """What verl is handed of the prompts."""
    from cropi_tools.data.records import read_prompts
    from cropi_tools.policy.tokens import load_tokens
    from cropi_tools.prompts.exports import write_table
    from cropi_tools.verl_backend.data import _row

    tokenizer = load_tokens(str(place / "P0")).tokenizer
    rows = [_row(record, tokenizer, "2024-07-26") for record in read_prompts([place / "prompts.jsonl"])]
    return write_table(rows, place / "rows.out.parquet", "prompts.jsonl")


READERS = (
    Reader("verl log", "metrics.verl.jsonl", read_verl_log),
    Reader("pending rollouts", "pending.jsonl", read_pending),
    Reader("verl rows", "prompts.jsonl", write_verl_rows),
)
