"""What counts as equal in mathematics: a table of pairs, correct and wrong ones, traps among them, in tests/fixtures/maths_answers.tsv."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from cropi_tools.rewards import grade

TABLE = Path(__file__).parents[1] / "fixtures" / "maths_answers.tsv"


def pairs() -> dict[str, list[tuple[str, str, str]]]:
    found = defaultdict(list)
    with TABLE.open(newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            found[row["class"]].append((row["reference"], row["answer"], row["outcome"]))
    return dict(found)


@pytest.mark.parametrize("name", pairs())
def test_every_pair_of_the_table(name: str) -> None:
    wrongly_graded = []
    for reference, answer, outcome in pairs()[name]:
        for response in (
            rf"Thus $\boxed{{{answer}}}$.",
            rf"So \[ x^2 = 7, \] and the answer is $\boxed{{ {answer} }}$",
        ):
            got = grade({"id": "p", "answer": reference}, response).outcome
            if got != outcome:
                wrongly_graded.append((reference, answer, outcome, got))
    assert wrongly_graded == []


def test_the_table_holds_both_outcomes_of_every_class() -> None:
    table = pairs()
    assert sum(map(len, table.values())) > 350
    for name, rows in table.items():
        assert {"correct", "wrong"} <= {outcome for _, _, outcome in rows}, name


def test_every_reference_of_the_table_is_its_own_answer() -> None:
    references = {reference for rows in pairs().values() for reference, _, _ in rows}
    assert [own for own in sorted(references) if grade({"answer": own}, rf"\boxed{{{own}}}").outcome != "correct"] == []
