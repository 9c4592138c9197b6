"""The records of prompts and rollouts: what a line must hold, checked as it is read.

A record is a plain dictionary, as it stands on its line; commands pass unknown keys through. The checks here turn a missing or
malformed field into one sentence that names the file, the line, the field and the prompt.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cropi_tools.data import fields
from cropi_tools.data.digest_set import Seen
from cropi_tools.data.external_rollouts import FORMS, foreign_form
from cropi_tools.data.fields import check_fields
from cropi_tools.data.jsonl import Record, no_record, read_jsonl, shown
from cropi_tools.data.message_text import ReadAsMessages
from cropi_tools.data.nonfinite import Carried, telling
from cropi_tools.runtime.errors import InputError

STORE_INDEX = "index.jsonl"
"""The lines of a gradient store that say what became of every prompt."""
PROMPT_FIELDS = ("id", "prompt", "answer", "source")
_PROMPT_READ = frozenset({*PROMPT_FIELDS, "verifier", "chat_template_kwargs"})
_ROLLOUT_READ = frozenset({*_PROMPT_READ, "prompt_token_ids"})
_SCORE_READ = frozenset({"id", "source", "scores", "pass_rate", "status"})
_SAMPLE_FIELDS = frozenset({"token_ids", "logprobs", "reward"})
ROLLOUT_FIELDS = ("prompt_token_ids", "samples", "reasoning_open", "sampled_by")
"""What sampling adds to a prompt's record."""
RESERVED_KWARGS = frozenset(
    {
        "conversation",
        "strftime_now",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
    }
    | {"chat_template", "padding", "truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""What `chat_template_kwargs` cannot set: how the commands call the chat template."""


Outcome = Literal["correct", "partial", "wrong", "unparsed", "timeout", "error"]
"""What became of a sample's answer."""


def outcome_of_score(score: float) -> Outcome:
    """The outcome of an answer that was read: full credit, some, or none."""
    return "correct" if score >= 1 else "partial" if score > 0 else "wrong"


class Sample(NamedTuple):
    """One response: token ids as sampled (the end token included if it was sampled), its log-probabilities and its reward.

    logprobs are of the distribution sampled from, after temperature; None for rollouts that came as text only.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    reward: float


class Rollout(NamedTuple):
    """The K samples of one prompt, with the record they came from."""

    id: str
    source: str
    prompt_token_ids: list[int]
    samples: list[Sample]
    record: Record

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples]


def read_prompts(paths: Sequence[str | Path]) -> Iterator[Record]:
    """Yield prompt records of all files in order. A text that lists messages is taken for them.

    InputError: a field is missing or of the wrong type, an id comes twice, no record at all.
    """
    for path, number, record in _unique(paths, _PROMPT_READ):
        for field in PROMPT_FIELDS:
            if field not in record:
                raise InputError(
                    f"{shown(path)}:{number}: no field '{field}'; a prompt needs {', '.join(PROMPT_FIELDS)}"
                )
        check_fields(record, fields.PROMPT, f"{shown(path)}:{number}")
        _check_template_kwargs(record.get("chat_template_kwargs"), f"{shown(path)}:{number}")
        yield record


def read_rollouts(
    paths: Sequence[str | Path], vocabulary: int | None = None, positions: int | None = None
) -> Iterator[Rollout]:
    """Yield the rollouts of all files in order. Errors as `read_prompts`.

    vocabulary: token ids must lie below it. positions: the most tokens that a prompt may have with a response.
    """
    for path, number, record in _unique(paths, _ROLLOUT_READ, _refuse_foreign):
        rollout = rollout_of(record, f"{shown(path)}:{number}", vocabulary)
        longest = len(rollout.prompt_token_ids) + max(len(sample.token_ids) for sample in rollout.samples)
        if positions is not None and longest > positions:
            raise InputError(
                f"{shown(path)}:{number}: prompt '{record['id']}' has {longest} tokens with its longest response, the policy has only "
                f"{positions} positions; sample with a lower --max-tokens, or leave the prompt out"
            )
        yield rollout


def rollout_of(record: Record, where: str, vocabulary: int | None = None) -> Rollout:
    """A rollout's record with its samples, checked. InputError as `read_rollouts`."""
    for field in ("id", "source", "prompt_token_ids", "samples"):
        if field not in record:
            raise InputError(f"{where}: no field '{field}'; expected the output of cropi-rollout")
    check_fields(record, fields.ROLLOUT, where)
    prompt_ids = record["prompt_token_ids"]
    if not prompt_ids:
        raise InputError(f"{where}: 'prompt_token_ids' is empty")
    _check_vocabulary(prompt_ids, f"{where}: 'prompt_token_ids'", vocabulary)
    samples = [_sample(sample, f"{where}: sample {k}", vocabulary) for k, sample in enumerate(record["samples"])]
    return Rollout(record["id"], record["source"], prompt_ids, samples, record)


def read_scores(paths: Sequence[str | Path]) -> Iterator[Record]:
    """Yield score records (id, source, scores or null, pass_rate, status) of all files in order. Errors as `read_prompts`."""
    for path, number, record in _unique(paths, _SCORE_READ):
        check_score(record, f"{shown(path)}:{number}", "the output of cropi-score")
        yield record


def check_score(record: Record, where: str, expected: str) -> None:
    """InputError: a record is no score. expected: what it should be, for the message."""
    for field in ("source", "scores", "pass_rate", "status"):
        if field not in record:
            raise InputError(f"{where}: no field '{field}'; expected {expected}")
    check_fields(record, fields.SCORES, where)


def _check_template_kwargs(value: Any, where: str) -> None:
    for name in sorted(RESERVED_KWARGS & (value or {}).keys()):
        raise InputError(f"{where}: 'chat_template_kwargs' sets {name}, which the commands set themselves; remove it")


def _refuse_foreign(record: Record, where: str) -> None:
    form = foreign_form(record)
    if form != "ours":
        raise InputError(
            f"{where}: {FORMS[form]}, text without tokens; cropi-verify FILE --model FOLDER makes our rollouts of it"
        )


def _sample(value: Any, where: str, vocabulary: int | None) -> Sample:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object")
    for field in ("token_ids", "reward"):
        if field not in value:
            raise InputError(f"{where}: no field '{field}'")
    check_fields(value, fields.SAMPLE, where)
    token_ids, logprobs = value["token_ids"], value.get("logprobs")
    _check_vocabulary(token_ids, f"{where}: 'token_ids'", vocabulary)
    if logprobs is not None:
        if not isinstance(logprobs, list) or len(logprobs) != len(token_ids):
            raise InputError(f"{where}: 'logprobs' must have one number for each of the {len(token_ids)} tokens")
        if not fields.LOGPROBS.holds(logprobs):
            raise InputError(f"{where}: 'logprobs' holds something that is not {fields.LOGPROBS.words}")
    return Sample(token_ids, logprobs, float(value["reward"]))


def _check_vocabulary(token_ids: list[int], where: str, vocabulary: int | None) -> None:
    if vocabulary is not None and token_ids and max(token_ids) >= vocabulary:
        raise InputError(
            f"{where} holds token {max(token_ids)}, the policy has only {vocabulary}; rollouts of another tokenizer?"
        )


def prompt_of(record: Record) -> Record:
    """The prompt's own record in a rollout's."""
    return {key: value for key, value in record.items() if key not in ROLLOUT_FIELDS}


def _unique(
    paths: Sequence[str | Path], read: frozenset[str], check: Callable[[Record, str], None] | None = None
) -> Iterator[tuple[str | Path, int, Record]]:
    """Records of all files with their place; every id is text and comes once, and there is at least one record: a file alone may be an
    empty shard. `read`: fields whose numbers must be finite; elsewhere null takes their place. `check` looks at each record first."""
    seen = Seen()
    empty = True
    for path in paths:
        carried, as_messages = Carried(), ReadAsMessages()
        with telling(shown(path), carried, as_messages):
            for number, given in read_jsonl(path):
                empty = False
                record = _finite(given, read, carried, f"{shown(path)}:{number}")
                if "prompt" in record and (prompt := as_messages(record["prompt"])) is not record["prompt"]:
                    record = {**record, "prompt": prompt}
                identity = record.get("id")
                if check is not None:
                    check(record, f"{shown(path)}:{number}")
                if not isinstance(identity, str) or not identity:
                    raise InputError(f"{shown(path)}:{number}: no 'id' (text) in the record")
                if not seen.add(identity):
                    raise InputError(f"{shown(path)}:{number}: id '{identity}' comes twice; ids must be unique")
                yield path, number, record
    if empty:
        raise no_record(paths)


def _finite(record: Record, read: frozenset[str], carried: Carried, where: str) -> Record:
    """The record with null for numbers that are not finite and that nobody reads."""
    found = carried.record(record, where, read, {"samples"})
    samples = record.get("samples")
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        return found
    cleaned = [carried.record(sample, where, (), _SAMPLE_FIELDS, "samples.") for sample in samples]
    return found if all(map(operator.is_, cleaned, samples)) else {**found, "samples": cleaned}


def shard_range(count: int, index: int, shards: int) -> tuple[int, int]:
    """The records [start, stop) of shard `index` of `shards` (from 1): contiguous, so that shards one after another are the whole."""
    return (index - 1) * count // shards, index * count // shards


def pass_rate(rewards: Iterable[float]) -> float:
    """The share of samples with full reward (1)."""
    values = list(rewards)
    return sum(reward >= 1.0 for reward in values) / len(values)
