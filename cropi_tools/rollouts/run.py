"""cropi-rollout from options to output: which prompts to sample, with which seeds, by which engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.data.jsonl_output import JsonLinesOutput
from cropi_tools.data.policies import same_tokenizer, tokenizer_digest
from cropi_tools.data.records import prompt_of, read_prompts, shard_range
from cropi_tools.engines.choose import Server, open_engine
from cropi_tools.engines.protocol import Sampling
from cropi_tools.policy.prompts import PromptCheck
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.rewards import VerifierPool, check_record
from cropi_tools.rollouts.estimate import Estimate, estimate, probe_places
from cropi_tools.rollouts.grading import Row
from cropi_tools.rollouts.metrics import SAVED
from cropi_tools.rollouts.refreshing import marked, parse_wish, wanted_ids
from cropi_tools.rollouts.sampling import Task, chunks, sample_groups
from cropi_tools.rollouts.writing import write
from cropi_tools.runtime.errors import InputError

GROUP_SAMPLES = 8  # of a prompt, where prompts may have different numbers: for the size of a group


class Survey(NamedTuple):
    """This shard's records [start, stop), how many of them are sampled, and how many responses that makes."""

    start: int
    stop: int
    prompts: int
    responses: int


@dataclass(frozen=True)
class Plan:
    """What cropi-rollout was asked to sample; the options of its page, resolved.

    refresh: the statuses of `--where` when `sources` are rollouts of which some prompts are sampled anew, else None. samples: of each prompt;
    None, for a refresh: as many as there were. shard: (i, n) from 1.
    """

    sources: Sequence[str]
    policy: str
    policy_digest: str
    refresh: Sequence[str] | None
    indexes: Sequence[str]
    samples: int | None
    sampling: Sampling
    seed: int
    verifier: str
    verify_seconds: float
    partial_credit: bool
    shard: tuple[int, int]
    limit: int | None
    engine: str
    server: Server | None
    device: str
    dtype: str
    date: str = DEFAULT_DATE

    def tasks(self, vocabulary: int | None = None) -> Iterator[Task]:
        """Every prompt, or rollout to pass on, in file order, before the division into shards.

        vocabulary: token ids of rollouts lie below it.
        """
        if self.refresh is None:
            for record in islice(read_prompts(self.sources), self.limit):
                # a rollouts file may serve as prompts: what its samples said does not go for these
                assert self.samples is not None
                yield Task(prompt_of(record), (self.seed, record["id"]), self.samples)
            return
        wish = parse_wish(self.refresh)
        listed, known = wanted_ids(self.indexes, wish)
        for record, chosen in islice(marked(self.sources, wish, listed, vocabulary), self.limit):
            if self.indexes and record["id"] not in known:
                raise InputError(
                    f"prompt '{record['id']}' is not in the index of {', '.join(self.indexes)}; give the store of these rollouts' gradients"
                )
            if not chosen:
                yield Task(record, None, 0)
                continue
            # Not the seeds of the first time: with the same ones a policy that has moved little would give the same responses. The digest
            # says whose samples these are, since the rest of the file is another policy's.
            prompt = {**prompt_of(record), "sampled_by": self.policy_digest}
            key = (self.seed, "refresh", self.policy_digest, record["id"])
            yield Task(prompt, key, self.samples or len(record["samples"]), record["prompt_token_ids"])

    def survey(self) -> Survey:
        """What there is to do; all records are checked, a bad line at the end too, and whether the policy can take them."""
        tokens = load_tokens(self.policy, self.date)
        tokens.tell_ends()
        check = PromptCheck(tokens, self.sampling.max_tokens)
        refused: InputError | None = None
        samples = array("L")
        for task in self.tasks(tokens.vocabulary):
            check_record(task.record, self.verifier)
            if task.key is not None and refused is None:
                # told once the file itself is known to be good
                try:
                    check(task.record, task.prompt_token_ids)
                except InputError as error:
                    refused = error
            samples.append(0 if task.key is None else task.samples)
        if refused is not None:
            raise refused
        start, stop = shard_range(len(samples), *self.shard)
        mine = samples[start:stop]
        return Survey(start, stop, sum(map(bool, mine)), sum(mine))

    def groups(self, start: int, stop: int) -> Iterator[list[Task]]:
        """The tasks [start, stop) in the groups that are committed at once."""
        return chunks(islice(self.tasks(), start, stop), self.samples or GROUP_SAMPLES)


def sample(plan: Plan, target: JsonLinesOutput) -> Mapping[str, Any]:
    """Sample, verify and write; returns the summary."""
    if plan.refresh is not None:
        for file in plan.sources:
            same_tokenizer(file, plan.policy)
    start, stop, prompts, responses = plan.survey()
    if plan.refresh is not None:
        runtime.notify(f"{prompts} of {stop - start} prompts are sampled anew, {responses} responses")
    engine, tokens, device = open_engine(plan.engine, plan.policy, plan.device, plan.dtype, plan.server, plan.date)
    try:
        settings = engine.settings(plan.sampling)
        # which model a server serves is known only now; the rest of what decides a sample is in the fingerprint
        served, before = settings.get("served_model"), target.resumed(SAVED).get("served_model")
        if target.lines and served != before:
            raise InputError(
                f"the unfinished output was sampled from {before}, now the server has {served}; --force starts anew"
            )
        wanted = plan.groups(start + target.lines, stop)
        with VerifierPool(plan.verifier, seconds=plan.verify_seconds, partial_credit=plan.partial_credit) as pool:
            groups = sample_groups(engine, tokens, pool, wanted, plan.sampling)
            target.begin_work()
            with closing(groups):
                written = write(target, groups, stop - start, "rollouts", {"served_model": served})
    finally:
        engine.close()
    summary, cost = written.tallies.summary(), written.sampled
    target.finish(
        ledger={"tokens_generated": cost.tokens, "tokens_prompt": cost.prompt_tokens, "device": device},
        facts={"tokenizer": tokenizer_digest(plan.policy), "sampling": settings, "summary": summary},
    )
    return summary


def dry_run(plan: Plan) -> Estimate:
    """Sample a few prompts, spread evenly over this shard, and say what all of them will cost. Nothing is written."""
    start, stop, prompts, responses = plan.survey()
    places = set(probe_places(prompts, -(-responses // max(prompts, 1))))
    chosen = (task for task in islice(plan.tasks(), start, stop) if task.key is not None)
    probe = [task for place, task in enumerate(chosen) if place in places]
    engine, tokens, _ = open_engine(plan.engine, plan.policy, plan.device, plan.dtype, plan.server, plan.date)
    try:
        with VerifierPool(plan.verifier, seconds=plan.verify_seconds, partial_credit=plan.partial_credit) as pool:

            def run(tasks: Sequence[Task]) -> Iterator[list[Row]]:
                return sample_groups(engine, tokens, pool, chunks(tasks, plan.samples or GROUP_SAMPLES), plan.sampling)

            return estimate(prompts, responses, probe, run)
    finally:
        engine.close()
