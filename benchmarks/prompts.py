"""What a prompt costs cropi-prompts and its readers: memory that stays when the text is gone, and time to find repeated ids.

python benchmarks/prompts.py [--prompts 200000] [--json]

Memory is the peak of a whole `cropi-prompts` process, over N and over 4 N prompts: the difference is what each further prompt
leaves behind. Its peer holds ids and questions themselves in Python sets. Time is that of `read_prompts`, which checks fields and
that no id comes twice, against decoding the same lines alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from goals import Goal, best_seconds, print_json, print_lines, processor, used_by

from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.data.records import read_prompts

COMMAND = "from cropi_tools.cli.prompts import main; main()"
SETS = """
import json, sys
ids, questions = set(), set()
for line in open(sys.argv[1]):
    record = json.loads(line)
    ids.add(record["id"])
    questions.add(" ".join(record["prompt"].casefold().split()))
"""


def write_prompts(path: Path, count: int) -> Path:
    """Prompts of about 200 characters, none twice."""
    with open(path, "w") as stream:
        for number in range(count):
            prompt = (
                f"Question {number}: how many apples are {number} and {number % 13} apples? " + "Think first. " * 11
            )
            record = {
                "id": f"prompt-{number}",
                "prompt": prompt,
                "answer": str(number + number % 13),
                "source": "apples",
            }
            stream.write(json.dumps(record) + "\n")
    return path


def measure(folder: Path, prompts: int) -> list[Goal]:
    many, few = write_prompts(folder / "many.jsonl", prompts), write_prompts(folder / "few.jsonl", prompts // 4)
    further = prompts - prompts // 4

    def a_prompt(*words: object) -> float:
        most, least = (used_by([sys.executable, "-c", *words, file]).memory for file in (many, few))
        return (most - least) / further

    ours = a_prompt(COMMAND, "--quiet", "-o", "-")
    sets = a_prompt(SETS)
    seconds = best_seconds(
        {
            "checked": lambda: sum(1 for _ in read_prompts([many])),
            "decoded": lambda: sum(1 for _ in read_jsonl(many)),
        },
        rounds=2,
    )
    return [
        Goal(
            "bytes a prompt against Python sets",
            ours / sets,
            0.5,
            f"sets: {sets:.0f} bytes, ours {ours:.0f}",
            at_most=True,
        ),
        Goal(
            "time to read against decoding alone",
            seconds["checked"] / seconds["decoded"],
            2.0,
            "read_jsonl",
            at_most=True,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        goals = measure(Path(folder), options.prompts)
    if options.json:
        print_json(goals, processor(1), prompts=options.prompts)
    else:
        print_lines(goals)


if __name__ == "__main__":
    main()
