"""Words of the command line that go into data are UTF-8, or are refused in one line."""

from __future__ import annotations

import pytest

from cropi_tools.options import as_text, named
from cropi_tools.prompts.options import not_empty
from cropi_tools.runtime.errors import UsageError

BROKEN = "\udcff\udcfe"  # as Python hands over bytes that are no text


def test_names_are_text() -> None:
    assert named("Größe–😀=f") == ("Größe–😀", "f")
    assert as_text("Größe–😀") == "Größe–😀"
    for read in (named, as_text, not_empty):
        with pytest.raises(UsageError, match="is not UTF-8"):
            read(f"{BROKEN}=f")


def test_file_names_may_be_any_bytes() -> None:
    assert named(f"name={BROKEN}") == ("name", BROKEN)
