"""Words of the command line that go into data are UTF-8, or are refused in one line."""

from __future__ import annotations

import pytest

from cropi_tools.cli.common import as_text, parse_named
from cropi_tools.cli.prompts import prompts
from cropi_tools.runtime.errors import UsageError

BROKEN = "\udcff\udcfe"  # as Python hands over bytes that are no text


def test_names_are_text() -> None:
    assert parse_named("Größe–😀=f", "--eval") == ("Größe–😀", "f")
    assert as_text("Größe–😀", "--system") == "Größe–😀"
    with pytest.raises(UsageError, match=r"--eval .*is not UTF-8"):
        parse_named(f"{BROKEN}=f", "--eval")


def test_file_names_may_be_any_bytes() -> None:
    assert parse_named(f"name={BROKEN}", "--eval") == ("name", BROKEN)


@pytest.mark.parametrize("option", ["template", "answer_template", "system"])
def test_texts_that_shape_prompts(option: str) -> None:
    with pytest.raises(UsageError, match="is not UTF-8"):
        prompts(["x.jsonl"], **{option: BROKEN})  # type: ignore[arg-type]
