"""Log-probabilities of given responses under a policy, with the graph for their gradient.

Sequences are laid out without padding (`packing.py`) where the model allows it, or as rows, padded on the right only, without an
attention mask: in a causal model no real token sees a token to its right, so lengths alone decide what counts, and the end token can
never be confused with padding. Logits are formed for response tokens only, in float32, in chunks that are recomputed in the backward
pass: never the whole [tokens, vocabulary] matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import checkpoint

from cropi_tools.policy.packing import PackedBatch, packed_batch, packs, unpacked
from cropi_tools.policy.rotary_lengths import pass_lengths
from cropi_tools.runtime.clock import starting

SHARED = "shared_logprobs"  # a model that processes share has `chunked_logprobs` as a method of this name
CHUNK_ELEMENTS = 1 << 26  # logits held at once: 256 MiB of float32
_plain_heads: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class SequenceBatch(NamedTuple):
    """Prompts with their responses as rows of one forward pass.

    input_ids [rows, longest]; positions: for every response token in order, (row, column) of the token BEFORE it, which predicts it;
    targets [tokens]: the response tokens themselves; lengths: response tokens of each row.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]

    def forward(self, module: Any) -> Any:
        """The output of the model, or of its body, on the rows."""
        return module(input_ids=self.input_ids, use_cache=False)

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Of states [rows, longest, width] those that predict response tokens, [tokens, width]."""
        return states[self.rows, self.columns]


def sequence_batch(sequences: Sequence[tuple[list[int], list[int]]], device: torch.device | str) -> SequenceBatch:
    """Lay out (prompt ids, response ids) pairs. Prompts must have a token; responses may be empty."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for row, (prompt, response) in enumerate(sequences):
        input_ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        rows += [row] * len(response)
        columns += range(len(prompt) - 1, len(prompt) + len(response) - 1)
        targets += response
        lengths.append(len(response))
    index = torch.tensor([rows, columns, targets], dtype=torch.long).reshape(3, -1).to(device)
    return SequenceBatch(input_ids.to(device), index[0], index[1], index[2], lengths)


def lay_out(
    models: Sequence[Any], prompts: Sequence[tuple[list[int], Sequence[list[int]]]], device: torch.device | str
) -> SequenceBatch | PackedBatch:
    """Prompts with their responses as one pass through each of the models: packed where they all allow it, else as padded rows.

    The sequences must be of one regime of the models' (`lengths.py`).
    """
    pairs = [(prompt, response) for prompt, responses in prompts for response in responses]
    if packs(models, (len(prompt) + len(response) for prompt, response in pairs)):
        return packed_batch(prompts, device)
    return sequence_batch(pairs, device)


def response_logprobs(
    model: Any,
    batch: SequenceBatch | PackedBatch,
    temperature: float = 1.0,
    entropy: Literal["no", "value", "gradient"] = "no",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probabilities [tokens] of the response tokens under softmax(logits / temperature), and the entropies [tokens] there.

    Differentiable in the model's parameters; the entropies are so only for `gradient`, and are zeros for `no`. A packed batch needs
    `packing.packed` around this call, and around the backward pass where activations are recomputed.
    """
    shared = getattr(model, SHARED, None)
    return shared(batch, temperature, entropy) if shared else chunked_logprobs(model, batch, temperature, entropy)


def chunked_logprobs(
    model: Any, batch: SequenceBatch | PackedBatch, temperature: float, entropy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`response_logprobs` of a model whose parameters are all here."""
    pass_lengths(model)  # from now on at the latest no pass depends on those before it
    if not has_plain_head(model):
        # take the logits from the model's own forward pass: chunking is not possible from outside
        return _from_logits(batch.select(batch.forward(model).logits), batch.targets, temperature, entropy)
    hidden = batch.select(batch.forward(model.base_model).last_hidden_state)
    head = model.get_output_embeddings()
    size = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    pieces = list(zip(hidden.split(size), batch.targets.split(size), strict=True))

    def chunk(states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _from_logits(head(states), targets, temperature, entropy)

    if len(pieces) == 1 or not torch.is_grad_enabled():
        results = [chunk(states, targets) for states, targets in pieces]
    else:
        results = [checkpoint(chunk, states, targets, use_reentrant=False) for states, targets in pieces]
    logprobs = torch.cat([result[0] for result in results])
    return logprobs, torch.cat([result[1] for result in results])


def has_plain_head(model: Any) -> bool:
    """Whether the logits are the output embedding applied to the last hidden states and nothing else: no soft cap, scale or projection.

    Families do this under many names, so it is tried out on a few tokens, once a model.
    """
    if model not in _plain_heads:
        ids = (
            torch.arange(8, device=next(model.parameters()).device)[None] % model.get_input_embeddings().num_embeddings
        )
        with starting(), torch.no_grad(), unpacked(model):
            states = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
            head = model.get_output_embeddings()
            # some models have no body of their own, or a projection between it and the head
            plain = None if states is None or states.shape[-1] != head.weight.shape[-1] else head(states)
            _plain_heads[model] = plain is not None and torch.equal(plain, model(input_ids=ids, use_cache=False).logits)
    return _plain_heads[model]


def _from_logits(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = at_least_float32(logits)
    logits = logits / temperature if temperature != 1.0 else logits
    normalizer = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, targets[:, None])[:, 0] - normalizer
    if entropy == "no":
        return chosen, torch.zeros_like(normalizer)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
        return chosen, normalizer - (torch.softmax(logits, -1) * logits).sum(-1)


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Float64 as it is, all else as float32: what sums and exponentials are computed in."""
    return values if values.dtype == torch.float64 else values.float()


def separate_logprobs(
    model: Any, sequences: Sequence[tuple[list[int], list[int]]], temperature: float, limit: int | None = None
) -> torch.Tensor:
    """Log-probabilities [tokens] of responses to prompts, (prompt ids, response ids), of any lengths; without a graph.

    limit: tokens of a pass, padding included; None: as many as there are.
    """
    device = next(model.parameters()).device
    rule = pass_lengths(model)
    found = []
    with torch.no_grad():
        for rows in rule.ranges([len(prompt) + len(response) for prompt, response in sequences]):
            some = [sequences[row] for row in rows]
            parts = [range(len(some))] if limit is None else token_limited(some, limit)
            for part in parts:
                batch = sequence_batch([some[row] for row in part], device)
                found.append(response_logprobs(model, batch, temperature)[0])
    return torch.cat(found)


def token_limited(sequences: Sequence[tuple[list[int], list[int]]], limit: int) -> Iterator[range]:
    """Split rows, in order, into ranges whose padded size (rows x longest) stays within `limit` tokens; one row always fits."""
    start, longest = 0, 0
    for row, (prompt, response) in enumerate(sequences):
        longest = max(longest, len(prompt) + len(response))
        if row > start and longest * (row - start + 1) > limit:
            yield range(start, row)
            start, longest = row, len(prompt) + len(response)
    if start < len(sequences):
        yield range(start, len(sequences))
