"""cropi-verify from options to output: the responses of existing rollouts graded again, by another verifier or a corrected one.

Rollouts of others are read as well (text only, or verl's dumps): they become rollouts of ours, with token ids and without log-probabilities.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.external_rollouts import foreign_form
from cropi_tools.data.jsonl import Record, dump_line, is_stream, read_jsonl, shown
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.manifest import read_manifest
from cropi_tools.data.policies import same_tokenizer, tokenizer_digest
from cropi_tools.data.records import read_rollouts, shard_range
from cropi_tools.rewards import VerifierPool, check_record
from cropi_tools.rollouts.estimate import PROBE_RESPONSES
from cropi_tools.rollouts.grading import CHUNK_RESPONSES, Row, graded, reasoning_mark
from cropi_tools.rollouts.look import Look
from cropi_tools.rollouts.options import VerifyOptions
from cropi_tools.rollouts.writing import write
from cropi_tools.runtime.clock import importing, starting
from cropi_tools.runtime.errors import InputError
from cropi_tools.runtime.estimate import Estimate, evenly, measured


def regrade(options: VerifyOptions, target: JsonLinesOutput, look: Look) -> Mapping[str, Any]:
    """Grade, write, and return the summary. look: sees what goes to a stream, which cannot be read again."""
    if options.model is not None:
        for file in options.rollouts:
            same_tokenizer(file, options.model)
    target.begin_work()
    start, stop, responses, repeated = _survey(options)
    groups = _groups(islice(records(options), start + target.lines, stop))
    with _pool(options) as pool:
        rows = ([Row(record, False) for record in _graded(options, pool, group)] for group in groups)
        seen = look.passing(rows) if is_stream(options.output) else rows
        written = write(target, seen, stop - start, "verified", responses=responses)
    summary = written.tallies.summary()
    if repeated:
        runtime.notify(f"{repeated} prompts came again and were left out; the first of each is kept")
    facts = {"tokenizer": _tokenizer(options), "summary": summary}
    target.finish(skipped={"repeated prompts": repeated}, facts=facts)
    return summary


def dry_run(options: VerifyOptions) -> Estimate:
    """Grade a few records, spread evenly over this shard, and say what all of them will take."""
    started = time.monotonic()
    start, stop, responses, _ = _survey(options)
    reading = time.monotonic() - started
    prompts = stop - start
    places = set(evenly(prompts, max(1, PROBE_RESPONSES * prompts // max(responses, 1))))
    probe = [record for place, record in enumerate(islice(records(options), start, stop)) if place in places]
    with _pool(options) as pool:
        found = measured(probe, lambda part: _graded(options, pool, part))
    share = found.share(prompts)
    return Estimate(
        f"{prompts} prompts, {responses} responses",
        2 * reading + found.seconds * share,  # all is read once to be checked and once to be graded
        sum(len(dump_line(record).encode()) + 1 for record in found.result) * share,
        f"{found.items} prompts that were really verified",
        found.seconds,
        facts={"prompts": prompts, "responses": responses, "probe_prompts": found.items},
    )


class _Survey(NamedTuple):
    """This shard's records [start, stop), their responses, and how many prompts, of all shards, come again and are left out."""

    start: int
    stop: int
    responses: int
    repeated: int


def _survey(options: VerifyOptions) -> _Survey:
    """What there is to do; all records are checked."""
    repeated, samples = 0, array("L")

    def note_repeated(identity: str) -> None:
        nonlocal repeated
        repeated += 1

    for record in records(options, note_repeated):
        if options.keeps_rewards:
            _check_rewards(record)
        else:
            check_record(record, options.verifier)
        samples.append(len(record["samples"]))
    start, stop = shard_range(len(samples), *options.shard)
    return _Survey(start, stop, sum(samples[start:stop]), repeated)


def _pool(options: VerifyOptions) -> VerifierPool:
    return VerifierPool(
        None if options.keeps_rewards else options.verifier,
        seconds=options.verify_seconds,
        stoppable=True,
        partial_credit=options.partial_credit,
    )


def _graded(options: VerifyOptions, pool: VerifierPool, group: Sequence[Record]) -> Sequence[Record]:
    return group if options.keeps_rewards else graded(pool, group)


def records(options: VerifyOptions, repeated: Callable[[str], None] = lambda identity: None) -> Iterator[Record]:
    """All rollouts in our form, before the division into shards; `repeated` is told of every prompt that comes again and is left out."""
    return islice(_all_records(options, repeated), options.limit)


def graded_files(options: VerifyOptions) -> tuple[str, ...]:
    """The files whose records are graded: of a dump, and of texts with --prompts, a prompt's record stands for each of its own."""
    return options.rollouts if not options.prompts or _are_ours(options.rollouts) else options.prompts


def _are_ours(sources: Sequence[str]) -> bool:
    # told by the first record there is: a shard may be empty
    first = next((record for path in sources for _, record in read_jsonl(path)), {})
    return foreign_form(first) == "ours"


def _all_records(options: VerifyOptions, repeated: Callable[[str], None]) -> Iterator[Record]:
    sources = options.rollouts
    ours = _are_ours(sources)
    if ours and options.model is None:
        return (rollout.record for rollout in read_rollouts(sources))
    if options.model is None:
        raise InputError(f"{shown(sources[0])}: holds texts; --model FOLDER says whose tokenizer reads them")
    with importing():
        from cropi_tools.policy.tokens import load_tokens
        from cropi_tools.rollouts.imported import imported_rollouts

    with starting():
        tokens = load_tokens(options.model, options.date)
    if ours:
        return (rollout.record for rollout in read_rollouts(sources, tokens.vocabulary))
    found = imported_rollouts(sources, tokens, options.prompts or None, options.max_tokens, repeated)
    return ({**record, **reasoning_mark(tokens.tokenizer, record["prompt_token_ids"])} for record in found)


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


def _tokenizer(options: VerifyOptions) -> str | None:
    """The tokenizer of the rollouts' tokens: the policy's, or what their manifests say if they agree."""
    if options.model is not None:
        return tokenizer_digest(options.model)
    manifests = [read_manifest(file) for file in options.rollouts if file != "-"]
    found = {(manifest or {}).get("facts", {}).get("tokenizer") for manifest in manifests}
    return found.pop() if len(found) == 1 else None
