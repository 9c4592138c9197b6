"""Answers written to break the verifier of mathematics: they may cost their own time limit, never the batch."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cropi_tools.rewards import Grade, VerifierPool

HOSTILE = [
    "9^{9^{9^9}}",
    "(10^{10^{10}})!",
    r"\binom{10^9}{10^8}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^3+1}",
    r"\int_0^1 x^{x^{x^x}} \sin(e^{x^2}) dx",
    r"\frac{1}{" * 30 + "2" + "}" * 30,
    r"\sqrt{" * 38 + "2" + "}" * 38,
    "(" * 300 + "1" + ")" * 300,
    "x^" * 300 + "x",
    "\0\0{1}",
    "\ud800",
    r"\begin{pmatrix} 1 & 2 \\ 3",
    r"__import__('os').system('echo hacked')",
]


def test_hostile_answers_neither_hang_nor_crash(capfd: pytest.CaptureFixture[str]) -> None:
    work = [({"id": str(i), "answer": "x+1"}, rf"\boxed{{{answer}}}") for i, answer in enumerate(HOSTILE)]
    work.append(({"id": "good", "answer": "x+1"}, r"\boxed{1+x}"))
    started = time.monotonic()
    with VerifierPool(workers=2, seconds=1) as pool:
        grades = pool.grade_many(work)
    assert time.monotonic() - started < 60
    assert grades[-1] == Grade(1.0, "correct")
    assert all(one.reward == 0.0 and one.outcome != "correct" for one in grades[:-1])
    assert "hacked" not in "".join(capfd.readouterr()).splitlines()


def test_fuzz() -> None:
    pieces = [
        "\\frac",
        "{",
        "}",
        "^",
        "_",
        "(",
        ")",
        "[",
        "\\sqrt",
        "\\text{",
        "\\left",
        "\\cup",
        "1",
        "9",
        "x",
        ",",
        "=",
        "<",
    ]
    pieces += [
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\\\",
        "&",
        "%",
        "\\pi",
        "\\infty",
        "!",
        "\\int",
        "\\sum",
        "\0",
        " or ",
    ]
    with VerifierPool(workers=1, seconds=2) as pool:

        @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.lists(st.sampled_from(pieces), max_size=12).map("".join), min_size=4, max_size=4))
        def check(answers: list[str]) -> None:
            grades = pool.grade_many([({"id": "p", "answer": "x+1"}, f"\\boxed{{{answer}}}") for answer in answers])
            assert [
                one.outcome for one in grades if one.outcome not in ("wrong", "unparsed", "correct", "timeout")
            ] == []

        check()
