"""Rollouts of one temperature and ratios at another are told before any gradient is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.manifest import Fingerprint
from cropi_tools.gradients.options import GradOptions
from cropi_tools.gradients.run import _warn_of_temperatures


def rollouts(folder: Path, **options: Any) -> str:
    path = str(folder / "r.jsonl")
    output = JsonLinesOutput(path, Fingerprint.of("cropi-rollout", options, {}), {})
    assert output.open()
    output.append([{"id": "a"}])
    output.finish()
    return path


@pytest.mark.parametrize(
    ("sampled", "options", "told"),
    [
        ({"temperature": 0.6}, {}, True),
        ({"temperature": 0.6}, {"policy_temperature": 0.6}, False),
        ({"temperature": 0.6}, {"behavior": "P0"}, False),
        ({"temperature": 0.6}, {"weighting": "none"}, False),
        ({"temperature": 1.0}, {}, False),
        ({"temperature": 1}, {"policy_temperature": 0.5}, True),
        ({"temperature": 0}, {}, False),
        ({}, {}, False),
        ({"temperature": "hot"}, {}, False),
    ],
)
def test_two_temperatures_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sampled: dict[str, Any], options: dict[str, Any], told: bool
) -> None:
    file = rollouts(tmp_path, **sampled)
    _warn_of_temperatures(GradOptions(rollouts=(file, "-"), model="P0", output="g.zarr", **options))
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {file}: was sampled at temperature") if told else said == ""
