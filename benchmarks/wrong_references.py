"""A pool in which a share of the reference answers is wrong, as in data that nobody has checked: a test bed for finding them.

A wrong reference is the wrong answer that the policy itself gives most often, so that it looks plausible, is rewarded, and training would
teach it. Of the prompts to which there is such an answer a share is chosen by a seeded hash of the id. The responses stay as they are; their
rewards are what each record's own verifier says against the new references.

    python benchmarks/wrong_references.py --pool pool.jsonl --rollouts train.rollouts.jsonl -o FOLDER

writes FOLDER/pool.jsonl, FOLDER/train.rollouts.jsonl (with manifests, so that every command takes them) and FOLDER/wrong.jsonl: a line a
changed prompt with `id`, `source`, `right` and `wrong`. What is there already, made the same way, is kept; made otherwise, it is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools.data.digest_set import hash64
from cropi_tools.data.jsonl import Record
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.manifest import Fingerprint, Input, file_input, read_manifest
from cropi_tools.data.records import read_prompts, read_rollouts
from cropi_tools.rewards import VerifierPool, check_record
from cropi_tools.rewards.answers import most_frequent
from cropi_tools.rollouts.grading import Row, graded
from cropi_tools.rollouts.writing import write
from cropi_tools.runtime.errors import InputError

SHARE = 0.4
AT_ONCE = 64  # prompts graded between two commits


class Corrupted(NamedTuple):
    """The files that were made, and the changed prompts: `id`, `source`, `right`, `wrong`."""

    pool: Path
    rollouts: Path
    wrong: Path
    changed: list[Record]


def main() -> None:
    parser = argparse.ArgumentParser(description="Give a share of a pool's prompts a wrong reference answer.")
    parser.add_argument("--pool", required=True, help="prompts")
    parser.add_argument("--rollouts", required=True, help="rollouts of these prompts")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for what is made")
    parser.add_argument("--share", type=float, default=SHARE, help="share of the prompts with a wrong answer")
    parser.add_argument("--seed", type=int, default=0, help="which of them are changed")
    options = parser.parse_args()
    made = corrupt(options.pool, options.rollouts, options.output, options.share, options.seed)
    print(f"{len(made.changed)} references are wrong now: {made.wrong}")


def corrupt(pool: str | Path, rollouts: str | Path, folder: Path, share: float = SHARE, seed: int = 0) -> Corrupted:
    """Write pool and rollouts with wrong references into a folder. InputError: no prompt has a wrong answer, or other files are there."""
    wrong = choose(wrong_answers(rollouts), share, seed)
    if not wrong:
        raise InputError(f"{rollouts}: no prompt has a wrong answer that could be its reference")
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {"prompts": file_input(pool), "rollouts": file_input(rollouts)}
    decisive = {"share": share, "seed": seed}
    prompts = [{**record, "answer": wrong.get(record["id"], record["answer"])} for record in read_prompts([pool])]
    made = Corrupted(folder / "pool.jsonl", folder / "train.rollouts.jsonl", folder / "wrong.jsonl", [])
    made.changed.extend(
        {"id": record["id"], "source": record["source"], "right": record["answer"], "wrong": wrong[record["id"]]}
        for record in read_prompts([pool])
        if record["id"] in wrong
    )
    write_lines(made.pool, prompts, decisive, inputs)
    write_lines(made.wrong, made.changed, decisive, inputs)
    regrade(made.rollouts, rollouts, wrong, decisive, inputs)
    return made


def wrong_answers(rollouts: str | Path) -> dict[str, str]:
    """By prompt id the policy's most frequent wrong answer, where there is one that its verifier takes for a reference."""
    found = {}
    for rollout in read_rollouts([rollouts]):
        record = rollout.record
        if record.get("verifier") == "reasoning-gym":
            raise InputError(f"prompt '{rollout.id}': reasoning-gym's scorers do not look at the reference answer")
        given = most_frequent(record, [sample for sample in record["samples"] if is_wrong(sample)])
        if given is not None and given.answer and may_be_reference({**record, "answer": given.answer}):
            found[rollout.id] = given.answer
    return found


def is_wrong(sample: Record) -> bool:
    """Whether a response gives an answer, and a wrong one."""
    return sample["reward"] < 1 and sample.get("outcome", "wrong") == "wrong"


def may_be_reference(record: Record) -> bool:
    """Whether the record's verifier can compare with its answer."""
    try:
        check_record(record)
    except InputError:
        return False
    return True


def choose(answers: dict[str, str], share: float, seed: int) -> dict[str, str]:
    """A share of the prompts, the first in the order of a seeded hash."""
    order = sorted(answers, key=lambda prompt_id: (hash64(f"wrong:{seed}:{prompt_id}"), prompt_id))
    return {prompt_id: answers[prompt_id] for prompt_id in order[: round(share * len(order))]}


def write_lines(path: Path, records: Iterable[Record], decisive: dict[str, Any], inputs: dict[str, Input]) -> None:
    """Records with a manifest."""
    target = output(path, decisive, inputs)
    if target.open():
        target.append(records)
        target.finish()


def regrade(
    path: Path, rollouts: str | Path, wrong: dict[str, str], decisive: dict[str, Any], inputs: dict[str, Input]
) -> None:
    """The rollouts with the new references, every response graded again; the manifest keeps what it said of the sampling."""
    target = output(path, decisive, inputs)
    if not target.open():
        return
    records = [rollout.record for rollout in read_rollouts([rollouts])]
    asked = [{**record, "answer": wrong.get(record["id"], record["answer"])} for record in records]
    with VerifierPool(None) as pool:
        written = write(target, rows(pool, asked[target.lines :]), len(asked), "verified")
    facts = (read_manifest(rollouts) or {}).get("facts", {})
    target.finish(facts={**facts, "summary": written.tallies.summary()})


def rows(pool: VerifierPool, records: Sequence[Record]) -> Iterator[list[Row]]:
    """Groups of graded records."""
    for start in range(0, len(records), AT_ONCE):
        yield [Row(record, False) for record in graded(pool, records[start : start + AT_ONCE])]


def output(path: Path, decisive: dict[str, Any], inputs: dict[str, Input]) -> JsonLinesOutput:
    """An output of this program."""
    return JsonLinesOutput(str(path), Fingerprint.of("wrong_references", decisive, inputs), inputs)


if __name__ == "__main__":
    main()
