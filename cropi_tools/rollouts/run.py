"""cropi-rollout from options to output: which prompts to sample, with which seeds, by which engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import is_stream
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.policies import same_tokenizer, tokenizer_digest
from cropi_tools.data.records import prompt_of, read_prompts, shard_range
from cropi_tools.engines.choose import Opened, Server, open_engine
from cropi_tools.engines.protocol import Sampling
from cropi_tools.policy.prompts import PromptCheck
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.rewards import VerifierPool, check_record
from cropi_tools.rollouts.estimate import estimate, probe_places
from cropi_tools.rollouts.grading import Row
from cropi_tools.rollouts.look import Look
from cropi_tools.rollouts.metrics import SAVED
from cropi_tools.rollouts.options import RolloutOptions
from cropi_tools.rollouts.refreshing import Again, marked, parse_wish, wanted_ids
from cropi_tools.rollouts.sampling import SamplingTask, chunks, sample_groups
from cropi_tools.rollouts.writing import write
from cropi_tools.runtime.clock import starting
from cropi_tools.runtime.errors import InputError
from cropi_tools.runtime.estimate import Estimate

GROUP_SAMPLES = 8  # of a prompt, where prompts may have different numbers: for the size of a group


class Survey(NamedTuple):
    """This shard's records [start, stop), how many of them are sampled, and how many responses that makes.

    all_responses: with those of the records that are passed on.
    """

    start: int
    stop: int
    prompts: int
    responses: int
    all_responses: int


def tasks(options: RolloutOptions, again: Again | None, vocabulary: int | None = None) -> Iterator[SamplingTask]:
    """Every prompt, or rollout to pass on, in file order, before the division into shards.

    again: what a refresh needs besides the options; None without one. vocabulary: token ids of rollouts lie below it.
    """
    if again is None:
        for record in islice(read_prompts(options.sources), options.limit):
            # a rollouts file may serve as prompts: what its samples said does not go for these
            assert options.samples_each is not None
            yield SamplingTask(prompt_of(record), (options.seed, record["id"]), options.samples_each)
        return
    wish = parse_wish(options.where)
    listed, known = wanted_ids(again.indexes, wish)
    for record, chosen in islice(marked(options.sources, wish, listed, vocabulary), options.limit):
        if again.indexes and record["id"] not in known:
            raise InputError(
                f"prompt '{record['id']}' is not in the index of {', '.join(again.indexes)}; give the store of these rollouts' gradients"
            )
        if not chosen:
            yield SamplingTask(record, None, 0)
            continue
        # Not the seeds of the first time: with the same ones a policy that has moved little would give the same responses. The digest
        # says whose samples these are, since the rest of the file is another policy's.
        prompt = {**prompt_of(record), "sampled_by": again.policy_digest}
        key = (options.seed, "refresh", again.policy_digest, record["id"])
        yield SamplingTask(prompt, key, options.samples_each or len(record["samples"]), record["prompt_token_ids"])


def survey(options: RolloutOptions, again: Again | None) -> Survey:
    """What there is to do; all records are checked, a bad line at the end too, and whether the policy can take them."""
    with starting():
        tokens = load_tokens(options.model, options.date)
    tokens.tell_ends()
    check = PromptCheck(tokens, options.max_tokens)
    refused: InputError | None = None
    samples, everything = array("L"), array("L")
    for task in tasks(options, again, tokens.vocabulary):
        check_record(task.record, options.verifier)
        if task.key is not None and refused is None:
            # told once the file itself is known to be good
            try:
                check(task.record, task.prompt_token_ids)
            except InputError as error:
                refused = error
        samples.append(0 if task.key is None else task.samples)
        everything.append(len(task.record["samples"]) if task.key is None else task.samples)
    if refused is not None:
        raise refused
    start, stop = shard_range(len(samples), *options.shard)
    mine = samples[start:stop]
    return Survey(start, stop, sum(map(bool, mine)), sum(mine), sum(everything[start:stop]))


def sample(options: RolloutOptions, again: Again | None, target: JsonLinesOutput, look: Look) -> Mapping[str, Any]:
    """Sample, verify and write; returns the summary. look: sees what goes to a stream, which cannot be read again."""
    if again is not None:
        for file in options.sources:
            same_tokenizer(file, options.model)
    target.begin_work()  # reading the prompts is work; what is loaded after it is start again
    start, stop, prompts, responses, everything = survey(options, again)
    if again is not None:
        runtime.notify(f"{prompts} of {stop - start} prompts are sampled again, {responses} responses")
    engine, tokens, device = _opened(options)
    sampling = _sampling(options)
    try:
        with starting():
            settings = engine.settings(sampling)
        # which model a server serves is known only now; the rest of what decides a sample is in the fingerprint
        served, before = settings.get("served_model"), target.resumed(SAVED).get("served_model")
        if target.lines and served != before:
            raise InputError(
                f"the unfinished output was sampled from {before}, now the server has {served}; --force starts again"
            )
        wanted = chunks(islice(tasks(options, again), start + target.lines, stop), _group_samples(options))
        with _pool(options) as pool:
            groups = sample_groups(engine, tokens, pool, wanted, sampling)
            with closing(groups):
                seen = look.passing(groups) if is_stream(options.output) else groups
                written = write(target, seen, stop - start, "rollouts", {"served_model": served}, everything)
    finally:
        engine.close()
    summary, cost = written.tallies.summary(), written.sampled
    target.finish(
        ledger={"tokens_generated": cost.tokens, "tokens_prompt": cost.prompt_tokens, "device": device},
        facts={"tokenizer": tokenizer_digest(options.model), "sampling": settings, "summary": summary},
    )
    return summary


def dry_run(options: RolloutOptions, again: Again | None, look: Look) -> tuple[Estimate, Mapping[str, Any]]:
    """Sample a few prompts, spread evenly over this shard: what all of them will cost, and the summary of these. Nothing is written.

    look: sees them.
    """
    start, stop, prompts, responses, _ = survey(options, again)
    places = set(probe_places(prompts, -(-responses // max(prompts, 1))))
    chosen = (task for task in islice(tasks(options, again), start, stop) if task.key is not None)
    probe = [task for place, task in enumerate(chosen) if place in places]
    engine, tokens, _ = _opened(options)
    try:
        with _pool(options) as pool:

            def run(wanted: Sequence[SamplingTask]) -> Iterator[list[Row]]:
                return sample_groups(engine, tokens, pool, chunks(wanted, _group_samples(options)), _sampling(options))

            return estimate(prompts, responses, probe, lambda wanted: look.passing(run(wanted)))
    finally:
        engine.close()


def _opened(options: RolloutOptions) -> Opened:
    server = Server(options.server, options.served_model, options.concurrency) if options.server else None
    with starting():
        return open_engine(options.engine, options.model, options.device, options.dtype, server, options.date)


def _pool(options: RolloutOptions) -> VerifierPool:
    return VerifierPool(options.verifier, seconds=options.verify_seconds, partial_credit=options.partial_credit)


def _sampling(options: RolloutOptions) -> Sampling:
    return Sampling(options.max_tokens, options.temperature)


def _group_samples(options: RolloutOptions) -> int:
    """Samples of a prompt, for the size of the groups that are committed at once."""
    return options.samples_each or GROUP_SAMPLES
