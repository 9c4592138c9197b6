"""The memory that a process may have: the machine's, or what control groups and its own limits leave of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cropi_tools.runtime import limits

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
NO_LIMIT = "9223372036854771712"  # as the first version of control groups writes it


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, Mapping[str, str]], None]:
    """Sets the groups of the process and the files of the control groups."""

    def set_to(groups: str | None, files: Mapping[str, str]) -> None:
        monkeypatch.setattr(limits, "CONTROL_GROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(limits, "GROUPS_OF_PROCESS", tmp_path / "groups")
        if groups is not None:
            (tmp_path / "groups").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return set_to


V1 = "9:cpuset:/\n4:cpu,memory:/jobs/one\n0::/\n"
V2 = "0::/jobs/one\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (None, {}, MACHINE),
        ("", {}, MACHINE),
        (V2, {}, MACHINE),
        (V2, {"jobs/one/memory.max": "max"}, MACHINE),
        (V2, {"jobs/one/memory.max": "5000"}, 5000),
        (V2, {"jobs/one/memory.max": "max", "jobs/memory.max": "4000"}, 4000),
        (V2, {"jobs/one/memory.max": "5000", "memory.max": "3000"}, 3000),
        (V2, {"jobs/two/memory.max": "2000"}, MACHINE),
        (V1, {"memory/jobs/one/memory.limit_in_bytes": "5000"}, 5000),
        (V1, {"memory/jobs/one/memory.limit_in_bytes": NO_LIMIT, "memory/memory.limit_in_bytes": NO_LIMIT}, MACHINE),
        (V1, {"memory/memory.limit_in_bytes": "6000"}, 6000),  # a container, whose own group has the root's place
        (V1, {"cpuset/memory.limit_in_bytes": "1"}, MACHINE),
    ],
)
def test_the_smallest_limit_counts(
    groups: str | None, files: dict[str, str], expected: int, system: Callable[[str | None, Mapping[str, str]], None]
) -> None:
    system(groups, files)
    assert limits.memory_limit() == expected


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_limits_of_the_process_count(
    kind: int, system: Callable[[str | None, Mapping[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    system(V2, {"memory.max": "5000"})
    known = {kind: (4000, 9000)}
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda asked: known.get(asked, infinite))
    assert limits.memory_limit() == 4000


def test_this_process_is_told_the_same_twice() -> None:
    assert 0 < limits.memory_limit() == limits.memory_limit() <= MACHINE
