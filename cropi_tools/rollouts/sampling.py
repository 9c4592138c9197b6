"""From prompts to rollout records: requests to an engine, texts from its tokens, grades from the verifiers."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record, float32_text
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling, sample_seed
from cropi_tools.policy.prompts import encoded_prompt
from cropi_tools.policy.tokens import Tokens
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rewards.reasoning import MARKERS
from cropi_tools.rollouts.grading import CHUNK_RESPONSES, Row, graded_rows, reasoning_mark
from cropi_tools.runtime.clock import starting
from cropi_tools.runtime.errors import Interrupted

SECONDS_BETWEEN_LOOKS = 0.02
GROUPS_AHEAD = 4  # sampled groups that may wait for their grades: a hung verifier must not stop the engine at once, nor memory grow

T = TypeVar("T")


class SamplingTask(NamedTuple):
    """A prompt to sample: its record, and what the seeds of its samples are made of, such as (run seed, prompt id).

    key None: the record is a rollout already and is passed on as it is. samples: how many. prompt_token_ids: where they are known, as in a
    rollout.
    """

    record: Record
    key: tuple[str | int, ...] | None
    samples: int
    prompt_token_ids: list[int] | None = None


def chunks(records: Iterable[T], samples: int) -> Iterator[list[T]]:
    """Prompts in groups of about CHUNK_RESPONSES responses."""
    size = max(1, CHUNK_RESPONSES // samples)
    group: list[T] = []
    for record in records:
        group.append(record)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def sample_groups(
    engine: Engine,
    tokens: Tokens,
    pool: VerifierPool,
    groups: Iterable[Sequence[SamplingTask]],
    sampling: Sampling,
) -> Generator[list[Row], None, None]:
    """The rollout records of each group, in order; verifiers work while the engine continues.

    Each is its prompt's record with `prompt_token_ids` and `samples`: token_ids, logprobs (None when greedy), text (without end and special
    tokens), finish_reason, reward, outcome.

    When a signal asks to stop, the group in hand and what is already sampled are still given; then the iterator ends early. When the engine
    fails, what is already sampled is given before its error is raised.
    """
    begun: deque[list[SamplingTask]] = deque()

    def requests() -> Iterator[list[Request]]:
        for tasks in groups:
            group = _encoded(tokens, tasks)
            begun.append(group)
            yield _requests(group)

    answers = engine.stream(requests(), sampling)
    waiting: deque[Future[list[Row]]] = deque()
    failure: Exception | None = None
    verifying = ThreadPoolExecutor(1, "verify")
    try:
        while True:
            try:
                completions = next(answers)
            except (StopIteration, Interrupted):
                break
            except Exception as error:
                failure = error
                break
            rows = _rows(tokens, begun.popleft(), completions)
            waiting.append(verifying.submit(graded_rows, pool, rows))
            while waiting and (waiting[0].done() or len(waiting) > GROUPS_AHEAD):
                yield _graded(waiting.popleft(), pool)
            if runtime.stop_requested():
                break
        while waiting:
            yield _graded(waiting.popleft(), pool)
        if failure is not None:
            raise failure
    except BaseException:
        pool.cancel()
        raise
    finally:
        verifying.shutdown(wait=True, cancel_futures=True)


def _graded(group: Future[list[Row]], pool: VerifierPool) -> list[Row]:
    """The group when it is graded. To wait for the first verifier to load, with nothing left to sample, is no work."""
    while not group.done():
        loading = isinstance(pool, VerifierPool) and pool.starts  # a stand-in for the pool has nothing to load
        with starting() if loading else nullcontext():
            wait([group], SECONDS_BETWEEN_LOOKS)
    return group.result()


def _encoded(tokens: Tokens, tasks: Sequence[SamplingTask]) -> list[SamplingTask]:
    """The tasks with their prompts' token ids."""
    return [
        task
        if task.key is None or task.prompt_token_ids is not None
        else task._replace(prompt_token_ids=encoded_prompt(tokens, task.record))
        for task in tasks
    ]


def _requests(group: Sequence[SamplingTask]) -> list[Request]:
    return [
        Request(task.prompt_token_ids, sample_seed(*task.key, k))
        for task in group
        if task.key is not None and task.prompt_token_ids is not None
        for k in range(task.samples)
    ]


def _rows(tokens: Tokens, group: Sequence[SamplingTask], completions: Sequence[Completion]) -> list[Row]:
    """Rollout records; those made now have no grades yet."""
    found: list[Row] = []
    own = iter(completions)
    silent = silent_token_ids(tokens)
    for task in group:
        if task.key is None:
            found.append(Row(task.record, sampled=False))
            continue
        assert task.prompt_token_ids is not None
        record = {
            **task.record,
            "prompt_token_ids": task.prompt_token_ids,
            **reasoning_mark(tokens.tokenizer, task.prompt_token_ids),
            "samples": [_sample(tokens, next(own), silent) for _ in range(task.samples)],
        }
        found.append(Row(record, sampled=True))
    return found


def _sample(tokens: Tokens, completion: Completion, silent: frozenset[int]) -> Record:
    token_ids, logprobs, finish_reason = completion
    return {
        "token_ids": token_ids,
        "logprobs": None if logprobs is None else [float32_text(value) for value in logprobs],
        "text": tokens.tokenizer.decode([token for token in token_ids if token not in silent]),
        "finish_reason": finish_reason,
    }


def silent_token_ids(tokens: Tokens) -> frozenset[int]:
    """Tokens that are no part of a response's text: those that end it and special ones, but not those that mark a model's reasoning."""
    marks = [mark for pair in MARKERS.items() for mark in pair]
    special = {
        token_id
        for token_id, token in tokens.tokenizer.added_tokens_decoder.items()
        if token.special and not any(token.content in mark for mark in marks)
    }
    return frozenset(special | set(tokens.end_token_ids))
