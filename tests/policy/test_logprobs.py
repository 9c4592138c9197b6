"""Log-probabilities and entropies against a plain forward pass, for models with and without scaled logits."""

from __future__ import annotations

import itertools
from typing import Any

import naive_policy
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_tools.policy import logprobs as room
from cropi_tools.policy.logprobs import response_logprobs, sequence_batch, token_limited

SEQUENCES = [
    ([5, 6, 7], [8, 9, 1]),
    ([10], [11]),
    ([3, 4], []),
    ([12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 0, 0]),
    ([2, 2], [1]),
]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_equal_a_plain_forward_pass(temperature: float) -> None:
    model = naive_policy.policy().model
    found, entropies = response_logprobs(model, sequence_batch(SEQUENCES, "cpu"), temperature, "value")
    wide = naive_policy.double_copy(model)
    with torch.no_grad():
        tables = [naive_policy.all_logprobs(wide, *pair, temperature) for pair in SEQUENCES if pair[1]]
        expected = torch.cat([naive_policy.logprobs(wide, *pair, temperature) for pair in SEQUENCES if pair[1]])
    torch.testing.assert_close(found.detach().double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        entropies.double(), -torch.cat([(t.exp() * t).sum(-1) for t in tables]), atol=2e-5, rtol=0
    )
    assert found.dtype == torch.float32
    assert not entropies.requires_grad


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = naive_policy.policy(tie=False).model

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        found, entropies = response_logprobs(model, sequence_batch(SEQUENCES, "cpu"), 0.7, "gradient")
        (found.sum() + 0.3 * entropies.sum()).backward()
        return found.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}

    values, gradient = run()
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 3 * 71)
    again, chunked = run()
    torch.testing.assert_close(again, values)
    assert naive_policy.relative_error(chunked, gradient) < 1e-6


def test_gradient_of_entropy_only_when_asked() -> None:
    model = naive_policy.policy().model
    batch = sequence_batch(SEQUENCES, "cpu")
    _, entropies = response_logprobs(model, batch, 0.7, "gradient")
    entropies.sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    wide = naive_policy.double_copy(model)
    for pair in SEQUENCES:
        if pair[1]:
            table = naive_policy.all_logprobs(wide, *pair, 0.7)
            (-(table.exp() * table).sum()).backward()
    assert (
        naive_policy.relative_error(found, {name: parameter.grad for name, parameter in wide.named_parameters()}) < 1e-5
    )
    assert torch.equal(response_logprobs(model, batch)[1], torch.zeros(12))


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gemma2": {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0},  # soft cap after the head
    "granite": {**SMALL, "logits_scaling": 8.0},  # divides
    "cohere": {**SMALL, "logit_scale": 0.25},  # multiplies
    "nanochat": {**SMALL, "final_logit_softcapping": 2.0},
    "falcon_h1": {
        **SMALL,
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 8,
        "mamba_chunk_size": 8,
    },
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 8},  # projects before the head
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_by_its_own_logits(family: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, **FAMILIES[family], bos_token_id=0, eos_token_id=1, pad_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.dim() == 2 else None
        found, _ = response_logprobs(model, sequence_batch(SEQUENCES, "cpu"))
        expected = torch.cat([naive_policy.logprobs(model, *pair) for pair in SEQUENCES if pair[1]])
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=20), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_passes_cover_all_rows_in_order_within_the_limit(sizes: list[tuple[int, int]], limit: int) -> None:
    sequences = [([2] * prompt, [3] * response) for prompt, response in sizes]
    ranges = list(token_limited(sequences, limit))
    assert [row for rows in ranges for row in rows] == list(range(len(sizes)))
    for rows in ranges:
        assert len(rows) == 1 or len(rows) * max(sum(sizes[row]) for row in rows) <= limit
    for rows, following in itertools.pairwise(ranges):  # and no pass could have taken the next row
        assert (len(rows) + 1) * max(sum(sizes[row]) for row in (*rows, following[0])) > limit
