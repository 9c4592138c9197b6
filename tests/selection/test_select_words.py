"""A ratio that cannot be filled is told, with the reason and what helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_policy

from cropi_tools.cli.select import select
from cropi_tools.selection.options import SelectOptions


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        ("influence", "the others have no score, since all their responses earned the same"),
        ("pass-rate", "the pass rates of the others are unknown or outside --band"),
        ("learnability", "the pass rates of the others are unknown"),
    ],
)
def test_fewer_than_the_ratio_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str, reason: str
) -> None:
    prompts = tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(4))
    scores = [
        {
            "id": f"p{k}",
            "source": "s",
            "scores": None if k else {"t": 0.5},
            "pass_rate": None if k else 0.5,
            "status": "zero-advantage" if k else "ok",
        }
        for k in range(4)
    ]
    file = tiny_policy.write_jsonl(tmp_path / "s.jsonl", scores)
    output = str(tmp_path / "o.jsonl")
    select(SelectOptions(scores=(str(file),), prompts=(str(prompts),), by=by, ratio="0.5", output=output))
    said = capsys.readouterr().err
    assert (
        f"warning: --ratio 0.5 asks for 2 prompts, and only 1 can be selected by {by}, all there are: {reason}" in said
    )
