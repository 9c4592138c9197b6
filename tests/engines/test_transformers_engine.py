"""The sampler: what it draws against the model's own distribution, from policy, prompt and seed alone; by `generate` and by the loop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import naive_policy
import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import GenerationConfig

from cropi_tools.engines import generating, transformers_engine
from cropi_tools.engines.generating import GENERATE, way_to_sample
from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.runtime.errors import InputError

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return naive_policy.policy()


@pytest.fixture(params=[True, False], ids=["loop", "generate"])
def loop(request: pytest.FixtureRequest) -> bool:
    return request.param


def requests(count: int) -> list[Request]:
    return [Request(PROMPTS[k % len(PROMPTS)], sample_seed(7, "p", k)) for k in range(count)]


def goodness(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of counts under probabilities, rare outcomes taken together."""
    common = probabilities * counts.sum() >= 5
    observed = [*counts[common], counts[~common].sum()]
    expected = [*probabilities[common], probabilities[~common].sum()]
    if expected[-1] == 0:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    return float(chisquare(observed, np.array(expected) / np.sum(expected) * counts.sum()).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_the_tempered_softmax(policy: Policy, temperature: float, loop: bool) -> None:
    """First tokens against softmax(logits / T), and second tokens after the most frequent first one."""
    found = TransformersEngine(policy, loop).sample(
        [Request([5, 6, 7], sample_seed(1, k)) for k in range(8000)], Sampling(2, temperature)
    )
    first = np.bincount([response.token_ids[0] for response in found], minlength=71)
    with torch.no_grad():
        wide = naive_policy.double_copy(policy.model)
        probabilities = naive_policy.all_logprobs(wide, [5, 6, 7], [0], temperature)[0].exp().numpy()
        assert goodness(first, probabilities) > 1e-3
        other = naive_policy.all_logprobs(wide, [5, 6, 7], [0], 0.75)[0].exp().numpy()
        assert goodness(first, other) < 1e-6  # the test can tell temperatures apart
        top = int(np.argmax(np.where(np.arange(71) == 1, 0, first)))
        second = np.bincount([r.token_ids[1] for r in found if r.token_ids[0] == top], minlength=71)
        assert second.sum() > 300
        assert (
            goodness(second, naive_policy.all_logprobs(wide, [5, 6, 7, top], [0], temperature)[0].exp().numpy()) > 1e-3
        )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logprobs_equal_a_separate_forward_pass(policy: Policy, temperature: float, loop: bool) -> None:
    wide = naive_policy.double_copy(policy.model)
    wanted = requests(20)
    for request, response in zip(
        wanted, TransformersEngine(policy, loop).sample(wanted, Sampling(15, temperature)), strict=True
    ):
        with torch.no_grad():
            expected = naive_policy.logprobs(wide, request.prompt_token_ids, response.token_ids, temperature)
        # dividing logits by the temperature magnifies their rounding
        assert response.logprobs == pytest.approx(expected.tolist(), abs=1e-5 / min(temperature, 1.0))


def same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_sample_depends_on_its_own_request_only(policy: Policy, monkeypatch: pytest.MonkeyPatch, loop: bool) -> None:
    engine, sampling, wanted = TransformersEngine(policy, loop), Sampling(12, 1.0), requests(12)
    together = engine.sample(wanted, sampling)
    same([engine.sample([request], sampling)[0] for request in wanted], together)  # alone: no padding
    same(engine.sample(wanted[::-1], sampling)[::-1], together)
    padded = engine.sample([Request([2] * 40, 3), *wanted], sampling)
    same(padded[1:], together)
    for module in (generating, transformers_engine):
        monkeypatch.setattr(module, "ROWS", 5)
    same(engine.sample(wanted, sampling), together)


def test_a_longer_limit_continues_the_same_sample(policy: Policy, loop: bool) -> None:
    engine, wanted = TransformersEngine(policy, loop), requests(10)
    short, long = engine.sample(wanted, Sampling(3, 1.0)), engine.sample(wanted, Sampling(20, 1.0))
    assert [response.token_ids for response in short] == [response.token_ids[:3] for response in long]


def test_seeds_give_different_samples(policy: Policy) -> None:
    found = TransformersEngine(policy).sample([Request([5, 6, 7], seed) for seed in range(40)], Sampling(12, 1.0))
    assert len({tuple(response.token_ids) for response in found}) > 35
    seeds = {sample_seed(run, identity, k) for run in range(5) for identity in ("a", "b", "1") for k in range(20)}
    assert len(seeds) == 300
    assert sample_seed(1, "11") != sample_seed(11, "1")


def test_end_token_and_finish_reason(policy: Policy, loop: bool) -> None:
    found = TransformersEngine(policy, loop).sample(requests(200), Sampling(20, 1.5))
    stopped = [response for response in found if response.finish_reason == "stop"]
    cut = [response for response in found if response.finish_reason == "length"]
    assert len(stopped) > 20
    assert len(cut) > 5
    assert all(response.token_ids[-1] == 1 and 1 not in response.token_ids[:-1] for response in stopped)
    assert all(len(response.token_ids) == 20 and 1 not in response.token_ids for response in cut)
    assert all(len(response.logprobs) == len(response.token_ids) for response in found)


def test_the_padding_token_can_be_sampled_and_stays(policy: Policy, loop: bool) -> None:
    """Token 0 pads; sampled, it is a token like any other."""
    found = TransformersEngine(policy, loop).sample(requests(200), Sampling(20, 1.5))
    assert any(0 in response.token_ids[:-1] for response in found)


def test_several_end_tokens(policy: Policy, loop: bool) -> None:
    found = TransformersEngine(policy._replace(end_token_ids=[1, 40, 50]), loop).sample(
        requests(100), Sampling(20, 1.5)
    )
    assert {response.token_ids[-1] for response in found if response.finish_reason == "stop"} == {1, 40, 50}
    assert all(not {1, 40, 50} & set(response.token_ids[:-1]) for response in found)


def test_greedy_is_the_most_likely_token(policy: Policy, loop: bool) -> None:
    wanted = requests(5)
    wide = naive_policy.double_copy(policy.model)
    for request, response in zip(
        wanted, TransformersEngine(policy, loop).sample(wanted, Sampling(8, 0.0)), strict=True
    ):
        with torch.no_grad():
            table = naive_policy.all_logprobs(wide, request.prompt_token_ids, response.token_ids)
        assert response.token_ids == table.argmax(-1).tolist()
        assert response.logprobs is None


def test_generation_settings_of_the_policy_have_no_part(policy_folder: Path, tmp_path: Path, loop: bool) -> None:
    """top_k, penalties and so on in generation_config.json would bias every importance weight in silence."""
    bent = tmp_path / "bent"
    shutil.copytree(policy_folder, bent)
    unwanted = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 2,
        "top_p": 0.5,
        "min_p": 0.2,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": list(range(2, 40)),
        "bad_words_ids": [[5], [6]],
        "max_length": 5,
        "min_new_tokens": 9,
        "num_beams": 3,
    }
    (bent / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, **unwanted}))
    plain, other = (TransformersEngine(load_policy(str(folder), "cpu")) for folder in (policy_folder, bent))
    assert other.settings(Sampling(12, 1.0)) == plain.settings(Sampling(12, 1.0))
    for temperature in (1.0, 0.0):
        sampling = Sampling(12, temperature)
        assert other.sample(requests(30), sampling) == plain.sample(requests(30), sampling)


def test_samples_follow_the_present_weights(loop: bool) -> None:
    """After an update the engine must not sample from stale weights."""
    policy = naive_policy.policy()
    engine = TransformersEngine(policy, loop)
    engine.sample(requests(5), Sampling(5, 1.0))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.8)
    found = engine.sample(requests(5), Sampling(5, 1.0))
    wide = naive_policy.double_copy(policy.model)
    with torch.no_grad():
        for request, response in zip(requests(5), found, strict=True):
            expected = naive_policy.logprobs(wide, request.prompt_token_ids, response.token_ids)
            assert response.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_scores_that_are_not_finite_are_refused(temperature: float, loop: bool) -> None:
    policy = naive_policy.policy()
    engine = TransformersEngine(policy, loop)
    engine.sample(requests(1), Sampling(1, 1.0))  # sound when the loop is tried out, damaged in training
    with torch.no_grad():
        policy.model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="memory: the policy's scores are not finite"):
        engine.sample(requests(3), Sampling(4, temperature))


def test_a_policy_damaged_from_the_start_is_refused_as_well() -> None:
    policy = naive_policy.policy()
    with torch.no_grad():
        policy.model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="memory: the policy's scores are not finite"):
        TransformersEngine(policy).sample(requests(3), Sampling(4, 1.0))


def test_settings_tell_all_that_shapes_the_distribution(policy: Policy, loop: bool) -> None:
    settings = TransformersEngine(policy, loop).settings(Sampling(12, 0.7))
    assert settings.pop("version") == transformers.__version__
    assert settings == {
        "engine": "transformers",
        "decoder": "loop" if loop else "generate",
        "max_tokens": 12,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
        "num_beams": 1,
        "end_token_ids": [1],
        "dtype": "float32",
    }


def test_an_empty_group_has_no_completions(policy: Policy, loop: bool) -> None:
    groups = [requests(3), [], requests(2)]
    found = list(TransformersEngine(policy, loop).stream(groups, Sampling(4, 1.0)))
    assert [len(group) for group in found] == [3, 0, 2]
    assert found[2] == TransformersEngine(policy, loop).sample(requests(2), Sampling(4, 1.0))


def test_a_trial_does_not_stop_at_the_models_own_end_tokens() -> None:
    """`generate` takes end tokens that it is not told from the model's own settings, and a row that draws one goes on with padding."""
    model = naive_policy.policy().model
    model.generation_config = GenerationConfig(eos_token_id=list(range(1, 60)), pad_token_id=0)
    assert way_to_sample(model, "P0") == GENERATE
