"""Answers written to break a verifier: they may cost their own time limit, never the batch, and no more than linear time to be read."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import reasoning_gym
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cropi_tools.rewards import Grade, VerifierPool
from cropi_tools.rewards.choice import read_choice
from cropi_tools.rewards.extraction import MAX_ANSWER, extract_answer, last_tagged
from cropi_tools.rewards.maths import compare_plainly
from cropi_tools.rewards.reasoning import final_answer

LIMIT = 1.5
"""Seconds an answer in these tests; a real pool gives ten."""

FORMULAS = [
    "9^{9^{9^9}}",
    "9^{9^{9^{9^{9^{9^9}}}}}",
    "(10^{10^{10}})!",
    "1000000!",
    "((((9!)!)!)!)!",
    r"\binom{10^9}{10^8}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^3+1}",
    r"\prod_{k=1}^{10^{9}} (k+x)",
    r"\int_0^1 x^{x^{x^x}} \sin(e^{x^2}) dx",
    r"\lim_{x \to 0} \frac{\sin(\tan(\sin x))}{x^{99}}",
    r"(x+y+z+w)^{500} - (w+z+y+x)^{500} + x",
    r"\frac{1}{" * 30 + "2" + "}" * 30,
    r"\frac{1}{1+" * 38 + "x" + "}" * 38,
    r"\sqrt{" * 38 + "2" + "}" * 38,
    r"\left(" * 39 + "x" + r"\right)" * 39,
    r"|" * 200 + "x",
    "x^" * 300 + "x",
    "x_" * 300 + "x",
    "x!" * 300,
    "!" * 900,
    "+-" * 400 + "x",
    "x=" * 400 + "x",
    "x<" * 300 + "x",
    "1," * 400 + "x",
    r"\begin{pmatrix}" + (r" 1 & 2 & x \\ " * 60) + r"\end{pmatrix}",
    r"\begin{pmatrix}" + (r"x^2+1 & " * 100) + r"1 \end{pmatrix}^{99999}",
    r"\begin{pmatrix} 1 & 2 \\ 3",
    r"\begin{cases} x \\ \end{cases}",
    r"\sin" * 200 + "x",
    r"x \in " * 90 + "1",
    r"\{x | " * 39 + "x>1",
    "0." + "3" * 500 + r"\overline{" + "7" * 400 + "}",
    "9" * 900,
    "9" * 400 + "/" + "7" * 400,
    r"1.5 \times 10^{999}",
    r"1.5 \times 10^{999999999}",
    "1e999999999",
    r"\0\0{1}",
    "\0\0{1}",
    "\ud800",
    "\udfff\ud800 x",
    "\u202e\u200f1+x\u202c",
    "x\u0301\u0302" * 200,
    "\U0001d465+\U0001d7cf\ufe0f",
    "\u0661\u0662\u0663",
    "\u2460\u00b2\u00b2\u00b2",
    "".join(map(chr, range(0x2200, 0x22FF))),
    r"\text{" * 30 + "x" + "}" * 30,
    r"\input{/etc/passwd}",
    r"\def\a{\a\a}\a",
    r"__import__('os').system('echo hacked')",
    "x.__class__.__mro__",
    "eval(exec('1'))",
    "lambda: 0",
]

WHOLE = [
    r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    r"\boxed{" * 100_000,
    r"\boxed{}" * 100_000,
    r"\boxed{1}" * 100_000 + r"\boxed{",
    "1" * 10**6,
    r"\boxed{" + "1" * 10**6 + "}",
    "a" * 10**6,
    "####" * 100_000,
    "#### \n" * 100_000,
    "$" * 10**6,
    "1," * 300_000,
    "\\(" * 200_000 + "1" + "\\)" * 200_000,
    "\0" * 10**6,
    "\0" * 10**6 + "5",
    "\ud800" * 100_000,
    r"\begin{pmatrix}" + r"1 & 2 \\ " * 50_000 + r"\end{pmatrix}",
    r"\frac{1}{" * 50_000 + "1" + "}" * 50_000,
    "<answer>" * 100_000,
    "</answer>" * 100_000,
    "<answer>" + "9" * 10**6 + "</answer>",
    "<think>" * 100_000,
    "The answer is " * 50_000,
    "(A) or " * 100_000,
    " " * 10**6,
    "\n" * 10**6,
    "=" * 10**6,
    "-" * 10**6 + "1",
]

FAMILIES = ["chain_sum", "polynomial_equations", "countdown"]


def hostile_responses() -> list[str]:
    return [rf"\boxed{{{formula}}}" for formula in FORMULAS] + WHOLE


def gym_record(family: str) -> dict[str, Any]:
    entry = reasoning_gym.create_dataset(family, size=1, seed=5)[0]
    kept = {key: entry[key] for key in ("question", "answer", "metadata")}
    source = {"dataset": family, "entry": kept}
    return {"id": family, "answer": entry["answer"], "extra": {"reasoning_gym": source}, "verifier": "reasoning-gym"}


def check_batch(
    work: list[tuple[dict[str, Any], str]], good: tuple[dict[str, Any], str], workers: int = 2
) -> list[Grade]:
    """Grade hostile answers with a good one after each; all good ones must be right and the whole within its bound."""
    mixed = [item for hostile in work for item in (hostile, good)]
    with VerifierPool(workers=workers, seconds=LIMIT) as pool:
        pool.grade_many([good] * 64)  # the workers are up
        started = time.monotonic()
        grades = pool.grade_many(mixed)
        spent = time.monotonic() - started
    assert {grade for grade in grades[1::2]} == {Grade(1.0, "correct")}
    lost = sum(grade.outcome in ("timeout", "error") for grade in grades)
    assert spent < 20 + lost * (LIMIT + 5), f"{lost} of {len(mixed)} answers took {spent:.0f} s"
    return grades[::2]


def test_some_hostile_answers_to_maths() -> None:
    responses = [rf"\boxed{{{formula}}}" for formula in FORMULAS[:4] + FORMULAS[8::6]] + WHOLE
    check_maths("x+1", responses)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["x+1", "[0,1)", r"\text{east}"])
def test_all_hostile_answers_to_maths(reference: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_maths(reference, hostile_responses())
    assert "hacked" not in "".join(capfd.readouterr()).splitlines()


def check_maths(reference: str, responses: list[str]) -> None:
    """No hostile answer is right, but for the one that is written from right to left: it says 1+x."""
    good = ({"id": "good", "answer": "x+1"}, r"\boxed{1+x}")
    grades = check_batch(
        [({"id": str(i), "answer": reference}, response) for i, response in enumerate(responses)], good
    )
    for response, grade in zip(responses, grades, strict=True):
        assert grade.reward == 0.0 or "\u202e" in response, response[:80]


@pytest.mark.slow
def test_hostile_references_cost_no_more() -> None:
    good = ({"id": "good", "answer": "x+1"}, r"\boxed{1+x}")
    check_batch([({"id": str(i), "answer": formula}, r"\boxed{x+7}") for i, formula in enumerate(FORMULAS[::4])], good)


def test_hostile_answers_to_the_other_verifiers() -> None:
    records = [{"id": "e", "answer": "x", "verifier": "exact"}, {"id": "c", "answer": "B", "verifier": "choice"}]
    good = (gym_record("chain_sum"), str(gym_record("chain_sum")["answer"]))
    grades = check_batch([(record, response) for record in records for response in hostile_responses()], good)
    assert {grade.outcome for grade in grades} <= {"wrong", "unparsed"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_answers_to_scorers_of_reasoning_gym(family: str) -> None:
    record = gym_record(family)
    responses = [f"<answer>{text}</answer>" for text in FORMULAS] + [*FORMULAS, *WHOLE]
    for grade in check_batch([(record, response) for response in responses], (record, str(record["answer"]))):
        assert grade.reward < 1


PIECES = [
    *(
        "\\frac",
        "\\frac{1}{",
        "{",
        "}",
        "\\{",
        "\\}",
        "^",
        "_",
        "(",
        ")",
        "[",
        "]",
        "\\sqrt",
        "\\text{",
        "\\left",
        "\\cup",
        "1",
        "9",
    ),
    *(
        "x",
        ",",
        ", ",
        "=",
        "<",
        "\\le ",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\\\",
        "&",
        "%",
        "\\%",
        "\\pi",
        "\\infty",
        "!",
    ),
    *(
        "\\int",
        "\\sum",
        "\0",
        " or ",
        " and ",
        "|",
        ".",
        "...",
        "\\overline{",
        "1 1/2",
        "e",
        "\ud800",
        "\u202e",
        "\u221a",
        "$",
        "\\$",
    ),
    *(
        "\n",
        "\\boxed{",
        "####",
        "<answer>",
        "</answer>",
        "**",
        "answer is ",
        "3:30 pm",
        "_2",
        "cm",
        "a",
        " ",
        "-",
        "/",
        ":",
        ";",
    ),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters() | st.integers(0, 10**30).map(str), max_size=14).map("".join)


@pytest.mark.parametrize("boxed", [True, False])
def test_fuzz(boxed: bool) -> None:
    good = ({"id": "good", "answer": "x+1"}, r"\boxed{1+x}")
    with VerifierPool(workers=1, seconds=2) as pool:

        @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.tuples(TEXTS, st.sampled_from(["x+1", "7", "[0,1)", "(1,2)", "B"])), min_size=6, max_size=6))
        def check(pairs: list[tuple[str, str]]) -> None:
            work = [
                ({"id": "p", "answer": reference}, f"\\boxed{{{text}}}" if boxed else text) for text, reference in pairs
            ]
            grades = pool.grade_many([*work, good])
            assert grades[-1] == Grade(1.0, "correct")
            assert {one.outcome for one in grades} <= {"wrong", "unparsed", "correct", "timeout"}

        check()


@pytest.mark.slow
def test_fuzz_for_longer() -> None:
    """Random texts by the thousand, each graded for several references and verifiers at once."""
    draw = random.Random(7)
    good = ({"id": "good", "answer": "x+1"}, r"\boxed{1+x}")
    work = []
    for number in range(1500):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 25)))
        record = {"id": str(number), "answer": draw.choice(["x+1", "7", "[0,1)", r"\{1,2\}", r"\frac{3}{7}", "A"])}
        work.append((record, draw.choice([f"\\boxed{{{text}}}", text, f"The answer is {text}."])))
    grades = check_batch(work, good)
    assert sum(one.outcome == "error" for one in grades) == 0


READERS: dict[str, Callable[[str], object]] = {
    "answer": extract_answer,
    "choice": read_choice,
    "tag": last_tagged,
    "reasoning": final_answer,
}


def seconds(task: Callable[[str], object], text: str) -> float:
    """The shortest of three runs, in processor time: what else the machine does is not the text's doing."""
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        task(text)
        best = min(best, time.process_time() - started)
    return best


@pytest.mark.parametrize("reader", READERS)
def test_reading_takes_linear_time(reader: str) -> None:
    """Four times the text takes at most about four times as long, whatever is repeated (below 30 ms nothing is told)."""
    for piece in [
        *PIECES,
        *(a + b for a, b in zip(PIECES, reversed(PIECES), strict=True)),
        "\\boxed{}",
        "\\boxed ",
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "<answer ",
        " <|im_end|>",
        "The answer is ",
        "answer is\nQ: ",
        "#### 5\n",
        "5 is the answer, ",
        "the the ",
    ]:
        small = piece * (100_000 // len(piece))
        first, second = seconds(READERS[reader], small), seconds(READERS[reader], small * 4)
        assert second < max(0.03, 10 * first), (piece, first, second)


def test_comparing_the_longest_answers_takes_milliseconds() -> None:
    doubled = [a + b for a, b in zip(PIECES, PIECES[7:], strict=False)]
    for reference in ("12345", r"\{x | x > 1\}", "[0,1)", "3:30 pm", r"\text{east}"):
        for piece in [*PIECES, *doubled]:
            answer = (piece * MAX_ANSWER)[:MAX_ANSWER]
            for text in (answer, "1" + answer[2:] + "1"):
                started = time.perf_counter()
                compare_plainly(reference, text)
                spent = time.perf_counter() - started
                assert spent < 0.1 or seconds(lambda text: compare_plainly(reference, text), text) < 0.1, piece  # noqa: B023
