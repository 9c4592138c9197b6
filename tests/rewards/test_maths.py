"""The verifier of mathematics: what counts as the answer of a response, and which answers are equal."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cropi_tools.rewards import grade
from cropi_tools.rewards.extraction import MAX_ANSWER, extract_answer
from cropi_tools.rewards.normalization import normalize
from cropi_tools.rewards.quantities import Quantity, read_quantity
from cropi_tools.rewards.verifiers import check_record, grade_quickly
from cropi_tools.runtime.errors import InputError

FIXTURES = Path(__file__).parents[1] / "fixtures"


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / name).read_text().splitlines()]


def outcome(reference: str, response: str) -> str:
    return grade({"id": "p", "answer": reference}, response).outcome


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\left\{ x, y \right.} and so on", r"\left\{ x, y \right."),
        (r"\boxed{7}. Answers go in \boxed{}.", "7"),
        (r"$\boxed 5$.", "5"),
        (r"It was \boxed{4}, no: \boxed{5", None),
        (rf"\boxed{{{'1' * (MAX_ANSWER + 1)}}}", None),
        ("5 + 3 = 8\n#### 42", "42"),
        ("#### 42\n\nQ: next question, 17 apples", "42"),
        ("#### Step three\nso we get 12", "12"),
        ("There are 3 cats and -4 dogs.", "-4"),
        ("So 10-7", "7"),
        ("It fell by $-5.", "$-5"),
        ("It costs $18 and then -$5.", "-$5"),
        (r"Hence $x = \frac{1}{2}$.", r"x = \frac{1}{2}"),
        (r"Hence \(x \in (1, 2]\), as claimed.", r"x \in (1, 2]"),
        ("She paid $18 and kept only 20$ of it.", "20"),
        ("H2O is\nblue", "blue"),
        ("The answer is (-2,0).", "(-2,0)"),
        ("**(-2, 0)**", "(-2, 0)"),
        (r"**-\frac12**", r"-\frac12"),
        (r"So it is 3\sqrt{13}.", r"3\sqrt{13}"),
        ("Thus 6 - 5i.", "6 - 5i"),
        ("So we have x^2 - 2x + 2.", "x^2 - 2x + 2"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("x + 2y - 9 = 0", "x + 2y - 9 = 0"),
        ("5 + 3 = 8", "8"),
        ("5g - 2g = 3g", "3"),
        ("f(x) = 7", "7"),
        ("I bought a 5", "5"),
        ("He runs (on foot) 5 km", "5"),
        ("There are 3 (three) cats.", "3"),
        ("Total: 1,200 (approx.)", "1,200"),
        ("The values are 3, 5 and 7", "7"),
        ("The answer is 3, 5 and 7.", "3, 5 and 7"),
        ("There are 12 values of $n$.", "12"),
        ("With 12 steps the answer is $p - q$.", "p - q"),
        ("The final answer is $48$, $384$.", "$48$, $384$"),
        ("After 3 days: the answer is Tuesday.", "Tuesday"),
        ("The answer is that all 12 of them fail", "12"),
        ("At 3:30 pm.", "3:30 pm"),
        ("The ratio is 3:5", "3:5"),
        (r"It has 96,\!569 people", r"96,\!569"),
        ("In base five: 4210_5", "4210_5"),
        ("", None),
        (" \n \n", None),
    ],
)
def test_extraction(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_every_gsm8k_form_of_an_answer_is_correct_and_its_negative_is_wrong() -> None:
    for record in records("gsm8k.jsonl"):
        plain = record["answer"]
        commas = f"{int(plain):,}"
        for value in (plain, commas, commas.replace(",", "{,}"), commas.replace(",", r"\,")):
            forms = [rf"\boxed{{{value}}}", rf"$\boxed{{{value}}}$.", rf"\boxed{{{value}\text{{ cm}}^2}}"]
            forms += [rf"\boxed{{\${value}}}", rf"\boxed{{{value} dollars}}", rf"\boxed{{{value}.00}}"]
            forms += [f"3 + 4 = 7\n#### {value}"]
            if value in (plain, commas):
                forms += [value, f"The answer is {value}.", f"It is ${value}$.", f"It costs ${value} a day."]
                forms += [f"x = {value} apples", f"**{value}**", rf"\[ x = {value} \]", rf"The total is \({value}\)."]
            for form in forms:
                assert outcome(plain, form) == "correct", (plain, form)
                if value.startswith("-"):
                    assert outcome(plain, form.replace("-", "\u2212")) == "correct", (plain, form)
                    assert outcome(plain, form.replace("-", "")) == "wrong", (plain, form)
                else:
                    assert outcome(plain, form.replace(value, f"-{value}")) == "wrong", (plain, form)


def test_every_math_answer_verifies_against_itself_and_no_other() -> None:
    answers = [record["answer"] for record in records("math.jsonl")]
    for i, reference in enumerate(answers):
        assert outcome(reference, rf"So the answer is $\boxed{{{reference}}}$.") == "correct", reference
        other = answers[(i + 1) % len(answers)]
        assert outcome(reference, rf"So the answer is $\boxed{{{other}}}$.") != "correct", (reference, other)


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("1/2", "0.5", "correct"),
        ("0.5", r"\frac12", "correct"),
        ("1/3", "0.333333", "correct"),
        ("1/3", "0.3333", "wrong"),
        (r"5 \text{ cm}", "5", "correct"),
        ("22.1", "22.1cm^{2}", "correct"),
        ("50", r"50\%", "correct"),
        ("0.5", "50%", "correct"),
        ("5000%", "50%", "wrong"),
        ("2", r"2\text{ million}", "correct"),
        ("2 million", "2,000,000", "correct"),
        ("2", "2x", "wrong"),
        ("2", "2 x", "wrong"),
        ("2", "2i", "wrong"),
        ("10", r"10\pi", "wrong"),
        ("10", "10 or 11", "wrong"),
        (r"90^\circ", "90", "correct"),
        ("3.5", r"3\frac12", "correct"),
        ("[2,5)", r"\left[2,5\right)", "correct"),
        ("[2,5)", "(2,5)", "wrong"),
        ("[2,5)", r"x \in [2,5)", "correct"),
        ("[2,5)", r"2 \le x < 5", "correct"),
        (r"\{1,2\}", r"\{2,1\}", "correct"),
        ("1,2", r"x=1 \text{ or } x=2", "correct"),
        ("1,2", "1", "wrong"),
        (r"x^2-1", "(x-1)(x+1)", "correct"),
        ("2\\sqrt{3}", r"\sqrt{12}", "correct"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\4/2\end{pmatrix}", "correct"),
        ("x=5", "5", "correct"),
        ("5", "x = 5", "correct"),
        (r"\text{(C)}", "C", "correct"),
        ("C", "C. 12", "correct"),
        ("C", "(D)", "wrong"),
        (r"\text{Tuesday}", "tuesday", "correct"),
        ("1010_2", "1010_3", "wrong"),
        ("10 a.m.", "10 p.m.", "wrong"),
        ("x+1", r"+ \le )", "unparsed"),
    ],
)
def test_equality(reference: str, answer: str, expected: str) -> None:
    assert outcome(reference, rf"Thus $\boxed{{{answer}}}$.") == expected


@given(top=st.integers(-(10**6), 10**6), bottom=st.integers(1, 10**4))
def test_fractions_are_read_exactly(top: int, bottom: int) -> None:
    for text in (
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"\dfrac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        f"{top} / {bottom} cm",
    ):
        quantity = read_quantity(normalize(text))
        assert quantity is not None
        assert quantity.value == Fraction(top, bottom)


@given(whole=st.integers(0, 99), top=st.integers(1, 98), bottom=st.integers(2, 99))
def test_mixed_numbers_are_read_exactly(whole: int, top: int, bottom: int) -> None:
    for text in (
        rf"{whole}\frac{{{top}}}{{{bottom}}}",
        f"{whole} {top}/{bottom}",
        rf"{whole} \dfrac{{{top}}}{{{bottom}}} cm",
    ):
        quantity = read_quantity(normalize(text))
        assert quantity == (Quantity(whole + Fraction(top, bottom)) if top < bottom else None), text


@given(
    fixed=st.from_regex(r"[0-9]{1,3}\.[0-9]{0,4}", fullmatch=True), block=st.from_regex(r"[0-9]{1,6}", fullmatch=True)
)
def test_repeating_decimals_are_read_exactly(fixed: str, block: str) -> None:
    quantity = read_quantity(normalize(rf"{fixed}\overline{{{block}}}"))
    assert quantity is not None
    long = Fraction(fixed + block * 40)
    assert long <= quantity.value <= long + Fraction(1, 10**30)
    written_out = read_quantity(normalize(f"{fixed}{block * 3}..."))
    assert written_out is not None
    assert written_out.value == quantity.value


@given(value=st.decimals(-(10**6), 10**6, places=3), power=st.integers(-12, 12))
def test_powers_of_ten_are_read_exactly(value: Any, power: int) -> None:
    for text in (rf"{value} \times 10^{{{power}}}", f"{value}e{power}", rf"{value} \cdot 10^{{{power}}}"):
        quantity = read_quantity(normalize(text))
        assert quantity is not None
        assert quantity.value == Fraction(str(value)) * Fraction(10) ** power


HOSTILE = [
    "9^{9^{9^9}}",
    "1" * 10**6,
    r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    r"\boxed{" * 20_000,
    r"\boxed{}" * 20_000,
    "#### " * 30_000,
    "$" * 100_000,
    "1," * 100_000,
    "\\(" * 50_000 + "1" + "\\)" * 50_000,
    "\0" * 100_000 + "5",
    r"\boxed{" + r"\frac{1}{" * 80 + "1" + "}" * 80 + "}",
    r"\boxed{" + "-" * 900 + "1}",
    r"\boxed{" + "a" * 900 + "=1}",
    r"\boxed{1 " + "a " * 450 + "9}",
    r"\boxed{1/0}",
    r"\boxed{\frac00}",
    "\ud800 \\boxed{\ud800}",
]


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_the_quick_part_is_quick_on_hostile_responses(response: str) -> None:
    started = time.process_time()
    given_grade = grade_quickly({"id": "p", "answer": "12345"}, response)
    assert time.process_time() - started < 2.0
    assert given_grade is None or given_grade.reward == 0.0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from(
            [
                "\\boxed{",
                "}",
                "{",
                "\\frac",
                "\\text{",
                "$",
                "####",
                "9",
                "^",
                ",",
                "-",
                " ",
                "\n",
                "%",
                "\\",
                "\0",
                "x",
            ]
        )
        | st.text(max_size=3),
        max_size=60,
    ).map("".join)
)
def test_the_quick_part_never_fails(response: str) -> None:
    given_grade = grade_quickly({"id": "p", "answer": r"\frac{3}{7}"}, response)
    assert given_grade is None or given_grade.outcome in ("correct", "wrong", "unparsed")


@pytest.mark.parametrize("answer", [None, "", "  ", "1" * (MAX_ANSWER + 1)])
def test_a_record_without_a_usable_answer_is_named_early(answer: str | None) -> None:
    with pytest.raises(InputError, match="'p7'"):
        check_record({"id": "p7", "answer": answer})


def test_a_worked_solution_serves_as_the_reference() -> None:
    assert outcome("3 + 4 = 7, so\n#### 1,700", "It is 1700.") == "correct"
    assert outcome(r"Since 1 + 1 = 2, it is $\boxed{2}$.", "2") == "correct"
