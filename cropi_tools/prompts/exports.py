"""Prompts in the forms of verl and of TRL, as JSONL or parquet. `forms.dataset_prompts` reads both back.

Both make one table of all rows, so a column has one type: what differs from row to row is kept as JSON text. Both get messages:
text is one user message, as our own commands take it where the policy has a chat template.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cropi_tools.data.jsonl import Record
from cropi_tools.data.output import Output
from cropi_tools.prompts.row_formats import as_messages
from cropi_tools.runtime.clock import importing
from cropi_tools.runtime.errors import InputError, first_line

Format = Literal["jsonl", "verl", "trl"]

_SELECTED = ("rank", "score", "reciprocal_rank", "pass_rate")
_PROMPT = ("id", "prompt", "answer", "source", "verifier", "extra", "chat_template_kwargs")
# arguments that TRL gives to reward functions itself, and columns it takes for pictures
_TRL_OWN = frozenset({"prompts", "completion", "completions", "completion_ids", "image", "images", "trainer_state"})


def exported(records: Sequence[Record], form: Format) -> Iterator[Record]:
    """The rows of `form`, in order; `settings_needed` says which cannot be rows of one table."""
    if form == "jsonl":
        return iter(records)
    if form == "verl":
        return map(to_verl, records)
    return _trl_rows(records)


def to_verl(record: Record) -> Record:
    """A prompt as verl's row. What verl has no place for stands in `extra_info`, as text where rows may differ; `index` is the id,
    `prompt_form` says whether the prompt was text, `rest` holds the keys that are not ours."""
    rest = {key: value for key, value in record.items() if key not in (*_PROMPT, *_SELECTED)}
    return {
        "data_source": record["source"],
        "prompt": as_messages(record["prompt"]),
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": str(record["answer"])},
        "extra_info": {
            "split": "train",
            "index": record["id"],
            "verifier": record.get("verifier") or "",
            "extra": _text(record.get("extra") or {}),
            "prompt_form": "text" if isinstance(record["prompt"], str) else "messages",
            "chat_template_kwargs": _text(record.get("chat_template_kwargs") or {}),
            "rest": _text(rest),
            **{name: record[name] for name in _SELECTED if name in record},
        },
    }


def _trl_rows(records: Sequence[Record]) -> Iterator[Record]:
    """Rows for TRL: `prompt`, `answer`, `id`, `source`, and where a record has them `verifier`, `chat_template_kwargs`, rank, score and
    pass rate. Of `extra`, what is text, a number or a boolean in all rows becomes a column for reward functions; the
    rest is JSON text under `extra`."""
    columns = _plain_columns(records)
    present = [name for name in ("verifier", *_SELECTED) if any(record.get(name) is not None for record in records)]
    leftover = any((record.get("extra") or {}).keys() - columns for record in records)
    for record in records:
        extra = record.get("extra") or {}
        row = {name: record[name] for name in ("id", "answer", "source")}
        row |= {"prompt": as_messages(record["prompt"]), "answer": str(record["answer"])}
        row |= {name: record.get(name) for name in present}
        if record.get("chat_template_kwargs"):
            row["chat_template_kwargs"] = record["chat_template_kwargs"]
        row |= {name: extra.get(name) for name in columns}
        if leftover:
            row["extra"] = _text({name: value for name, value in extra.items() if name not in columns})
        yield row


def _plain_columns(records: Sequence[Record]) -> list[str]:
    """Keys of `extra` that can be a column: one type of text, number or boolean in all records that have them."""
    types: dict[str, set[type]] = {}
    for record in records:
        for name, value in (record.get("extra") or {}).items():
            big = type(value) is int and not -(2**63) <= value < 2**63
            types.setdefault(name, set()).add(object if big else type(value))
    taken = {*_PROMPT, *_SELECTED, *_TRL_OWN}
    return [
        name
        for name, found in types.items()
        if name not in taken and len(found) == 1 and found <= {str, int, float, bool}
    ]


def write_table(rows: list[Record], path: Path, called: str | Path | None = None) -> None:
    """Write rows that have the same keys as a parquet file, in messages `called` otherwise. InputError: a column has values of several kinds,
    which a table cannot hold."""
    with importing():
        import pyarrow
        from pyarrow import parquet

        pyarrow.Table.from_pylist([{"": 0}])  # it imports pandas where there is one, at the first use

    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    except (pyarrow.ArrowException, OverflowError) as error:
        path.unlink(missing_ok=True)
        raise InputError(_not_a_table(rows, called or path, error)) from None
    with open(path, "rb+") as written:
        os.fsync(written.fileno())


def _not_a_table(rows: Sequence[Record], path: str | Path, error: Exception) -> str:
    """Which column cannot be one, and why."""
    import pyarrow
    from pyarrow import parquet

    for name in rows[0] if rows else ():
        try:
            column = pyarrow.Table.from_pylist([{name: row.get(name)} for row in rows])
            parquet.write_table(column, pyarrow.BufferOutputStream())
        except (pyarrow.ArrowException, OverflowError) as found:
            return f"{path}: '{name}' cannot be a column of one kind ({first_line(found)}); make its values alike, or write JSON lines"
    return f"{path}: the rows cannot be a table ({first_line(error)}); write JSON lines"


class TableOutput(Output):
    """A parquet file made in one go, with the calls of `JsonLinesOutput`."""

    _rows = 0

    def append(self, rows: Iterable[Record]) -> None:
        """Write the rows, which have the same keys; once."""
        held = list(rows)
        write_table(held, self.part, self.path)
        self._rows = len(held)

    def finish(self, **described: Any) -> None:
        """As `Output.finish`, with the rows that were written."""
        super().finish(**{"rows": self._rows, **described})


def settings_needed(records: Sequence[Record], form: Format) -> str | None:
    """What the other trainer has to be told, since it does not read it from the rows; None when there is nothing. InputError: it would
    have to be told one thing for some rows and another for others."""
    if form == "jsonl":
        return None
    kwargs: Mapping[str, Any] = next((found for r in records if (found := r.get("chat_template_kwargs"))), {})
    other = next((record for record in records if (record.get("chat_template_kwargs") or {}) != kwargs), None)
    if other is not None:
        raise InputError(
            f"prompt '{other['id']}' has other chat_template_kwargs than others, and {form} takes one setting for all; export them apart"
        )
    if not kwargs:
        return None
    if form == "trl":
        return f"TRL's GRPOTrainer takes chat_template_kwargs from its settings: GRPOConfig(chat_template_kwargs={dict(kwargs)})"
    given = " ".join(f"+data.apply_chat_template_kwargs.{name}={json.dumps(value)}" for name, value in kwargs.items())
    return f"verl takes chat_template_kwargs from its settings: {given}"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
