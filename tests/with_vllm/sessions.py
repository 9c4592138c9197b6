"""Finding what a process has left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path


def processes_of(session: int, patience: float = 10.0) -> list[str]:
    """The command lines of the session's processes that are still there after `patience` seconds at most."""
    end = time.monotonic() + patience
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found.append((entry / "cmdline").read_text())
            except (ProcessLookupError, FileNotFoundError):
                continue
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)
