"""The table of fields: what is in it is refused in a short line, and what no float can hold is compared all the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from cropi_tools.data import fields
from cropi_tools.data.fields import Field, check_fields, is_reward
from cropi_tools.runtime.errors import InputError

TABLES = {name: table for name, table in vars(fields).items() if isinstance(table, Mapping) and name.isupper()}
PLACES = [(table, name) for table, found in TABLES.items() for name in found]
HUGE = "x" * 10_000_000
WRONG: tuple[Any, ...] = (10**400, -1.5, math.nan, [[HUGE]], {"a": {HUGE: [1]}}, [None], b"x", object())


def test_there_are_tables() -> None:
    assert {
        "PROMPT",
        "ROLLOUT",
        "SAMPLE",
        "SCORES",
        "STORE",
        "AUTHORS",
        "DUMP",
        "STEP",
        "EVALUATION",
        "SELECTED",
    } <= set(TABLES)


@pytest.mark.parametrize(("table", "name"), PLACES)
def test_every_field_refuses_in_a_short_line(table: str, name: str) -> None:
    field: Field = TABLES[table][name]
    refused = [value for value in WRONG if not field.holds(value)]
    assert len(refused) >= len(WRONG) - 3
    for value in refused:
        with pytest.raises(InputError, match=rf"^f\.jsonl:3: '{name}' must be ") as raised:
            check_fields({name: value, "other": HUGE}, TABLES[table], "f.jsonl:3")
        assert len(str(raised.value)) < 300


def test_what_is_absent_or_in_no_table_passes() -> None:
    for table in TABLES.values():
        check_fields({"of others": 10**400, "more": [math.nan]}, table, "f.jsonl:1")


@pytest.mark.parametrize("value", [0, 1, -1.5, 1e9, -(10**9)])
def test_rewards(value: float) -> None:
    assert is_reward(value)


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, 1e200, 10**400, 1.1e9, [1]])
def test_no_rewards(value: Any) -> None:
    assert not is_reward(value)
