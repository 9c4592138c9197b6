"""The tasks of bed (c): ten families of short sums whose answers are worked out step by step, in 20 to 80 characters.

    python benchmarks/reproduce/worked_tasks.py --size 50 --seed 1 -o pool.jsonl
    python benchmarks/reproduce/worked_tasks.py --size 40 --seed 2 --only mod --exclude pool.jsonl -o valid.mod.jsonl

A record is a prompt as the commands take it; `extra.worked` is the right solution, `extra.slipped` one with a slip in a single step, from
which the rest follows as it should: what the policy is warmed up with. A solution ends with `#### ANSWER`, which the verifier `maths` reads.
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


class Pen:
    """Writes down the numbers of a solution; with a place of a slip, the number written there is wrong, and so is what follows from it."""

    def __init__(self, chance: random.Random, slip: int | None = None) -> None:
        self.chance, self.slip, self.written = chance, slip, 0

    def __call__(self, value: int) -> int:
        place, self.written = self.written, self.written + 1
        if place != self.slip:
            return value
        return max(0, value + self.chance.choice([-10, -1, 1, 10] if value >= 10 else [-1, 1, 1, 2]))


class Task(NamedTuple):
    """A prompt, and its solution for a pen: the steps and the answer."""

    prompt: str
    solve: Callable[[Pen], tuple[list[str], int]]


def digits(chance: random.Random, count: int) -> list[int]:
    return [chance.randint(1, 9), *(chance.randint(0, 9) for _ in range(count - 1))]


def number(places: list[int]) -> int:
    return int("".join(map(str, places)))


def by_columns(columns: list[tuple[str, int]]) -> Callable[[Pen], tuple[list[str], int]]:
    """The column method, from the right: (what is written, its value) of each column, to which the carry comes."""

    def solve(pen: Pen) -> tuple[list[str], int]:
        steps, found, carry = [], 0, 0
        for place, (shown, value) in enumerate(columns):
            total = pen(value + carry)
            steps.append(f"{shown}+{carry}={total:02d}")
            found += total % 10 * 10**place
            carry = total // 10
        return steps, found + carry * 10 ** len(columns)

    return solve


def running(
    terms: list[int], combined: Callable[[int, int], int], shown: str
) -> Callable[[Pen], tuple[list[str], int]]:
    """One value carried through the terms. shown: a step, of `before`, `term` and `after`."""

    def solve(pen: Pen) -> tuple[list[str], int]:
        steps, before = [], terms[0]
        for term in terms[1:]:
            after = pen(combined(before, term))
            steps.append(shown.format(before=before, term=term, after=after))
            before = after
        return steps, before

    return solve


def add(chance: random.Random, level: int) -> Task:
    one, two = digits(chance, 4 + level), digits(chance, 4 + level)

    columns = [(f"{a}+{b}", a + b) for a, b in zip(reversed(one), reversed(two), strict=True)]
    return Task(f"add {number(one)}+{number(two)}", by_columns(columns))


def multiply(chance: random.Random, level: int) -> Task:
    one, by = digits(chance, 4 + level), chance.randint(3, 9)

    return Task(f"mul {number(one)}*{by}", by_columns([(f"{a}*{by}", a * by) for a in reversed(one)]))


def remainder(chance: random.Random, level: int) -> Task:
    one, by = digits(chance, 6 + level), chance.randint(3, 9)

    def solve(pen: Pen) -> tuple[list[str], int]:
        steps, left = [], 0
        for a in one:
            whole = left * 10 + a
            left = pen(whole % by)
            steps.append(f"{whole:02d}%{by}={left}")
        return steps, left

    return Task(f"mod {number(one)}%{by}", solve)


def divisor(chance: random.Random, level: int) -> Task:
    one, two = (chance.randint(2, 9) * chance.randint(10, 40 + 40 * level) for _ in range(2))

    def solve(pen: Pen) -> tuple[list[str], int]:
        steps, high, low = [], max(one, two), min(one, two)
        while low and len(steps) < 8:
            left = pen(high % low)
            steps.append(f"{high:03d}%{low:03d}={left:03d}")
            high, low = low, left
        return steps, high

    return Task(f"gcd {one},{two}", solve)


def digit_sum(chance: random.Random, level: int) -> Task:
    one = digits(chance, 6 + level)

    return Task(f"dig {number(one)}", running(one, operator.add, DIGIT_SUM))


def chain(chance: random.Random, level: int) -> Task:
    terms = [chance.randint(10, 60) for _ in range(5 + level)]

    return Task("sum " + "+".join(map(str, terms)), running(terms, operator.add, CHAIN))


def backwards(chance: random.Random, level: int) -> Task:
    one = [chance.randint(1, 9) for _ in range(6 + level)]

    def solve(pen: Pen) -> tuple[list[str], int]:
        steps, found = [], 0
        for a in reversed(one):
            found = pen(found * 10 + a)
            steps.append(str(found))
        return steps[1:], found

    return Task(f"rev {number(one)}", solve)


def ordered(chance: random.Random, level: int) -> Task:
    one = [chance.randint(1, 9) for _ in range(5 + level)]

    def solve(pen: Pen) -> tuple[list[str], int]:
        steps, left, found = [], list(one), []
        while len(left) > 1:
            least = min(9, max(1, pen(min(left))))
            left.remove(least if least in left else min(left))
            found.append(least)
            steps.append(f"{least},{number(left)}")
        return steps, number(found + left)

    return Task(f"ord {number(one)}", solve)


def greatest(chance: random.Random, level: int) -> Task:
    terms = [chance.randint(10, 99) for _ in range(5 + level)]

    return Task("max " + ",".join(map(str, terms)), running(terms, max, "{before},{term}>{after}"))


def polynomial(chance: random.Random, level: int) -> Task:
    factors, at = [chance.randint(1, 9) for _ in range(4 + level)], chance.randint(2, 4)

    solve = running(factors, lambda before, term: before * at + term, f"{{before}}*{at}+{{term}}={{after}}")
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


def solution(task: Task, pen: Pen) -> tuple[str, str]:
    """(the whole text, the answer)."""
    steps, answer = task.solve(pen)
    return f"{' '.join(steps)} #### {answer}", str(answer)


def records(sources: list[str], size: int, seed: int, taken: set[str]) -> Iterator[dict[str, object]]:
    """`size` prompts of each level of each family, none of them in `taken`; fewer where no more are found."""
    for source in sources:
        for level in LEVELS:
            chance = random.Random(f"{seed}:{source}:{level}")
            made = tries = 0
            while made < size and tries < TRIES:
                task = FAMILIES[source](chance, level)
                tries += 1
                if task.prompt in taken:
                    continue
                taken.add(task.prompt)
                tries = 0
                pen = Pen(chance)
                worked, answer = solution(task, pen)
                slipped, wrong = worked, answer
                for _ in range(20):
                    slipped, wrong = solution(task, Pen(chance, chance.randrange(pen.written)))
                    if wrong != answer:
                        break
                yield {
                    "id": f"{source}-{level}-{seed}-{made}",
                    "prompt": task.prompt + ": ",
                    "answer": answer,
                    "source": source,
                    "verifier": "maths",
                    "extra": {"worked": worked, "slipped": slipped},
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
