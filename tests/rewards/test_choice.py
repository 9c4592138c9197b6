"""The letter of a multiple choice, in the phrasings that models use."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_processes import pids

from cropi_tools.rewards import VerifierPool, check_record, grade
from cropi_tools.rewards.choice import read_choice, read_reference
from cropi_tools.runtime.errors import InputError

PHRASINGS = [
    (r"\boxed{B}", "B"),
    (r"So it is $\boxed{\text{C}}$.", "C"),
    (r"$\boxed{\mathrm{A}}$", "A"),
    (r"\boxed{(b)}", "B"),
    (r"\boxed{\textbf{(E)}\ 12}", "E"),
    (r"\boxed{\text{Option C}}", "C"),
    (r"\boxed{C: 12}", "C"),
    (r"\boxed{A}, no: \boxed{C}", "C"),
    ("<answer>c</answer>", "C"),
    ("<answer> (B) Paris </answer>", "B"),
    ("<answer>\n\nB\n</answer>", "B"),
    ("<ANSWER>B</ANSWER>", "B"),
    (r"<answer>\boxed{B}</answer>", "B"),
    ("<answer>B", "B"),
    (r"\boxed{A} but <answer>B</answer>", "B"),
    ("I use <answer> tags. The answer is B.", "B"),
    (r"\fbox{B}", "B"),
    (r"\boxed B", "B"),
    (r"\boxed{B}" + "\n\nHuman: and now?\n\nAssistant: \\boxed{C}", "B"),
    ("The answer is (C).", "C"),
    ("The correct answer is **B. Paris**.", "B"),
    ("So the answer is:\n\nB", "B"),
    ("Answer: C", "C"),
    ("**Answer:** C", "C"),
    ("### Answer: D", "D"),
    ("answer: c", "C"),
    ("Final answer: (H)", "H"),
    ("The best answer is: J", "J"),
    ("The answer is I.", "I"),
    ("The correct choice is (B): Paris", "B"),
    ("Correct answer: **C) 12**", "C"),
    (r"The answer is \( \text{C} \).", "C"),
    ("The answer is A because it fits.", "A"),
    ("First I thought the answer is B. But no, the answer is C.", "C"),
    ("Thus, option E is correct.", "E"),
    ("A is correct.", "A"),
    ("I choose C because it is right.", "C"),
    ("I would go with D.", "D"),
    ("A. Paris\nB. Rome\n\nThe capital is Paris, so the answer is A.", "A"),
    ("**D**", "D"),
    ("(A)", "A"),
    ("a", "A"),
    ("A)", "A"),
    ("D. All of the above", "D"),
    ("Therefore (D) holds.", "D"),
    ("So **(C)** it is.", "C"),
    ("答案是C", "C"),
    ("答案：D。", "D"),
    ("故选：B", "B"),
    ("The answer is A or B.", None),
    ("The answer is A, B", None),
    ("The answer is A large number of cats.", None),
    ("The answer is not B.", None),
    ("The answer is K.", None),
    ("Answer: I believe this is unknowable", None),
    (r"\boxed{A, B}", None),
    (r"\boxed{Paris}", None),
    (r"\boxed{C = 12}", None),
    (r"The answer is B. \boxed{", None),
    ("<answer>Paris</answer> The answer is B.", None),
    ("It depends on a number.", None),
    ("42", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "letter"), PHRASINGS)
def test_the_letter_of_a_response(response: str, letter: str | None) -> None:
    assert read_choice(response) == letter
    for reference in "ABCDEFGHIJ":
        expected = "unparsed" if letter is None else "correct" if letter == reference else "wrong"
        assert grade({"id": "p", "answer": reference, "verifier": "choice"}, response).outcome == expected


@pytest.mark.parametrize(
    "answer", ["B", "b", "(B)", "B. text", "B) text", "B: text", "[B]", r"\text{(B)}", r"\textbf{(B)}\ 12"]
)
def test_a_reference(answer: str) -> None:
    assert read_reference(answer) == "B"
    check_record({"id": "p", "answer": answer}, "choice")


@pytest.mark.parametrize("answer", [None, "", "Paris", "AB", "A, B", "K", 2])
def test_a_reference_that_is_no_letter_is_named_early(answer: object) -> None:
    with pytest.raises(InputError, match="'p7'"):
        check_record({"id": "p7", "answer": answer, "verifier": "choice"})


def test_no_worker_is_needed() -> None:
    with VerifierPool("choice") as pool:
        assert [
            one.outcome
            for one in pool.grade_many([({"id": "p", "answer": "(A)"}, "A"), ({"id": "q", "answer": "A"}, "b")])
        ] == ["correct", "wrong"]
        assert not pids(pool)


BITS = [
    "answer",
    " is ",
    " the ",
    "A",
    "b",
    "(",
    ")",
    "**",
    ":",
    "\n",
    "\\text{",
    "}",
    "option ",
    "correct",
    " or ",
    "<answer>",
    "</answer>",
    ".",
    " ",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(BITS) | st.text(max_size=2), max_size=50).map("".join))
def test_any_text_is_a_letter_or_none(response: str) -> None:
    assert read_choice(response) in {None, *"ABCDEFGHIJ"}


@pytest.mark.parametrize("bit", [*BITS, "answer is ", "A is ", "is the ", "the option ", "(A "])
def test_long_repetitions_take_no_time(bit: str) -> None:
    started = time.perf_counter()
    read_choice(bit * (10**6 // len(bit)))
    assert time.perf_counter() - started < 1.0
