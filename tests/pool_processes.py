"""The processes behind a pool of verifiers."""

from __future__ import annotations

from cropi_tools.rewards import VerifierPool


def pids(pool: VerifierPool) -> list[int]:
    """The process ids of the workers that live now."""
    return [worker.process.pid for worker in pool._live]
