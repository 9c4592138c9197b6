"""Sample and verify: what cropi-rollout writes, cropi-train learns from and evaluation counts.

A sample's seed follows from (run seed, prompt id, sample number), so it depends on neither batch, shard, order nor resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cropi_tools.data.jsonl import Record, float32_text
from cropi_tools.engines.protocol import Engine, Request, Sampling, sample_seed
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.rewards.pool import VerifierPool

CHUNK_RESPONSES = 256  # responses between two commits; fixed, so that a resumed file has the bytes of an unbroken one


def chunks(records: Iterator[Record], samples: int) -> Iterator[list[Record]]:
    """Prompts in groups of about CHUNK_RESPONSES responses."""
    size = max(1, CHUNK_RESPONSES // samples)
    group: list[Record] = []
    for record in records:
        group.append(record)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def sample_and_verify(
    engine: Engine,
    policy: Policy,
    pool: VerifierPool,
    prompts: Sequence[Record],
    samples: int,
    sampling: Sampling,
    keys: Sequence[tuple[str | int, ...]],
) -> list[Record]:
    """Rollout records of `prompts`, in order: each prompt's record with `prompt_token_ids` and its `samples`.

    keys: what the seeds of each prompt's samples are made of, with the sample's number; such as (run seed, prompt id).
    A sample: token_ids, logprobs (None when greedy), text (without end and special tokens), finish_reason, reward, outcome.
    """
    ids = [prompt_token_ids(policy.tokenizer, record) for record in prompts]
    requests = [
        Request(tokens, sample_seed(*key, k)) for key, tokens in zip(keys, ids, strict=True) for k in range(samples)
    ]
    completions = engine.sample(requests, sampling)
    ends = set(policy.end_token_ids)
    texts = [
        policy.tokenizer.decode([token for token in found.token_ids if token not in ends], skip_special_tokens=True)
        for found in completions
    ]
    owners = [record for record in prompts for _ in range(samples)]
    grades = pool.grade_many(list(zip(owners, texts, strict=True)))
    rows: list[Record] = []
    for place, (record, tokens) in enumerate(zip(prompts, ids, strict=True)):
        own = range(place * samples, (place + 1) * samples)
        rows.append(
            {
                **record,
                "prompt_token_ids": tokens,
                "samples": [
                    {
                        "token_ids": completions[i].token_ids,
                        "logprobs": None
                        if (values := completions[i].logprobs) is None
                        else [float32_text(value) for value in values],
                        "text": texts[i],
                        "finish_reason": completions[i].finish_reason,
                        "reward": grades[i].reward,
                        "outcome": grades[i].outcome,
                    }
                    for i in own
                ],
            }
        )
    return rows


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


@dataclass
class Tally:
    """Counts over the prompts of one source, added up as rollouts come; kept in the commit, so that a resumed run counts all."""

    prompts: int = 0
    samples: int = 0
    reward: float = 0.0
    correct: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    truncated: int = 0
    equal_rewards: int = 0
    pass_at: list[float] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one rollout record."""
        samples = row["samples"]
        correct = sum(sample["outcome"] == "correct" for sample in samples)
        if not self.pass_at:
            self.pass_at = [0.0] * len(samples)
        self.prompts += 1
        self.samples += len(samples)
        self.reward += math.fsum(sample["reward"] for sample in samples)
        self.correct += correct
        self.tokens += sum(len(sample["token_ids"]) for sample in samples)
        self.prompt_tokens += len(row["prompt_token_ids"])
        self.truncated += sum(sample["finish_reason"] == "length" for sample in samples)
        self.equal_rewards += len({sample["reward"] for sample in samples}) == 1
        for k in range(1, len(samples) + 1):
            self.pass_at[k - 1] += pass_at_k(len(samples), correct, k)
        for sample in samples:
            self.outcomes[sample["outcome"]] = self.outcomes.get(sample["outcome"], 0) + 1

    def summary(self) -> dict[str, Any]:
        """Accuracy (share of correct samples), pass@k for k = 1, 2, 4, ... and all, mean length, truncated share."""
        wanted = sorted(
            {1 << i for i in range(len(self.pass_at).bit_length()) if 1 << i <= len(self.pass_at)} | {len(self.pass_at)}
        )
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "accuracy": self.correct / self.samples,
            "mean_reward": self.reward / self.samples,
            "pass_at": {str(k): self.pass_at[k - 1] / self.prompts for k in wanted},
            "response_tokens": self.tokens / self.samples,
            "truncated_fraction": self.truncated / self.samples,
            "equal_rewards_fraction": self.equal_rewards / self.prompts,
            "outcomes": dict(sorted(self.outcomes.items())),
        }


class Tallies:
    """A `Tally` a source, and one over all."""

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self._by_source = {name: Tally(**value) for name, value in (saved or {}).items()}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._by_source.setdefault(row["source"], Tally()).add(row)

    def saved(self) -> dict[str, Any]:
        return {name: asdict(tally) for name, tally in self._by_source.items()}

    def total(self) -> Tally:
        """All sources together."""
        whole = Tally()
        for tally in self._by_source.values():
            for name, value in asdict(tally).items():
                mine = getattr(whole, name)
                if name == "pass_at":
                    whole.pass_at = [a + b for a, b in zip(mine or [0.0] * len(value), value, strict=True)]
                elif name == "outcomes":
                    whole.outcomes = {key: mine.get(key, 0) + value.get(key, 0) for key in mine.keys() | value.keys()}
                else:
                    setattr(whole, name, mine + value)
        return whole

    def summary(self) -> dict[str, Any]:
        """The summary of everything, and of each source under `by_source`."""
        return {
            **self.total().summary(),
            "by_source": {name: tally.summary() for name, tally in sorted(self._by_source.items())},
        }
