"""The tasks of bed (c): ten families of short sums whose answers are worked out step by step, in 20 to 80 characters.

    python benchmarks/reproduce/worked_tasks.py --size 50 --seed 1 -o pool.jsonl
    python benchmarks/reproduce/worked_tasks.py --size 40 --seed 2 --only mod --exclude pool.jsonl -o valid.mod.jsonl

A record is a prompt as the commands take it; `extra.worked` is the right solution, `extra.mistaken` the one that the family's typical mistake
leads to, made wherever it can be: what the policy is warmed up with. A solution ends with `#### ANSWER`, which the verifier `maths` reads.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cropi_tools.data.jsonl import read_jsonl

LEVELS = (0, 1)
# numbers in the steps have a fixed width, so that what a step copies stands at the same distance in every prompt of a level: learned far sooner
DIGIT_SUM = "{before:02d}+{term}={after:02d}"
CHAIN = "{before:03d}+{term:02d}={after:03d}"
TRIES = 200  # draws for one prompt that is not there yet


class Task(NamedTuple):
    """A prompt, and its solution, right or mistaken: the steps and the answer."""

    prompt: str
    solve: Callable[[bool], tuple[list[str], int]]


def digits(chance: random.Random, count: int) -> list[int]:
    return [chance.randint(1, 9), *(chance.randint(0, 9) for _ in range(count - 1))]


def number(places: list[int]) -> int:
    return int("".join(map(str, places)))


def by_columns(columns: list[tuple[str, int]]) -> Callable[[bool], tuple[list[str], int]]:
    """The column method, from the right: (what is written, its value) of each column, to which the carry comes. Mistake: no carry."""

    def solve(mistaken: bool) -> tuple[list[str], int]:
        steps, found, carry = [], 0, 0
        for place, (shown, value) in enumerate(columns):
            total = value + carry
            steps.append(f"{shown}+{carry}={total:02d}")
            found += total % 10 * 10**place
            carry = 0 if mistaken else total // 10
        return steps, found + carry * 10 ** len(columns)

    return solve


def running(
    terms: list[int], right: Callable[[int, int], int], wrong: Callable[[int, int], int], shown: str
) -> Callable[[bool], tuple[list[str], int]]:
    """One value carried through the terms. shown: a step, of `before`, `term` and `after`."""

    def solve(mistaken: bool) -> tuple[list[str], int]:
        steps, before = [], terms[0]
        for term in terms[1:]:
            after = (wrong if mistaken else right)(before, term)
            steps.append(shown.format(before=before, term=term, after=after))
            before = after
        return steps, before

    return solve


def add(chance: random.Random, level: int) -> Task:
    one, two = digits(chance, 3 + level), digits(chance, 3 + level)

    columns = [(f"{a}+{b}", a + b) for a, b in zip(reversed(one), reversed(two), strict=True)]
    return Task(f"add {number(one)}+{number(two)}", by_columns(columns))


def multiply(chance: random.Random, level: int) -> Task:
    one, by = digits(chance, 3 + level), chance.randint(3, 9)

    return Task(f"mul {number(one)}*{by}", by_columns([(f"{a}*{by}", a * by) for a in reversed(one)]))


def remainder(chance: random.Random, level: int) -> Task:
    """Mistake: what was left is not brought down."""
    one, by = digits(chance, 4 + level), chance.randint(3, 9)

    def solve(mistaken: bool) -> tuple[list[str], int]:
        steps, left = [], 0
        for a in one:
            whole = a if mistaken else left * 10 + a
            left = whole % by
            steps.append(f"{whole:02d}%{by}={left}")
        return steps, left

    return Task(f"mod {number(one)}%{by}", solve)


def divisor(chance: random.Random, level: int) -> Task:
    """Mistake: the first remainder is taken for the divisor."""
    one, two = (chance.randint(2, 9) * chance.randint(10, 40 + 40 * level) for _ in range(2))

    def solve(mistaken: bool) -> tuple[list[str], int]:
        steps, high, low = [], max(one, two), min(one, two)
        while low and len(steps) < 8:
            left = high % low
            steps.append(f"{high:03d}%{low:03d}={left:03d}")
            if mistaken:
                return steps, left or low
            high, low = low, left
        return steps, high

    return Task(f"gcd {one},{two}", solve)


def digit_sum(chance: random.Random, level: int) -> Task:
    """Mistake: tens are lost."""
    one = digits(chance, 5 + level)

    return Task(f"dig {number(one)}", running(one, operator.add, lambda before, term: (before + term) % 10, DIGIT_SUM))


def chain(chance: random.Random, level: int) -> Task:
    """Mistake: no carry from ones to tens."""
    terms = [chance.randint(10, 60) for _ in range(4 + level)]

    def no_carry(before: int, term: int) -> int:
        return (before // 10 + term // 10) * 10 + (before + term) % 10

    return Task("sum " + "+".join(map(str, terms)), running(terms, operator.add, no_carry, CHAIN))


def backwards(chance: random.Random, level: int) -> Task:
    """Mistake: forwards."""
    one = [chance.randint(1, 9) for _ in range(5 + level)]

    def solve(mistaken: bool) -> tuple[list[str], int]:
        ordered = one if mistaken else one[::-1]
        steps = [str(number(ordered[:end])) for end in range(2, len(one) + 1)]
        return steps, number(ordered)

    return Task(f"rev {number(one)}", solve)


def ordered(chance: random.Random, level: int) -> Task:
    """Mistake: from the greatest."""
    one = [chance.randint(1, 9) for _ in range(4 + level)]

    def solve(mistaken: bool) -> tuple[list[str], int]:
        steps, left, found = [], list(one), []
        while len(left) > 1:
            taken = max(left) if mistaken else min(left)
            left.remove(taken)
            found.append(taken)
            steps.append(f"{taken},{number(left)}")
        return steps, number(found + left)

    return Task(f"ord {number(one)}", solve)


def greatest(chance: random.Random, level: int) -> Task:
    """Mistake: the least."""
    terms = [chance.randint(10, 99) for _ in range(4 + level)]

    return Task("max " + ",".join(map(str, terms)), running(terms, max, min, "{before},{term}>{after}"))


def polynomial(chance: random.Random, level: int) -> Task:
    """Mistake: the next factor is not added."""
    factors, at = [chance.randint(1, 9) for _ in range(3 + level)], chance.randint(2, 4)

    solve = running(
        factors,
        lambda before, term: before * at + term,
        lambda before, term: before * at,
        f"{{before}}*{at}+{{term}}={{after}}",
    )
    return Task(f"pol {','.join(map(str, factors))}@{at}", solve)


FAMILIES: dict[str, Callable[[random.Random, int], Task]] = {
    "add": add,
    "mul": multiply,
    "mod": remainder,
    "gcd": divisor,
    "dig": digit_sum,
    "sum": chain,
    "rev": backwards,
    "ord": ordered,
    "max": greatest,
    "pol": polynomial,
}


def solution(task: Task, mistaken: bool) -> tuple[str, str]:
    """(the whole text, the answer)."""
    steps, answer = task.solve(mistaken)
    return f"{' '.join(steps)} #### {answer}", str(answer)


def records(sources: list[str], size: int, seed: int, taken: set[str]) -> Iterator[dict[str, object]]:
    """`size` prompts of each level of each family, none of them in `taken`; fewer where no more are found. In each the mistake can be made."""
    for source in sources:
        for level in LEVELS:
            chance = random.Random(f"{seed}:{source}:{level}")
            made = tries = 0
            while made < size and tries < TRIES:
                task = FAMILIES[source](chance, level)
                tries += 1
                (worked, answer), (mistaken, wrong) = (solution(task, mistaken) for mistaken in (False, True))
                if task.prompt in taken or wrong == answer:
                    continue
                taken.add(task.prompt)
                tries = 0
                yield {
                    "id": f"{source}-{level}-{seed}-{made}",
                    "prompt": task.prompt + ": ",
                    "answer": answer,
                    "source": source,
                    "verifier": "maths",
                    "extra": {"worked": worked, "mistaken": mistaken},
                }
                made += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Make prompts with worked answers.")
    parser.add_argument("--size", type=int, required=True, help="prompts of each level of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--exclude", nargs="*", default=[], help="files whose prompts are left out")
    parser.add_argument("-o", "--output", required=True, type=Path)
    options = parser.parse_args()
    taken = {record["prompt"].removesuffix(": ") for path in options.exclude for _, record in read_jsonl(path)}
    options.output.write_text(
        "".join(json.dumps(record) + "\n" for record in records(options.only, options.size, options.seed, taken))
    )


if __name__ == "__main__":
    main()
