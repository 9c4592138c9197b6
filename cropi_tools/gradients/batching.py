"""What cropi-grad has to do: which prompts, and in which batches.

A batch is decided by the prompts alone, from the start of the work or from a place where the work before was committed, so that an
interrupted command resumes with the same batches, and the output is byte-identical.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from cropi_tools.data.records import Rollout, read_rollouts, shard_range
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.runtime.errors import InputError

PROMPTS_TOGETHER = 1024  # those without a gradient cost nothing, but what is found must be committed now and then

Room = Callable[[Sequence[GradientTask], GradientTask], bool]


class Work(NamedTuple):
    """The prompts [start, stop) of the rollouts files with the first `samples` of each, and how many of them have a gradient."""

    paths: Sequence[str]
    vocabulary: int
    start: int
    stop: int
    live: int
    samples: int | None
    positions: int | None = None

    def rollouts(self, done: int = 0) -> Iterator[Rollout]:
        """The prompts of this shard in file order, without the first `done`."""
        for rollout in islice(read_rollouts(self.paths, self.vocabulary, self.positions), self.start + done, self.stop):
            yield rollout._replace(samples=rollout.samples[: self.samples])

    @property
    def prompts(self) -> int:
        return self.stop - self.start


class Batch(NamedTuple):
    """Prompts in file order, each with its task or the reason why it has none."""

    prompts: list[tuple[Rollout, GradientTask | str]]

    @property
    def tasks(self) -> list[GradientTask]:
        return [task for _, task in self.prompts if isinstance(task, GradientTask)]


def survey(
    paths: Sequence[str],
    vocabulary: int,
    settings: GradientSettings,
    shard: tuple[int, int] = (1, 1),
    limit: int | None = None,
    samples: int | None = None,
    behavior: str | None = None,
    positions: int | None = None,
) -> Work:
    """Read and check all rollouts once, before any model work: a bad line at the end of a long job's input is found at once.

    shard: (i, n), 1-based; limit: use the first prompts only, before they are divided into shards; samples: use the first of each prompt.
    behavior: digest of the policy that will recompute the behavior policy's log-probabilities. InputError: prompts were sampled by another,
    or by several. positions: the most tokens that the policy can take.
    """
    everything = Work(paths, vocabulary, 0, sys.maxsize, 0, samples, positions)
    live: list[bool] = []
    origin: str | None = None  # of the first prompt: None, as for all that were not sampled again
    for rollout in everything.rollouts():
        sampled_by = rollout.record.get("sampled_by")
        origin = origin if live else sampled_by
        if behavior is not None and (sampled_by != origin or sampled_by not in (None, behavior)):
            raise InputError(
                f"prompt '{rollout.id}': these rollouts are of several policies, or of another than that of --behavior; leave --behavior out, "
                "the log-probabilities of those who sampled are recorded"
            )
        live.append(isinstance(prepare(rollout, settings), GradientTask))
    live = live[:limit]
    start, stop = shard_range(len(live), *shard)
    return everything._replace(start=start, stop=stop, live=sum(live[start:stop]))


def batches(rollouts: Iterator[Rollout], settings: GradientSettings, room: Room) -> Iterator[Batch]:
    """The prompts in batches; room(tasks, task): whether one more task fits."""
    found: list[tuple[Rollout, GradientTask | str]] = []
    tasks: list[GradientTask] = []
    for rollout in rollouts:
        task = prepare(rollout, settings)
        if found and ((isinstance(task, GradientTask) and not room(tasks, task)) or len(found) == PROMPTS_TOGETHER):
            yield Batch(found)
            found, tasks = [], []
        found.append((rollout, task))
        if isinstance(task, GradientTask):
            tasks.append(task)
    if found:
        yield Batch(found)
