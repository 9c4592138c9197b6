"""The packed layout against a row for every response: log-probabilities, gradients, and which models allow it."""

from __future__ import annotations

from typing import Any

import naive_policy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_tools.policy.logprobs import response_logprobs, sequence_batch
from cropi_tools.policy.packing import can_pack, packed, packed_batch

PROMPTS = [
    ([5, 6, 7], [[8, 9, 1], [4], []]),
    ([10], [[11]]),
    ([12, 13, 14, 15, 16], [[17, 18, 19, 20, 21, 0, 0], [3, 3, 3]]),
]
PAIRS = [(prompt, response) for prompt, responses in PROMPTS for response in responses]


@pytest.mark.parametrize("plain", [False, True], ids=["fused attention", "elementary attention"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_equals_a_float64_pass_over_each_response_alone(plain: bool, temperature: float) -> None:
    model = naive_policy.policy().model
    batch = packed_batch(PROMPTS, "cpu")
    with packed(model, batch, plain):
        found, entropies = response_logprobs(model, batch, temperature, "value")
    wide = naive_policy.double_copy(model)
    with torch.no_grad():
        expected = torch.cat([naive_policy.logprobs(wide, *pair, temperature) for pair in PAIRS if pair[1]])
    torch.testing.assert_close(found.detach().double(), expected, atol=1e-5, rtol=1e-5)
    assert len(entropies) == len(found) == batch.response_bounds[-1] == 15
    in_row = sum(len(p) + sum(len(r[:-1]) for r in rs) for p, rs in PROMPTS)
    assert batch.input_ids.numel() == batch.bounds[-1] == in_row == 19


@pytest.mark.parametrize("plain", [False, True])
def test_gradients_equal_those_of_rows(plain: bool) -> None:
    model = naive_policy.policy(tie=False).model
    weights = torch.linspace(-1, 1, 15)

    def gradient(batch: Any) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with packed(model, batch, plain) if hasattr(batch, "bounds") else torch.enable_grad():
            logprobs, _ = response_logprobs(model, batch)
            (weights * logprobs).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradient(sequence_batch(PAIRS, "cpu"))
    assert naive_policy.relative_error(gradient(packed_batch(PROMPTS, "cpu")), expected) < 2e-6


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=4
    ).filter(lambda shapes: any(any(lengths) for _, lengths in shapes))
)
def test_any_lengths_and_numbers(shapes: list[tuple[int, list[int]]]) -> None:
    model = naive_policy.policy().model
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 70, (count,), generator=draw).tolist()

    prompts = [(ids(length), [ids(tokens) for tokens in lengths]) for length, lengths in shapes]
    batch = packed_batch(prompts, "cpu")
    pairs = [(prompt, response) for prompt, responses in prompts for response in responses]
    with torch.no_grad(), packed(model, batch):
        found, _ = response_logprobs(model, batch)
    with torch.no_grad():
        expected, _ = response_logprobs(model, sequence_batch(pairs, "cpu"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert batch.lengths == [len(response) for _, response in pairs]


def test_what_a_response_sees_does_not_depend_on_the_others() -> None:
    model = naive_policy.policy().model
    first = packed_batch([([5, 6], [[7, 8], [9, 10, 11]])], "cpu")
    other = packed_batch([([5, 6], [[12, 13, 14], [9, 10, 11]]), ([20], [[21]])], "cpu")
    with torch.no_grad():
        with packed(model, first):
            found = response_logprobs(model, first)[0][2:5]
        with packed(model, other):
            again = response_logprobs(model, other)[0][3:6]
    torch.testing.assert_close(found, again, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "special", "allowed"),
    [
        ("Qwen2", {}, True),
        ("Qwen3", {"head_dim": 8}, True),
        ("Llama", {}, True),
        ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, True),
        ("Mistral", {"sliding_window": None}, True),
        ("Mistral", {"sliding_window": 4}, False),
        ("Gemma2", {"head_dim": 8}, False),  # soft caps and sliding windows
        ("Gemma3Text", {"head_dim": 8}, False),
        ("Bloom", {}, False),  # no attention of its own can be given to it
    ],
)
def test_which_models_allow_it(family: str, special: dict[str, Any], allowed: bool) -> None:
    model = naive_policy.small_model(family, special)
    before = model.config._attn_implementation
    assert can_pack(model) is allowed
    assert model.config._attn_implementation == before
    if allowed:
        batch = packed_batch(PROMPTS, "cpu")
        with torch.no_grad():
            with packed(model, batch):
                found, _ = response_logprobs(model, batch)
            expected, _ = response_logprobs(model, sequence_batch(PAIRS, "cpu"))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_models_own_attention_is_back_after_an_error() -> None:
    model = naive_policy.policy().model
    batch = packed_batch(PROMPTS, "cpu")
    with pytest.raises(ZeroDivisionError), packed(model, batch):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.isfinite().all()
