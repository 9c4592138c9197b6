"""Limits for programs of others that run in a process of ours: verifiers, and the chat templates of policies."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded_memory(extra: int, *, address_space: bool = False) -> Iterator[None]:
    """Limit memory to what is in use and so many bytes more (on Linux; elsewhere a time limit must do). MemoryError: more is needed.

    Counted are data and stack, or with address_space the whole of the address space, of which a GPU's library reserves much at will.
    """
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = statm.read().split()
    except FileNotFoundError:
        yield
        return
    kind, used = (resource.RLIMIT_AS, pages[0]) if address_space else (resource.RLIMIT_DATA, pages[5])
    soft, hard = resource.getrlimit(kind)
    limit = int(used) * resource.getpagesize() + extra
    if resource.RLIM_INFINITY != soft < limit:
        limit = soft
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
