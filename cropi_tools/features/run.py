"""The work of cropi-embed: one forward pass over each prompt, without a response.

Features are the hidden states before the output embedding, twice: their mean over the prompt's tokens, and that of the last token, from
which the policy begins its response.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cropi_tools import runtime
from cropi_tools.data.features import as_rows, header
from cropi_tools.data.jsonl_output import open_cut
from cropi_tools.data.metadata import COUNT
from cropi_tools.data.output import Output
from cropi_tools.data.policies import tokenizer_digest
from cropi_tools.data.records import read_prompts, shard_range
from cropi_tools.features.options import EmbedOptions
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.policy.logprobs import sequence_batch, token_limited
from cropi_tools.policy.prompts import check_room, encoded_prompt
from cropi_tools.policy.rotary_lengths import pass_lengths
from cropi_tools.runtime.errors import InputError

POOLING = "mean and last token"
PROMPTS_TOGETHER = 256  # passes are made of so many prompts, sorted by length, and rows committed after them


def embed(options: EmbedOptions, policy_digest: str, target: Output) -> int:
    """Fill the opened output. Returns the number of prompts. InputError: a prompt that the policy cannot take, or states that are not finite."""
    ids = [record["id"] for record in read_prompts(options.prompts)]
    start, stop = shard_range(len(ids), *options.shard)
    policy = load_policy(options.model, options.device, options.dtype, options.date)
    saved = target.resumed({"rows": COUNT, "bytes": COUNT, "counters": {"tokens": COUNT}})
    done: int = saved.get("rows", 0)
    tokens: int = saved.get("counters", {"tokens": 0})["tokens"]
    facts = {"policy": policy_digest, "pooling": POOLING}
    with open_cut(target.part, saved.get("bytes", 0), target.part, binary=True) as stream:
        target.begin_work()
        runtime.keeps_of(done, stop - start, "prompts")
        with runtime.progress("prompts", stop - start, done) as shown:
            records = islice(read_prompts(options.prompts), start + done, stop)
            while some := list(islice(records, PROMPTS_TOGETHER)):
                encoded = [encoded_prompt(policy.tokens, record) for record in some]
                for record, prompt in zip(some, encoded, strict=True):
                    check_room(policy.tokens, record["id"], len(prompt), 0)
                tokens += sum(map(len, encoded))
                rows = hidden_states(policy, encoded, options.tokens_per_pass)
                for record, row in zip(some, rows, strict=True):
                    if not np.isfinite(row).all():
                        raise InputError(
                            f"prompt '{record['id']}': the policy's hidden states are not finite; try --dtype float32"
                        )
                if not stream.tell():
                    stream.write(header(ids[start:stop], rows.shape[1], facts))
                stream.write(as_rows(rows))
                done += len(some)
                stream.flush()
                os.fsync(stream.fileno())
                target.commit({"rows": done, "bytes": stream.tell(), "counters": {"tokens": tokens}})
                runtime.keeps_of(done, stop - start, "prompts")
                shown.advance(len(some))
                runtime.stop_if_requested()
    described = {**facts, "tokenizer": tokenizer_digest(options.model)}
    target.finish(rows=done, ledger={"tokens_scored": tokens, "device": str(policy.device)}, facts=described)
    return done


def hidden_states(policy: Policy, prompts: Sequence[list[int]], limit: int) -> NDArray[np.float32]:
    """The features of prompts (token ids), float32 [n, 2 x hidden width]: mean over tokens, then last token.

    limit: tokens of a pass, padding included.
    """
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    with torch.no_grad():
        for some in _passes(policy.model, [prompts[place] for place in order], limit):
            places = [order[number] for number in some]
            batch = sequence_batch([(prompts[place], []) for place in places], policy.device)
            states = last_hidden_states(policy.model, batch.input_ids).float()
            for place, row in zip(places, states, strict=True):
                # what is to the right of a prompt is padding, which no token of it sees
                own = row[: len(prompts[place])]
                found[place] = torch.cat([own.mean(0), own[-1]]).cpu()
    return torch.stack([found[place] for place in range(len(prompts))]).numpy()


def last_hidden_states(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [rows, tokens, width] before the output embedding. InputError: the model does not show them."""
    states = getattr(model.base_model(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if states is None:
        shown = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
        if not shown:
            raise InputError(f"{type(model).__name__} does not show its hidden states; take features from elsewhere")
        states = shown[-1]
    return states


def _passes(model: Any, prompts: Sequence[list[int]], limit: int) -> Iterator[range]:
    """Prompts sorted by length, as ranges that go through the model together."""
    pairs: list[tuple[list[int], list[int]]] = [(prompt, []) for prompt in prompts]
    for some in pass_lengths(model).ranges([len(prompt) for prompt in prompts]):
        for part in token_limited([pairs[number] for number in some], limit):
            yield range(some.start + part.start, some.start + part.stop)
