"""The rollouts of one step: the next prompts of the stream, sampled and verified, others in place of groups that teach nothing.

Several processes share the prompts of a step; which ones are drawn and kept is the same for all. What is sampled when a signal asks to stop
is not lost: it is handed to the checkpoint and taken up again, chunk by chunk as it would have been sampled anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.engines.protocol import Engine
from cropi_tools.policy.tokens import Tokens
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rollouts.metrics import Tally
from cropi_tools.rollouts.sampling import SamplingTask, chunks, sample_groups
from cropi_tools.runtime.errors import CropiError
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.evaluation import of_all_processes, tally
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.prompt_stream import PromptOrder


class Stopped(Exception):
    """A signal asked to stop. pending: all rollouts of the step so far, of all processes, by place in the stream."""

    def __init__(self, pending: Mapping[int, Record]) -> None:
        super().__init__()
        self.pending = pending


class Sampled(NamedTuple):
    """parts: this process's rollouts for each mini-batch. tally: counts over all that was sampled by all. place: where the stream goes on.
    rounds: of refilling. entropy: per token, of all that was sampled by all, estimated by -log p of the sampled tokens.
    """

    parts: list[list[Record]]
    tally: Tally
    place: int
    rounds: int
    entropy: float


class StepSampler:
    """Samples steps from a stream of prompts."""

    def __init__(
        self,
        engine: Engine,
        tokens: Tokens,
        pool: VerifierPool,
        prompts: Sequence[Record],
        options: TrainOptions,
        ranks: Ranks,
    ) -> None:
        self._engine, self._tokens, self._pool, self._options, self._ranks = engine, tokens, pool, options, ranks
        self._order = PromptOrder(prompts, options.seed)

    def sample(self, place: int, pending: Mapping[int, Record]) -> Sampled:
        """The step that begins at `place` of the stream. pending: rollouts of it that are there already. Raises Stopped.

        CropiError: no response could be verified.
        """
        options = self._options
        own: dict[int, Record] = {}
        kept: list[int] = []
        drawn = rounds = 0
        while True:
            count = self._to_draw(drawn, len(kept))
            found = self._round(self._order.at(place, count), {**pending, **own})
            own.update(found)
            place, drawn = place + count, drawn + count
            mine = [(at, options.dynamic_sampling > 0 and _equal_rewards(record)) for at, record in found.items()]
            told = sorted(pair for told in self._ranks.gather(mine) for pair in told)
            kept += [at for at, dropped in told if not dropped]
            if options.dynamic_sampling == 0 or len(kept) >= options.batch or rounds == options.dynamic_sampling:
                break
            rounds += 1
        counts = of_all_processes(tally(own.values()), self._ranks)
        surprise, tokens = self._ranks.sum(_surprise(own.values()))
        if counts.lost == counts.samples:
            raise CropiError(
                f"the verifier gave no answer on any of {counts.samples} responses (it died, or took longer than --verify-seconds "
                f"{self._pool.seconds:g}); fix it"
            )
        size = options.minibatch or options.batch
        kept = kept[: options.batch]
        parts = [kept[start : start + size] for start in range(0, len(kept), size)]
        return Sampled(
            [[own[at] for at in part if at in own] for part in parts],
            counts,
            place,
            rounds,
            surprise / max(tokens, 1.0),
        )

    def _to_draw(self, drawn: int, kept: int) -> int:
        """Prompts of the next round: the missing ones, and more by the share that was dropped so far."""
        missing = self._options.batch - kept
        if not kept:
            return missing
        return min(math.ceil(missing * drawn / kept), self._options.batch)

    def _round(self, drawn: Sequence[tuple[int, Record]], known: Mapping[int, Record]) -> dict[int, Record]:
        """This process's rollouts of the prompts drawn, by place."""
        options = self._options
        own = [pair for number, pair in enumerate(drawn) if number % self._ranks.size == self._ranks.rank]
        # chunks are formed before what is known is left out, so that each is decoded with the same neighbors as without a stop
        groups = [group for group in chunks(own, options.samples) if any(at not in known for at, _ in group)]
        found = {at: known[at] for at, _ in own if at in known}
        places = iter([at for group in groups for at, _ in group])
        sampled = sample_groups(self._engine, self._tokens, self._pool, self._tasks(groups), options.sampling)
        for rows in sampled:
            found.update({next(places): row.record for row in rows})
        if self._ranks.any(runtime.stop_requested()):
            everyone = self._ranks.gather({**known, **found})
            raise Stopped({at: record for part in everyone for at, record in sorted(part.items())})
        return found

    def _tasks(self, groups: Sequence[Sequence[tuple[int, Record]]]) -> Iterator[list[SamplingTask]]:
        seed, samples = self._options.seed, self._options.samples
        for group in groups:
            yield [SamplingTask(record, (seed, "train", at, record["id"]), samples) for at, record in group]


def _surprise(records: Iterable[Record]) -> list[float]:
    """The sum of -log p over the sampled tokens, p at the sampling temperature, and how many there are. Its expectation is the sum of the
    entropies of the distributions that they were drawn from, so that entropy is known where nothing goes through the policy.
    """
    known = [sample["logprobs"] for record in records for sample in record["samples"] if sample["logprobs"] is not None]
    return [-math.fsum(value for values in known for value in values), float(sum(map(len, known)))]


def _equal_rewards(record: Record) -> bool:
    return len({sample["reward"] for sample in record["samples"]}) == 1
