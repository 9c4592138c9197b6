"""What is read as the answer at the end of a response: a sweep over how models end, right and wrong."""

from __future__ import annotations

import pytest

from cropi_tools.rewards import final_answer, grade
from tests.rewards.endings import RIGHT, WRONG


def misread(cases: list[tuple[str, str]], right: bool, before: str = "") -> list[tuple[str, str, str]]:
    found = []
    for reference, response in cases:
        outcome = grade({"id": "p", "answer": reference}, final_answer(before + response)).outcome
        if (outcome == "correct") is not right:
            found.append((reference, response, outcome))
    return found


@pytest.mark.parametrize("kind", RIGHT)
def test_right_endings_are_read(kind: str) -> None:
    assert misread(RIGHT[kind], True) == []


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_endings_are_not_accepted(kind: str) -> None:
    assert misread(WRONG[kind], False) == []


REASONING = "Let me see. Maybe the answer is 77? \\boxed{78}? <answer>79</answer> Then x = 80.\n"


@pytest.mark.parametrize(
    "before", ["We add the 2 numbers.\n\n", f"<think>\n{REASONING}</think>\n\n", f"{REASONING}</think>\n"]
)
def test_what_goes_before_changes_nothing(before: str) -> None:
    for kind in RIGHT:
        assert misread(RIGHT[kind], True, before) == []
    for kind in WRONG:
        assert misread(WRONG[kind], False, before) == []
