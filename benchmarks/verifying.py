"""Verifying against bare math-verify, and what answers that hang cost.

    python benchmarks/verifying.py [--answers N] [--json]

1. Answers a second of a `VerifierPool` of two workers, against math-verify in one process and without any protection: both answers
   parsed, then verified, as its own metric does. The answers are made here: numbers with commas, units and dollars, decimals,
   fractions, formulas, intervals and tuples, half of them wrong.
2. Seconds that a batch takes of which one answer in a hundred never ends, against the bound that the time limit sets: the two
   workers share those answers, each of which holds one for the limit, and then a new one has to start.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable, Sequence

from goals import Goal, best_seconds, print_json, print_lines, processor

from cropi_tools.rewards import VerifierPool

WORKERS = 2
LIMIT = 2.0
"""Seconds an answer in the batch that hangs."""

Pair = tuple[str, str]
"""A reference and a response."""


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Ordinary answers, each in a sentence: right ones written in another way than the reference, and wrong ones."""
    draw = random.Random(seed)
    kinds: Sequence[Callable[[int, int, int], Pair]] = (
        lambda a, b, _: (str(a), rf"\boxed{{{a + b:,}}}"),
        lambda a, b, _: (str(a * 10), rf"\boxed{{{a * 10 + b}\text{{ cm}}}}"),
        lambda a, b, _: (str(a), rf"\boxed{{\${a + b}.00}}"),
        lambda a, b, c: (rf"\frac{{{a}}}{{{c}}}", rf"\boxed{{\dfrac{{{2 * a + b}}}{{{2 * c}}}}}"),
        lambda a, b, _: (f"{a}.5", rf"\boxed{{\frac{{{2 * a + 1 + b}}}{{2}}}}"),
        lambda a, b, c: (rf"{a}\sqrt{{{c}}}", rf"\boxed{{\sqrt{{{a * a * c + b}}}}}"),
        lambda a, b, c: (f"x^2 - {c * c}", rf"\boxed{{(x-{c})(x+{c + b})}}"),
        lambda a, b, c: (f"[{a}, {a + c})", rf"\boxed{{{a} \le x < {a + c + b}}}"),
        lambda a, b, c: (f"({a}, {c})", rf"\boxed{{\left({a}, {c + b}\right)}}"),
        lambda a, b, c: (rf"\frac{{{a}\pi}}{{{c}}}", rf"\boxed{{\frac{{{2 * a + b}\pi}}{{{2 * c}}}}}"),
    )
    found = []
    for number in range(count):
        kind = kinds[number % len(kinds)] if number % 2 else kinds[draw.randrange(3)]
        wrong = draw.randrange(2)
        reference, response = kind(draw.randrange(2, 5000), wrong, draw.randrange(2, 90))
        found.append((reference, f"First we think about it. The answer is ${response}$."))
    return found


def bare(work: Sequence[Pair]) -> int:
    """How many are right by math-verify alone."""
    from math_verify import parse, verify

    return sum(
        verify(
            parse(rf"\boxed{{{reference}}}", parsing_timeout=None),
            parse(response, parsing_timeout=None),
            timeout_seconds=None,
        )
        for reference, response in work
    )


def pooled(pool: VerifierPool, work: Sequence[Pair]) -> int:
    """How many are right by the pool."""
    items = [({"id": str(number), "answer": reference}, response) for number, (reference, response) in enumerate(work)]
    return sum(grade.outcome == "correct" for grade in pool.grade_many(items))


def rates(answers: int) -> Goal:
    """The pool's answers a second over those of math-verify. Every round has answers of its own: nothing is remembered from the last."""
    rounds = 2
    fresh = {name: iter([pairs(answers, seed) for seed in range(rounds + 1)]) for name in ("pool", "bare")}
    with VerifierPool(workers=WORKERS) as pool:
        spent = best_seconds(
            {"pool": lambda: pooled(pool, next(fresh["pool"])), "bare": lambda: bare(next(fresh["bare"]))}, rounds
        )
    peer = (
        f"math-verify in one process, {answers / spent['bare']:.0f} answers/s (the pool: {answers / spent['pool']:.0f})"
    )
    return Goal("answers a second, ratio", spent["bare"] / spent["pool"], 1.0, peer)


def hanging(answers: int) -> Goal:
    """Seconds of a batch with one hanging answer in a hundred over the bound for it."""
    work = pairs(answers, seed=9)
    stuck = list(range(50, answers, 100))
    for number in stuck:
        work[number] = ("x+1", r"\boxed{9^{9^{9^{9^9}}}" + "+x" * (number % 7) + "}")
    with VerifierPool(workers=WORKERS, seconds=LIMIT) as pool:
        pooled(pool, work[:40])
        started = time.perf_counter()
        items = [
            ({"id": str(number), "answer": reference}, response) for number, (reference, response) in enumerate(work)
        ]
        grades = pool.grade_many(items)
        spent = time.perf_counter() - started
    lost = [number for number, grade in enumerate(grades) if grade.outcome in ("timeout", "error")]
    assert set(lost) <= set(stuck), "an ordinary answer was lost"
    starting = start_seconds()
    with VerifierPool(workers=WORKERS) as pool:
        pooled(pool, work[:40])
        started = time.perf_counter()
        pooled(pool, [pair for number, pair in enumerate(work) if number not in set(stuck)])
        ordinary = time.perf_counter() - started
    bound = ordinary + (len(stuck) / WORKERS + 1) * (LIMIT + starting)
    peer = f"the bound of {bound:.1f} s: {len(lost)} of {answers} answers timed out at {LIMIT:g} s (took {spent:.1f} s)"
    return Goal("a batch with hanging answers, ratio", spent / bound, 1.0, peer, at_most=True)


def start_seconds() -> float:
    """How long it takes until a new worker can verify."""
    started = time.perf_counter()
    with VerifierPool(workers=1) as pool:
        pool.load("maths")
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000, help="answers in a batch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    goals = [rates(options.answers // 2), hanging(options.answers)]
    if options.json:
        print_json(goals, processor(WORKERS), answers=options.answers, workers=WORKERS)
    else:
        print_lines(goals)


if __name__ == "__main__":
    main()
