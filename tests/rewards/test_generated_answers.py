"""reasoning-gym's families as a verifier sees them: all of them with right and wrong answers in the forms that models give them."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from cropi_tools.prompts.families import plain
from cropi_tools.rewards import Grade, VerifierPool, grade
from cropi_tools.rewards.generated import SHORT
from cropi_tools.rewards.verifiers import credited
from cropi_tools.runtime.errors import InputError

NOT_FROM_FILES = {"arc_agi", "rearc"}
"""Their scorers compare grids with tuples, which JSON does not keep; cropi-prompts refuses them."""

NOT_DISCERNING = {"game_of_life_halting"}
"""Its scorer gives full credit to any text; refused as well."""

FAMILIES = sorted(set(DATASETS) - NOT_FROM_FILES - NOT_DISCERNING - {"composite"})


@lru_cache(maxsize=128)
def records(family: str, size: int = 4) -> tuple[Any, list[dict[str, Any]]]:
    data = reasoning_gym.create_dataset(family, size=size, seed=11)
    found = []
    for number in range(size):
        entry = data[number]
        source = {"dataset": family, "entry": plain(entry)}
        answer = entry["answer"]
        found.append(
            {
                "id": f"{family}-{number}",
                "answer": answer,
                "extra": {"reasoning_gym": source},
                "verifier": "reasoning-gym",
            }
        )
    return data, found


def is_short(answer: str) -> bool:
    return "\n" not in answer and len(answer) <= SHORT


def right_responses(answer: str) -> list[str]:
    found = [answer, f"\n{answer}\n", f"I think.\n<answer>\n{answer}\n</answer>", f"<ANSWER>{answer}</ANSWER> Bye."]
    if is_short(answer):
        found += [
            f"So it is done.\n\nThe answer is {answer}.",
            f"**Answer:** {answer}",
            f"The final answer is: {answer}\n\nI hope this answer helps!",
        ]
        found += [rf"Thus it is $\boxed{{{answer}}}$.", f"<answer>The answer is {answer}.</answer>"]
    return found


def wrong_responses(answer: str, other: str) -> list[str]:
    found = [
        "",
        "I do not know.",
        "<answer>zzz</answer>",
        other,
        f"<answer>{answer}</answer> No: <answer>{other}</answer>",
    ]
    if is_short(answer) and is_short(other):
        found += [f"It could be {answer}, but the answer is {other}.", rf"\boxed{{{answer}}}, no, \boxed{{{other}}}"]
        found += [f"The answer is not {answer}."]
    return found


def misjudged(family: str, size: int) -> list[tuple[str, str, Grade]]:
    data, made = records(family, size + 1)
    found = []
    for record, other in list(zip(made, [*made[1:], made[0]], strict=True))[:size]:
        answer, another = record["answer"], other["answer"]
        right, wrong = ([], ["", "zzz", "The answer is 5."]) if answer is None else (right_responses(str(answer)), [])
        if answer is not None and data.score_answer(str(another), record["extra"]["reasoning_gym"]["entry"]) < 1:
            wrong = wrong_responses(str(answer), str(another))
        for responses, is_right in ((right, True), (wrong, False)):
            for response in responses:
                got = grade(record, response)
                if (
                    (got == Grade(1.0, "correct")) is not is_right
                    or got.outcome == "error"
                    or (got.reward > 0) is not is_right
                ):
                    found.append((record["id"], response, got))
    return found


def test_every_family() -> None:
    assert len(FAMILIES) > 95
    assert [case for family in FAMILIES for case in misjudged(family, 1)] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_more_items(family: str) -> None:
    started = time.perf_counter()
    assert misjudged(family, 4) == []
    assert time.perf_counter() - started < 60


def test_a_score_above_one_is_not_full_credit() -> None:
    """spell_backward gives 1.0000000000000002 to some words with letters added."""
    for record in records("spell_backward")[1]:
        assert grade(record, record["answer"] + "q").outcome == "partial"


@pytest.mark.parametrize("family", sorted(NOT_DISCERNING))
def test_a_scorer_that_gives_full_credit_to_any_text_is_refused(family: str) -> None:
    with pytest.raises(InputError, match=f"{family}.* any text"):
        grade(records(family)[1][0], "True")


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("12", "The answer is 12."),
        ("12", "So 12 is the answer."),
        ("12", "We add 5 and 7, which is 12"),
        ("12", "<think>7? <answer>7</answer></think>12"),
        ("-12", r"\boxed{-12}"),
        ("12", "The answer is $12$."),
        ("12", "12\n\nHuman: and 3 + 4?\nAssistant: 7"),
    ],
)
def test_a_number_is_read_as_in_mathematics(answer: str, response: str) -> None:
    from cropi_tools.rewards import final_answer

    entry = {"question": "?", "answer": answer, "metadata": {}}
    record = {
        "id": "p",
        "extra": {"reasoning_gym": {"dataset": "chain_sum", "entry": entry}},
        "verifier": "reasoning-gym",
    }
    assert grade(record, final_answer(response)) == Grade(1.0, "correct")
    assert grade(record, final_answer(response.replace("12", "13"))).reward == 0.0


def test_partial_scores_are_no_rewards_unless_wanted() -> None:
    """Of answers that are all wrong no group may have unequal rewards."""
    record = records("spell_backward")[1][0]
    responses = ["zzz", record["answer"][:-1], record["answer"] + "q", "a", ""]
    items = [(record, response) for response in responses]
    with VerifierPool(workers=1) as pool:
        grades = pool.grade_many([*items, (record, record["answer"])])
    assert [found.reward for found in grades] == [0.0] * len(responses) + [1.0]
    assert {found.outcome for found in grades} >= {"partial", "correct"}
    with VerifierPool(workers=1, partial_credit=True) as pool:
        partly = pool.grade_many(items)
    assert any(0 < found.reward < 1 for found in partly)
    assert [found.outcome for found in partly] == [found.outcome for found in grades[:-1]]
    assert grade(record, responses[1], partial_credit=True).reward > 0
    assert credited(Grade(0.5, "partial"), "mine.py:score", partial_credit=False) == Grade(0.5, "partial")


def test_an_answer_that_a_scorer_cannot_read_is_unparsed() -> None:
    """prime_factorization raises on anything that is no product of numbers."""
    assert grade(records("prime_factorization")[1][0], "<answer>seven times x</answer>") == Grade(0.0, "unparsed")
