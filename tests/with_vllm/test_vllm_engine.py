"""The vLLM engine against the embedded one and against the policy's own log-probabilities, with a real vLLM."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import differences, disturb, requests

from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime import signals
from cropi_tools.runtime.errors import InputError, Interrupted, UsageError

pytestmark = pytest.mark.vllm
ENDS = [1, 40]


@pytest.fixture(scope="module")
def engine(engine_on: Any, tied: Path) -> Any:
    return engine_on(tied)


@pytest.fixture(scope="module")
def policy(tied: Path) -> Any:
    return load_policy(str(tied), "cpu")


def test_greedy_tokens_are_those_of_the_embedded_engine(engine: Any, policy: Any) -> None:
    asked = requests(48)
    found = engine.sample(asked, Sampling(40, 0.0))
    assert found == TransformersEngine(policy).sample(asked, Sampling(40, 0.0))
    assert all(one.logprobs is None for one in found)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_of_the_sampled_distribution(engine: Any, policy: Any, temperature: float) -> None:
    asked, sampling = requests(24, 4), Sampling(60, temperature)
    found = engine.sample(asked, sampling)
    assert differences(policy, asked, found, sampling).max() < 1e-4


def test_a_response_ends_with_its_end_token_or_at_the_limit(engine: Any) -> None:
    found = engine.sample(requests(24, 4), Sampling(60, 1.0))
    assert {one.finish_reason for one in found} == {"stop", "length"}
    ends = Counter(one.token_ids[-1] for one in found if one.finish_reason == "stop")
    assert set(ends) == set(ENDS)
    for one in found:
        body = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
        assert not set(body) & set(ENDS)
        assert one.finish_reason == "stop" or len(one.token_ids) == 60


def test_tokens_come_as_often_as_the_policy_says(engine: Any, policy: Any) -> None:
    """Though generation_config.json asks for the likeliest token alone. Chi-square over the first token of 4000 seeds."""
    prompt = requests(1)[0].prompt_token_ids
    found = engine.sample(
        [Request(prompt, seed * 0x9E3779B97F4A7C15 % 2**64) for seed in range(4000)], Sampling(1, 1.0)
    )
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in found]), minlength=policy.vocabulary)
    with torch.no_grad():
        expected = 4000 * torch.softmax(policy.model(torch.tensor([prompt])).logits[0, -1].double(), -1)
    often = expected >= 5
    rest = torch.stack([counts[~often].sum(), expected[~often].sum()])
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(
        min=1
    )
    freedom = int(often.sum())
    assert freedom > 10
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_a_sample_depends_on_its_request_alone(engine: Any) -> None:
    """Alone, among others, in another order, in groups, after a resume: the same tokens. Other seeds: others."""
    asked, sampling = requests(12, 4, length=70), Sampling(30, 1.0)
    together = engine.sample(asked, sampling)
    assert len({tuple(one.token_ids) for one in together}) == len(asked)
    tokens = [one.token_ids for one in together]
    assert [one.token_ids for one in engine.sample(asked[::-1], sampling)][::-1] == tokens
    assert [engine.sample([request], sampling)[0].token_ids for request in asked[:6]] == tokens[:6]
    groups = list(engine.stream([asked[5:9], [], asked[9:30]], sampling))
    assert [[one.token_ids for one in group] for group in groups] == [tokens[5:9], [], tokens[9:30]]


def test_every_64_bit_seed_is_taken(engine: Any) -> None:
    prompt = requests(1)[0].prompt_token_ids
    asked = [Request(prompt, seed) for seed in (0, 1, 2**32, 2**63 - 1, 2**63 + 5, 2**64 - 1)]
    assert all(len(one.token_ids) for one in engine.sample(asked, Sampling(8, 1.0)))


def test_the_samples_of_a_prompt_share_its_computation(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = engine._llm.llm_engine
    step, cached = inner.step, []

    def watched() -> Any:
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(inner, "step", watched)
    engine.sample([Request([3 + t % 60 for t in range(100, 200)], seed) for seed in range(8)], Sampling(4, 1.0))
    assert sorted(cached)[0] == 0
    assert sorted(cached)[1] >= 64


def test_groups_stream_in_order_and_are_taken_as_needed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sampling = requests(40, 2), Sampling(40, 1.0)
    groups = [asked[start : start + 4] for start in range(0, 80, 4)]
    expected = [engine.sample(group, sampling) for group in groups]
    taken = 0

    def source() -> Iterator[list[Request]]:
        nonlocal taken
        for group in groups:
            taken += 1
            yield group

    monkeypatch.setattr(engine, "_window", 12)
    found, ahead = [], []
    for group in engine.stream(source(), sampling):
        found.append(group)
        ahead.append(taken - len(found))
    assert [[one.token_ids for one in group] for group in found] == [
        [one.token_ids for one in group] for group in expected
    ]
    assert ahead[0] < 12  # most of the groups were not asked for yet
    assert max(ahead) >= 2  # but more than one was begun


def test_an_abandoned_stream_leaves_no_work(engine: Any) -> None:
    asked, sampling = requests(16), Sampling(60, 1.0)
    stream = engine.stream([asked[:1], asked[1:]], sampling)
    next(stream)
    stream.close()
    assert engine._begun == {}
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert [one.token_ids for one in engine.sample(asked[:4], sampling)] == [
        engine.sample([one], sampling)[0].token_ids for one in asked[:4]
    ]


def test_a_signal_stops_a_stream_but_not_a_single_group(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sampling = requests(8), Sampling(60, 1.0)
    monkeypatch.setattr(signals, "_stop_signal", signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        next(engine.stream([asked], sampling))
    assert engine._begun == {}
    assert len(engine.sample(asked, sampling)) == 8


def test_what_does_not_fit_is_refused(engine: Any) -> None:
    prompt = requests(1, length=200)[0].prompt_token_ids
    assert len(engine.sample([Request(prompt, 1)], Sampling(56, 0.0))[0].token_ids) <= 56
    with pytest.raises(InputError, match=r"200 tokens and --max-tokens 57 .* 256 .*lower --max-tokens"):
        engine.sample([Request(prompt, 1)], Sampling(57, 1.0))
    assert engine._begun == {}


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_vllm_would_change_is_refused(engine: Any, temperature: float) -> None:
    with pytest.raises(UsageError, match="--engine transformers"):
        engine.sample(requests(1), Sampling(4, temperature))


def test_everything_that_shapes_sampling_is_set_and_told(engine: Any) -> None:
    """A parameter that a new vLLM brings must be decided on here."""
    from vllm import SamplingParams

    elsewhere = {"seed", "output_kind"}  # each request's own; what comes when
    text = {
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_text_buffer_length",
    }
    machinery = {
        "skip_clone",
        "extra_args",
        "stream_interval",
        "skip_reading_prefix_cache",
        "routed_experts_prompt_start",
    }
    off_unless_switched_on = {"structured_outputs", "thinking_token_budget", "repetition_detection", "watermarking"}
    scoring = {"prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "trace_decode_token_ids"}
    told = engine.settings(Sampling(5, 0.5))
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields == (set(told) & fields) | elsewhere | text | machinery | off_unless_switched_on | scoring
    assert json.loads(json.dumps(told)) == told
    assert (told["temperature"], told["max_tokens"], told["top_k"], told["repetition_penalty"]) == (0.5, 5, 0, 1.0)
    assert (told["stop_token_ids"], told["dtype"], told["prefix_caching"]) == (ENDS, "float32", True)


def test_new_weights_of_tied_embeddings(engine: Any, tied: Path) -> None:
    """Input and output embedding are one parameter; on a CPU vLLM multiplies with a packed copy of it."""
    policy = load_policy(str(tied), "cpu")
    asked, sampling = requests(16, 2, length=70), Sampling(30, 1.0)
    old = [one.token_ids for one in engine.sample(asked, sampling)]
    disturb(policy, 0.02)
    engine.update_weights(policy)
    found = engine.sample(asked, sampling)
    assert [one.token_ids for one in found] != old
    assert differences(policy, asked, found, sampling).max() < 1e-4
    assert engine.sample(asked, Sampling(30, 0.0)) == TransformersEngine(policy).sample(asked, Sampling(30, 0.0))
    engine.update_weights(load_policy(str(tied), "cpu"))
    assert [one.token_ids for one in engine.sample(asked, sampling)] == old


def test_scores_that_are_not_finite_are_an_error(engine: Any, tied: Path) -> None:
    """The last test with this engine: NaN stays in its cache."""
    policy = load_policy(str(tied), "cpu")
    policy.model.get_input_embeddings().weight.data.fill_(torch.nan)
    engine.update_weights(policy)
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match=r"scores are not finite.*lower --learning-rate"):
            engine.sample(requests(4), Sampling(4, temperature))
