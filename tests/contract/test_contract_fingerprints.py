"""Results made by the first commands stay up to date: what decides them has the same names and values, whatever the options are called now.

`fixtures/fingerprints.json` holds the fingerprints of the table's results as they were before options got records, with hashes and
versions of libraries masked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures" / "fingerprints.json").read_text())


def masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {re.sub(r"\S*/", "", key): masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"=\d[\w.+]*", "=N", re.sub(r"[0-9a-f]{64}", "HASH", value))
    return value


@pytest.mark.parametrize("name", RECORDED)
def test_what_decides_a_result_has_not_changed(name: str, chain: Path) -> None:
    beside = chain / f"{name}.manifest.json"
    path = beside if beside.exists() else chain / name / "manifest.json"
    found = json.loads(path.read_text())["fingerprint"]
    assert {**found, "options": masked(found["options"]), "inputs": sorted(found["inputs"])} == RECORDED[name]
