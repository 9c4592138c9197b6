"""The server engine against vLLM's own server on loopback, and cropi-rollout through it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
from asking import differences, requests
from killing import facts_of, finish, same_samples, stop

from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from serving import serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ENDS = [1, 40]


@pytest.fixture(scope="module")
def url(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(tied, log, "--logprobs-mode", "processed_logprobs", "--served-model-name", "tied") as address:
        yield address


@pytest.fixture(scope="module")
def engine(url: str, tied: Path) -> Iterator[Any]:
    from cropi_tools.engines.server_engine import ServerEngine
    from cropi_tools.policy.tokens import load_tokens

    opened = ServerEngine(url, load_tokens(str(tied)), concurrency=24)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def policy(tied: Path) -> Any:
    from cropi_tools.policy.loading import load_policy

    return load_policy(str(tied), "cpu", "float32")


def test_what_it_says_of_itself(engine: Any) -> None:
    said = engine.settings(Sampling(20, 0.7))
    assert (said["server"], said["served_model"], said["end_token_ids"]) == ("vllm", "tied", ENDS)
    assert said["version"]


def test_greedy_tokens_are_the_transformers_engines(engine: Any, policy: Any) -> None:
    from cropi_tools.engines.transformers_engine import TransformersEngine

    asked, sampling = requests(24), Sampling(20, 0.0)
    expected = TransformersEngine(policy).sample(asked, sampling)
    assert engine.sample(asked, sampling) == expected
    assert len({tuple(one.token_ids) for one in expected}) > 10


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_the_distribution_sampled(
    engine: Any, policy: Any, temperature: float, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, sampling = requests(16, samples=4), Sampling(24, temperature)
    found = engine.sample(asked, sampling)
    assert differences(policy, asked, found, sampling).max() < 1e-4
    assert capsys.readouterr().err == ""


def test_raw_logprobs_are_found_out(
    tied: Path, policy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server without the flag tells log-probabilities at temperature 1, whatever it samples at."""
    from cropi_tools.engines.server_engine import ServerEngine
    from cropi_tools.policy.tokens import load_tokens

    asked = requests(6)
    with serving(tied, tmp_path / "log") as address:
        raw = ServerEngine(address, load_tokens(str(tied)))
        try:
            assert all(one.logprobs is None for one in raw.sample(asked, Sampling(8, 0.5)))
            (line,) = capsys.readouterr().err.splitlines()
            assert "--logprobs-mode processed_logprobs" in line
            found = raw.sample(asked, Sampling(8, 1.0))
        finally:
            raw.close()
    assert differences(policy, asked, found, Sampling(8, 1.0)).max() < 1e-4
    assert capsys.readouterr().err == ""


def same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_sample_depends_on_its_own_request_only(engine: Any) -> None:
    asked, sampling = requests(12, samples=4), Sampling(20, 1.0)
    together = engine.sample(asked, sampling)
    same([engine.sample([request], sampling)[0] for request in asked[:16]], together[:16])
    same(engine.sample(asked[::-1], sampling)[::-1], together)
    groups = list(engine.stream([asked[:7], asked[7:8], asked[8:]], sampling))
    same([one for group in groups for one in group], together)
    assert len({tuple(one.token_ids) for one in together}) > 40


def test_nothing_is_left_to_the_served_folders_settings(engine: Any, policy: Any) -> None:
    """Its generation_config.json says top_k 1, min_p 0.9, a low temperature and a penalty: one token always."""
    import torch

    prompt = requests(1)[0].prompt_token_ids
    found = engine.sample([Request(prompt, sample_seed(1, k)) for k in range(800)], Sampling(1, 1.0))
    with torch.no_grad():
        own = torch.softmax(policy.model(torch.tensor([prompt])).logits[0, -1].double(), -1)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in found]), minlength=own.numel()).double()
    common = own > 0.02
    assert common.sum() > 5
    # five standard deviations of a binomial count
    assert ((counts - 800 * own)[common].abs() < 5 * (800 * own * (1 - own))[common].sqrt()).all()


def test_responses_end_at_all_end_tokens_and_keep_them(engine: Any) -> None:
    found = engine.sample(requests(60, samples=2), Sampling(40, 1.0))
    assert {one.token_ids[-1] for one in found if one.finish_reason == "stop"} == set(ENDS)
    assert all(not set(ENDS) & set(one.token_ids[:-1]) for one in found)
    assert all(
        len(one.token_ids) == 40 and one.token_ids[-1] not in ENDS for one in found if one.finish_reason == "length"
    )


def test_a_killed_rollout_goes_on_to_the_same_samples(url: str, tied: Path, tmp_path: Path) -> None:
    tiny_policy.write_jsonl(tmp_path / "prompts.jsonl", tiny_policy.prompts(128))

    def line(output: str, concurrency: int) -> list[str]:
        words = f"--engine server --server {url} --concurrency {concurrency} --served-model tied --model {tied} -n 8"
        words += f" --max-tokens 16 --temperature 0.8 --verifier exact --quiet -o {output} prompts.jsonl"
        return words.split()

    finish(tmp_path, line("whole.jsonl", 64))
    assert stop(tmp_path, line("broken.jsonl", 8), "broken.jsonl", signal.SIGKILL) == -signal.SIGKILL
    finish(tmp_path, line("broken.jsonl", 16))
    same_samples(tmp_path / "whole.jsonl", tmp_path / "broken.jsonl")
    facts = facts_of(tmp_path / "whole.jsonl")
    assert facts["summary"]["samples"] == 1024
    assert (facts["sampling"]["server"], facts["sampling"]["top_k"]) == ("vllm", 0)
