"""The decoding loop against `generate`, and what makes it faster: prompts computed once, finished rows given up or refilled."""

from __future__ import annotations

import copy
import random
from typing import Any

import naive_policy
import pytest
import torch

from cropi_tools.engines import decoding, decoding_attention
from cropi_tools.engines.decoding import can_decode, common_start, decode
from cropi_tools.engines.decoding_attention import PromptPass, ResponsePass
from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.logprobs import separate_logprobs


@pytest.fixture(scope="module")
def policy() -> Policy:
    return naive_policy.policy()


def requests(samples: tuple[int, ...], lengths: tuple[int, ...] = (3, 60, 1, 9, 25)) -> list[Request]:
    """Prompts of these lengths, one after another, with so many samples each."""
    draw = random.Random(1)
    found = []
    for number, count in enumerate(samples):
        ids = [draw.randrange(2, 70) for _ in range(lengths[number % len(lengths)])]
        found += [Request(list(ids), sample_seed(3, number, k)) for k in range(count)]
    return found


def same(found: list[Completion], expected: list[Completion], atol: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert (one.logprobs is None) is (other.logprobs is None)
        if other.logprobs is not None:
            assert one.logprobs == pytest.approx(other.logprobs, rel=1e-5, abs=atol)


def by_loop(policy: Policy, wanted: list[Request], sampling: Sampling, rows: int = 256) -> list[Completion]:
    decoded = decode(policy.model, wanted, sampling, policy.end_token_ids, rows)
    return list(TransformersEngine(policy)._completions(decoded, sampling))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("rows", [256, 7, 1])
@pytest.mark.parametrize("samples", [(4, 4, 4), (1, 1, 1, 1, 1, 1), (1, 9, 2, 1, 5)], ids=["4 each", "1 each", "mixed"])
def test_equals_generate(policy: Policy, temperature: float, rows: int, samples: tuple[int, ...]) -> None:
    """Fewer rows than requests: they are refilled, also in the midst of a prompt's samples."""
    wanted, sampling = requests(samples), Sampling(14, temperature)
    for ends in ([1], [1, 40, 50, 51, 52, 60]):
        other = policy._replace(end_token_ids=ends)
        expected = TransformersEngine(other, loop=False).sample(wanted, sampling)
        assert len({len(response.token_ids) for response in expected}) > 1 or ends == [1]
        # dividing logits by the temperature magnifies their rounding
        same(by_loop(other, wanted, sampling, rows), expected, 1e-5 if temperature != 0.5 else 2e-5)


@pytest.mark.parametrize("max_tokens", [1, 2, 90])
def test_any_limit(policy: Policy, max_tokens: int) -> None:
    """90 tokens are more than there is room for at first."""
    assert max_tokens < decoding_attention._FIRST_LENGTH or max_tokens > decoding_attention._FIRST_LENGTH
    wanted, sampling = requests((3, 2, 3)), Sampling(max_tokens, 1.0)
    same(by_loop(policy, wanted, sampling, 5), TransformersEngine(policy, loop=False).sample(wanted, sampling))


def test_long_prompts_are_computed_in_parts(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, sampling = requests((2, 2, 2, 2, 2, 2)), Sampling(5, 1.0)
    whole = by_loop(policy, wanted, sampling)
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 30)
    passes = watched(monkeypatch)
    same(by_loop(policy, wanted, sampling), whole)
    assert sum(isinstance(now, PromptPass) for now, _ in passes) > 2


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Every pass through the model from now on, with its number of tokens."""
    passes: list[tuple[Any, int]] = []
    own = decoding.logits_of

    def watch(model: Any, now: Any, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        passes.append((now, len(ids)))
        return own(model, now, ids, *others)

    monkeypatch.setattr(decoding, "logits_of", watch)
    return passes


@pytest.mark.parametrize("rows", [256, 5])
def test_a_prompt_is_computed_once_for_its_samples(policy: Policy, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Also where its samples do not fit in at once, and where every response ends at different times."""
    passes = watched(monkeypatch)
    by_loop(policy._replace(end_token_ids=[1, 40, 50, 51]), requests((8, 8, 8, 8, 8)), Sampling(10, 1.0), rows)
    assert sum(tokens for now, tokens in passes if isinstance(now, PromptPass)) == 3 + 60 + 1 + 9 + 25


def with_start(wanted: list[Request], length: int) -> list[Request]:
    """The same requests, each prompt after so many tokens that all begin with."""
    start = [2 + (5 * place) % 68 for place in range(length)]
    return [request._replace(prompt_token_ids=start + request.prompt_token_ids) for request in wanted]


@pytest.mark.parametrize("rows", [256, 7, 1])
@pytest.mark.parametrize("samples", [(4, 4, 4), (1, 1, 1, 1, 1, 1), (1, 9, 2, 1, 5)], ids=["4 each", "1 each", "mixed"])
def test_what_all_prompts_begin_with_is_computed_once(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, rows: int, samples: tuple[int, ...]
) -> None:
    """With the same answers as `generate`, which computes it for every row."""
    wanted, sampling = with_start(requests(samples), 40), Sampling(14, 1.0)
    other = policy._replace(end_token_ids=[1, 40, 50, 51, 52, 60])
    expected = TransformersEngine(other, loop=False).sample(wanted, sampling)
    passes = watched(monkeypatch)
    same(by_loop(other, wanted, sampling, rows), expected)
    own = sum(len(ids) - 40 for ids in {tuple(request.prompt_token_ids) for request in wanted})
    assert sum(tokens for now, tokens in passes if isinstance(now, PromptPass)) == 40 + own


def test_a_long_start_is_computed_once_in_parts_too(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, sampling = with_start(requests((2, 2, 2, 2, 2, 2)), 100), Sampling(5, 1.0)
    whole = by_loop(policy, wanted, sampling)
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 30)
    same(by_loop(policy, wanted, sampling), whole)


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 3]], 0),  # one prompt, computed once as it is
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 4], [1, 2, 3, 9], [1, 2, 3, 5]], 2),
        ([[1, 2], [1, 2, 3]], 1),  # a prompt's last token is its own
        ([[1], [1, 2, 3]], 0),
        ([[5, 1], [2, 1]], 0),
    ],
)
def test_the_start_that_prompts_have_in_common(prompts: list[list[int]], length: int) -> None:
    assert common_start(prompts) == common_start(prompts[::-1]) == length


def test_a_short_start_is_not_worth_a_pass(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = watched(monkeypatch)
    by_loop(policy, with_start(requests((2, 2)), decoding.SHARED_TOKENS - 1), Sampling(3, 1.0))
    assert sum(isinstance(now, PromptPass) for now, _ in passes) == 1


def test_the_trial_shares_a_start(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides whether a model may be sampled so must reach it."""
    passes = watched(monkeypatch)
    assert can_decode(copy.deepcopy(policy.model))
    assert any(isinstance(now, PromptPass) and now.shared for now, _ in passes)


@pytest.mark.parametrize("rows", [256, 48])
def test_finished_rows_cost_little(policy: Policy, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """One row in 16 may be idle; `generate` computes all rows until the last one ends."""
    passes = watched(monkeypatch)
    found = by_loop(policy._replace(end_token_ids=list(range(1, 9))), requests((8,) * 25), Sampling(30, 1.0), rows)
    needed = sum(len(response.token_ids) - 1 for response in found)  # the first token comes with the prompt
    computed = sum(tokens for now, tokens in passes if isinstance(now, ResponsePass))
    assert needed <= computed <= 1.1 * needed
    assert needed < 0.5 * len(found) * 29


def test_the_same_group_gives_the_same_bytes(policy: Policy) -> None:
    wanted, sampling = requests((8, 3, 8, 1)), Sampling(12, 1.0)
    assert by_loop(policy, wanted, sampling, 6) == by_loop(policy, wanted, sampling, 6)


def test_requests_of_one_prompt_apart_from_each_other(policy: Policy) -> None:
    wanted, sampling = requests((3, 3, 3)), Sampling(8, 1.0)
    mixed = wanted[::3] + wanted[1::3] + wanted[2::3]
    expected = by_loop(policy, wanted, sampling)
    same(by_loop(policy, mixed, sampling, 4), expected[::3] + expected[1::3] + expected[2::3])


@pytest.mark.parametrize(
    ("family", "special", "allowed"),
    [
        ("Qwen2", {}, True),
        ("Qwen3", {"head_dim": 8}, True),
        ("Llama", {"num_key_value_heads": 4}, True),
        ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, True),
        ("Mistral", {"sliding_window": None}, True),
        ("Mistral", {"sliding_window": 4}, False),
        ("Gemma2", {"head_dim": 8}, False),  # soft caps and sliding windows
        ("Gemma3Text", {"head_dim": 8}, False),
        ("Bloom", {}, False),  # no attention of its own can be given to it
        ("Mamba", {"hidden_size": 32, "state_size": 4}, False),  # recurrent
    ],
)
def test_which_models_allow_it(family: str, special: dict[str, Any], allowed: bool) -> None:
    model = naive_policy.small_model(family, special)
    model.generation_config.pad_token_id = 0
    before = model.config._attn_implementation
    assert can_decode(model) is allowed
    assert model.config._attn_implementation == before
    if family == "Mamba":
        return
    other = Policy(model, None, [1], "memory")
    wanted, sampling = requests((3, 3), (3, 12)), Sampling(10, 1.0)
    assert TransformersEngine(other).settings(sampling)["decoder"] == ("loop" if allowed else "generate")
    expected = TransformersEngine(other, loop=False).sample(wanted, sampling)
    for found, response in zip(TransformersEngine(other).sample(wanted, sampling), expected, strict=True):
        assert found.token_ids == response.token_ids
        assert found.logprobs == pytest.approx(response.logprobs, abs=1e-4)


def test_only_where_it_has_been_measured() -> None:
    assert can_decode(naive_policy.policy().model)
    assert not can_decode(naive_policy.policy().model.double())
    assert can_decode(naive_policy.policy().model.to(torch.bfloat16))
    assert not can_decode(naive_policy.policy().model.to(torch.float16))


def test_in_bfloat16_a_copy_in_float32_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding hides, a copy shows; where there is no memory for one, the loop is left alone."""
    model = naive_policy.policy().model.to(torch.bfloat16)
    kinds = []

    def error(tried: Any, *_: Any) -> float:
        kinds.append(tried.dtype)
        return 0.1

    monkeypatch.setattr(decoding, "trial_error", error)
    assert not can_decode(model)
    assert kinds == [torch.bfloat16, torch.float32]
    monkeypatch.setattr(decoding, "trial_error", lambda *_: 0.0)
    monkeypatch.setattr(decoding, "COPY_BYTES", 4 * sum(parameter.numel() for parameter in model.parameters()) - 1)
    assert not can_decode(naive_policy.policy().model.to(torch.bfloat16))


@pytest.mark.parametrize("shared", [0, 40])
def test_samples_in_bfloat16_are_those_of_generate_but_for_rounding(shared: int) -> None:
    """Errors against passes in float32 with the same weights, beside those of `generate`."""
    policy = naive_policy.policy()
    policy.model.to(torch.bfloat16)
    exact = copy.deepcopy(policy.model).float()
    wanted, sampling = with_start(requests((3, 3, 9, 20), (4, 4, 4, 4)), shared), Sampling(24, 1.0)
    errors = {}
    for loop in (True, False):
        engine = TransformersEngine(policy, loop)
        assert engine.settings(sampling)["decoder"] == ("loop" if loop else "generate")
        found = engine.sample(wanted, sampling)
        pairs = [(request.prompt_token_ids, one.token_ids) for request, one in zip(wanted, found, strict=True)]
        truth = separate_logprobs(exact, pairs, 1.0, 1 << 12)
        drawn = torch.tensor([value for one in found for value in one.logprobs or ()])
        errors[loop] = float((drawn - truth).abs().mean())
    assert errors[True] <= 1.5 * errors[False] + 1e-3


def test_the_models_own_attention_is_back_after_an_error(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(decoding, "choose", broken)
    with pytest.raises(ZeroDivisionError):
        decode(policy.model, requests((2,)), Sampling(3, 1.0), [1], 4)
    assert policy.model.config._attn_implementation == "sdpa"
    assert policy.model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
