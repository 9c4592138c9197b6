"""Sampling by the library's own `generate`, or by forward passes alone, for any Hugging Face causal language model.

The library samples a whole batch from one generator, so that a response would depend on its neighbors. Here every response brings
its own uniform numbers: a logits processor picks the token by inverting the cumulative distribution at the sample's number for that
position, notes its log-probability, and leaves `generate` only that token to choose. One number a token, whatever the batch.

Not every model can take a batch of unequal prompts, padded on the left (padding enters a recurrent state, or shifts positions), or a cache
(in some families it continues with something other than what a plain forward pass computes). Both are tried out against plain passes over
each sequence, once a model, and given up where they differ.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cropi_tools import runtime
from cropi_tools.engines.next_token import choose, uniforms
from cropi_tools.engines.protocol import scores_not_finite
from cropi_tools.engines.trial import SAMPLING, Decoded, trial_error
from cropi_tools.policy.logprobs import CHUNK_ELEMENTS, has_plain_head
from cropi_tools.policy.packing import can_pack
from cropi_tools.policy.trials import MODEL_ERRORS, lowered_limits, rounding
from cropi_tools.runtime.errors import InputError

ROWS = 256  # responses decoded together; part of no result beyond float rounding
PASS_TOKENS = 1 << 14  # of a pass over whole sequences, where nothing is cached
# What else could bend a distribution, switched off. `generate` is told one by one: what is left unset it takes from the model's own settings.
# Those of the second kind act only where the library draws tokens, which it never does here.
SWITCHED_OFF = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "num_beams": 1}
NEVER_ON = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}
_FINE = 1e-5  # of log-probabilities in float32: no more than rounding
_FINE_NOISE = 10  # a cache rounds elsewhere than a plain pass; a wrong one is further off, if little, and grows with length (Nemotron-H)
_NOT_CAUSAL = 0.05  # nats in float32: more than rounding, between a pass over a prefix and one over the whole
_ways: WeakKeyDictionary[Any, Way] = WeakKeyDictionary()


class Row(NamedTuple):
    """A response in hand: the tokens that its next one follows, prompt included; its seed; how many tokens were drawn before."""

    token_ids: list[int]
    seed: int
    drawn: int = 0


class Way(NamedTuple):
    """How a model is sampled from. padded: prompts of unequal lengths together, padded on the left; cached: keys, values and states are kept.

    name: as the manifest tells it.
    """

    name: str
    padded: bool
    cached: bool


GENERATE = Way("generate", True, True)
EQUAL_LENGTHS = Way("generate, equal lengths", False, True)
WITHOUT_CACHE = Way("without cache", False, False)


def way_to_sample(model: Any, folder: str) -> Way:
    """The fastest way whose log-probabilities are those of plain forward passes; tried out on a few tokens, once a model.

    InputError: the model is not causal, or its scores are not finite.
    """
    if model not in _ways:
        try:
            with lowered_limits(model):
                _ways[model] = _fastest(model, folder)
        except (InputError, *MODEL_ERRORS):
            # some model cannot do with limits as low as that, or chooses its keys there by scores so alike that rounding decides (Doge)
            _ways[model] = _fastest(model, folder)
    return _ways[model]


def _fastest(model: Any, folder: str) -> Way:
    errors: dict[Way, float] = {}

    def error_of(way: Way) -> float:
        errors[way] = trial_error(
            model,
            lambda requests: sample_rows(
                model, way, [Row(*request) for request in requests], SAMPLING.max_tokens, SAMPLING.temperature, []
            ),
            can_pack(model),
        )
        if math.isnan(errors[way]):
            raise scores_not_finite(folder)
        return errors[way]

    kind = next(model.parameters()).dtype
    fine = kind.itemsize >= 4
    for way in (GENERATE, EQUAL_LENGTHS):
        if error_of(way) <= (_FINE if fine else rounding(kind)):
            return way
    # this way is the definition itself: all that it is off by is rounding, which some models magnify
    noise = error_of(WITHOUT_CACHE)
    if (_NOT_CAUSAL if fine else 10 * _NOT_CAUSAL) < noise < math.inf:
        raise InputError(
            f"{folder}: {type(model).__name__} scores a token otherwise once others follow, so it is no causal language model as "
            "configured, and a response has no log-probabilities; take another policy"
        )
    allowed = (_FINE_NOISE if fine else 2) * noise
    return next((way for way in (GENERATE, EQUAL_LENGTHS) if errors[way] <= allowed < math.inf), WITHOUT_CACHE)


@torch.no_grad()
def sample_rows(
    model: Any, way: Way, rows: Sequence[Row], limit: int, temperature: float, end_token_ids: Sequence[int]
) -> Decoded:
    """The next tokens of each row, `limit` at most."""
    shape = len(rows), limit
    tokens = torch.zeros(shape, dtype=torch.long, device=model.device)
    values = torch.zeros(shape, device=model.device)
    sample = _generate if way.cached else _without_cache
    for numbers in _batches(model, way, rows, limit):
        found = sample(model, [rows[number] for number in numbers], limit, temperature, end_token_ids)
        index = torch.tensor(numbers, device=model.device)
        tokens[index, : found.tokens.shape[1]] = found.tokens
        values[index, : found.values.shape[1]] = found.values
    return Decoded(tokens, values)


def _batches(model: Any, way: Way, rows: Sequence[Row], limit: int) -> Iterator[list[int]]:
    """The numbers of rows that are decoded together."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        lengths[0 if way.padded else len(row.token_ids)].append(number)
    for length, numbers in sorted(lengths.items()):
        size = ROWS
        if not way.cached:
            size = min(ROWS, max(1, PASS_TOKENS // (length + limit)))
            if not has_plain_head(model):  # logits of all tokens are formed
                vocabulary = model.get_input_embeddings().num_embeddings
                size = min(size, max(1, CHUNK_ELEMENTS // (vocabulary * (length + limit))))
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


class _OwnUniforms(LogitsProcessor):
    """Chooses each row's next token by its own seed and keeps what was chosen, [rows] a step."""

    def __init__(self, rows: Sequence[Row], temperature: float, ends: torch.Tensor) -> None:
        self._seeds = np.array([row.seed for row in rows], dtype=np.uint64)
        self._drawn = np.array([row.drawn for row in rows])
        self._temperature, self._ends = temperature, ends
        self._going = torch.ones(len(rows), dtype=torch.bool, device=ends.device)  # not ended yet
        self.tokens: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = torch.from_numpy(uniforms(self._seeds, self._drawn + len(self.tokens))).to(scores.device)
        chosen, values = choose(scores, numbers, self._temperature)
        self.tokens.append(chosen)
        self.values.append(values)
        runtime.count_tokens(int(self._going.sum()))
        self._going &= ~torch.isin(chosen, self._ends)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


def _generate(model: Any, rows: Sequence[Row], limit: int, temperature: float, end_token_ids: Sequence[int]) -> Decoded:
    pad = model.generation_config.pad_token_id
    longest = max(len(row.token_ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for place, row in enumerate(rows):
        input_ids[place, longest - len(row.token_ids) :] = torch.tensor(row.token_ids)
        mask[place, longest - len(row.token_ids) :] = 1
    ends = torch.tensor(list(end_token_ids), dtype=torch.long, device=model.device)
    chooser = _OwnUniforms(rows, temperature, ends)
    model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            # left unset it would be the model's own: a row that draws that one would go on with padding
            eos_token_id=list(end_token_ids) or [model.get_input_embeddings().num_embeddings],
            pad_token_id=pad,
            use_cache=True,
            **SWITCHED_OFF,
        ),
        logits_processor=LogitsProcessorList([chooser]),
    )
    return Decoded(torch.stack(chooser.tokens, 1), torch.stack(chooser.values, 1))


def _without_cache(
    model: Any, rows: Sequence[Row], limit: int, temperature: float, end_token_ids: Sequence[int]
) -> Decoded:
    """A pass over all that is known of each row, for every token; rows are of one length, and are left out once they have ended."""
    present = torch.tensor([row.token_ids for row in rows], device=model.device)
    ends = torch.tensor(list(end_token_ids), dtype=torch.long, device=model.device)
    tokens = torch.zeros(len(rows), limit, dtype=torch.long, device=model.device)
    values = torch.zeros(len(rows), limit, device=model.device)
    going = np.arange(len(rows))
    for step in range(limit):
        some = [rows[row] for row in going.tolist()]
        numbers = uniforms(
            np.array([row.seed for row in some], dtype=np.uint64), np.array([row.drawn + step for row in some])
        )
        chosen, found = choose(_last_logits(model, present), torch.from_numpy(numbers).to(present.device), temperature)
        index = torch.from_numpy(going).to(present.device)
        tokens[index, step], values[index, step] = chosen, found
        runtime.count_tokens(len(going))
        more = ~torch.isin(chosen, ends)
        present = torch.cat([present, chosen[:, None]], 1)[more]
        going = going[more.cpu().numpy()]
        if not len(going):
            break
    return Decoded(tokens, values)


def _last_logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits [rows, vocabulary] after sequences of one length [rows, length]."""
    if not has_plain_head(model):
        return model(input_ids=input_ids, use_cache=False).logits[:, -1]
    states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(states[:, -1])
