"""Memory: limits for programs of others that run in a process of ours (verifiers, chat templates), and how much this process may have."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

CONTROL_GROUPS = Path("/sys/fs/cgroup")
GROUPS_OF_PROCESS = Path("/proc/self/cgroup")


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


def memory_limit() -> int:
    """Bytes of memory that this process may have: all of the machine's, or less where its control group or its own limits say so.

    What happens to be free has no part in it, so that the same machine always tells the same.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([machine, *_control_group_limits(), *(limit for limit in own if limit != resource.RLIM_INFINITY)])


def _control_group_limits() -> Iterator[int]:
    """The limits of the process's control groups and of those around them, of both versions, as far as they can be seen (on Linux)."""
    try:
        lines = GROUPS_OF_PROCESS.read_text(errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = CONTROL_GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CONTROL_GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        for one in (group, *group.parents):
            try:
                limit = (root / one.relative_to("/") / name).read_text().strip()
            except OSError:  # a container sees its own group as the root, under another's path
                continue
            if limit.isdigit():  # else "max"
                yield int(limit)
