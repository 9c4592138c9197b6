"""How a command's threads wait for each other is the user's choice before it is ours."""

from __future__ import annotations

import pytest

from cropi_tools.cli import common


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_spin_a_little_unless_told_otherwise(given: dict[str, str], count: str | None) -> None:
    environment = dict(given)
    common._set_variables(environment)
    assert environment.get("GOMP_SPINCOUNT") == count
    assert environment["OMP_WAIT_POLICY"] == given.get("OMP_WAIT_POLICY", "PASSIVE")
    assert {name: environment[name] for name in given} == given
