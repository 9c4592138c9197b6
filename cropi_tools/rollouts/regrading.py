"""`cropi-rollout --verify-only`: the responses of existing rollouts graded again, by another verifier or a mended one.

Rollouts of others are read as well (text only, or verl's dumps): they become rollouts of ours, with token ids and without log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cropi_tools import runtime
from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.data.external_rollouts import foreign_form
from cropi_tools.data.jsonl import Record, read_jsonl, shown
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.manifest import read_manifest
from cropi_tools.data.policies import same_tokenizer, tokenizer_digest
from cropi_tools.data.records import read_rollouts, shard_range
from cropi_tools.rewards import VerifierPool, check_record
from cropi_tools.rollouts.grading import CHUNK_RESPONSES, Row, graded, reasoning_mark
from cropi_tools.rollouts.writing import write
from cropi_tools.runtime.clock import starting
from cropi_tools.runtime.errors import InputError

RECORDED = "recorded"
"""In place of a verifier: the rewards that are in the file stay."""


@dataclass(frozen=True)
class Regrading:
    """What `--verify-only` was asked for.

    policy, prompts, longest: for rollouts of others, whose tokenizer reads their texts, what the prompts of dumps were, and the limit in
    tokens that they were sampled under, where it is known.
    """

    sources: Sequence[str]
    verifier: str
    seconds: float
    partial_credit: bool
    policy: str | None
    prompts: Sequence[str]
    longest: int | None
    shard: tuple[int, int]
    limit: int | None
    date: str = DEFAULT_DATE

    def records(self, repeated: Callable[[str], None] = lambda identity: None) -> Iterator[Record]:
        """All rollouts in our form, before the division into shards; `repeated` is told of every prompt that comes again and is left out."""
        return islice(self._records(repeated), self.limit)

    def _records(self, repeated: Callable[[str], None]) -> Iterator[Record]:
        # of the first that has one: a shard may be empty
        first = next((record for path in self.sources for _, record in read_jsonl(path)), {})
        ours = foreign_form(first) == "ours"
        if ours and self.policy is None:
            return (rollout.record for rollout in read_rollouts(self.sources))
        if self.policy is None:
            raise InputError(f"{shown(self.sources[0])}: holds texts; --model FOLDER says whose tokenizer reads them")
        with starting():
            from cropi_tools.policy.tokens import load_tokens
            from cropi_tools.rollouts.imported import imported_rollouts

            tokens = load_tokens(self.policy, self.date)
        if ours:
            return (rollout.record for rollout in read_rollouts(self.sources, tokens.vocabulary))
        found = imported_rollouts(self.sources, tokens, self.prompts or None, self.longest, repeated)
        return ({**record, **reasoning_mark(tokens.tokenizer, record["prompt_token_ids"])} for record in found)


def regrade(wish: Regrading, target: JsonLinesOutput) -> Mapping[str, Any]:
    """Grade, write, and return the summary."""
    if wish.policy is not None:
        for file in wish.sources:
            same_tokenizer(file, wish.policy)
    keep = wish.verifier == RECORDED
    target.begin_work()
    count = repeated = 0

    def note_repeated(identity: str) -> None:
        nonlocal repeated
        repeated += 1

    for record in wish.records(note_repeated):
        if keep:
            _check_rewards(record)
        else:
            check_record(record, wish.verifier)
        count += 1
    start, stop = shard_range(count, *wish.shard)
    groups = _groups(islice(wish.records(), start + target.lines, stop))
    with VerifierPool(
        "exact" if keep else wish.verifier, seconds=wish.seconds, stoppable=True, partial_credit=wish.partial_credit
    ) as pool:
        rows = ([Row(record, False) for record in (group if keep else graded(pool, group))] for group in groups)
        summary = write(target, rows, stop - start, "verified").tallies.summary()
    if repeated:
        runtime.notify(f"{repeated} prompts came again and were left out; the first of each is kept")
    facts = {"tokenizer": _tokenizer(wish.sources, wish.policy), "summary": summary}
    target.finish(skipped={"repeated prompts": repeated}, facts=facts)
    return summary


def _check_rewards(record: Record) -> None:
    if any(sample.get("reward") is None for sample in record["samples"]):
        raise InputError(f"prompt '{record['id']}' has samples without a reward; name a verifier to grade them")


def _groups(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Records in groups of about CHUNK_RESPONSES responses; ends early, after a group, when a signal asks to stop."""
    group: list[Record] = []
    responses = 0
    for record in records:
        group.append(record)
        responses += len(record["samples"])
        if responses >= CHUNK_RESPONSES:
            yield group
            if runtime.stop_requested():
                return
            group, responses = [], 0
    if group:
        yield group


def _tokenizer(sources: Sequence[str], policy: str | None) -> str | None:
    """The tokenizer of the rollouts' tokens: the policy's, or what their manifests say if they agree."""
    if policy is not None:
        return tokenizer_digest(policy)
    found = {(read_manifest(file) or {}).get("facts", {}).get("tokenizer") for file in sources if file != "-"}
    return found.pop() if len(found) == 1 else None
