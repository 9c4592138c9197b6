"""Manifests as the commands write them."""

from __future__ import annotations

from typing import Any

from cropi_tools.data.manifest import SCHEMA


def manifest(command: str, **changes: Any) -> dict[str, Any]:
    """A whole manifest that describes no file."""
    return {
        "schema": SCHEMA,
        "command": command,
        "fingerprint": {"command": command, "options": {}, "inputs": {}},
        "options": {},
        "inputs": {},
        "outputs": {},
        "rows": 0,
        "skipped": {},
        "facts": {},
        "ledger": {},
        **changes,
    }
