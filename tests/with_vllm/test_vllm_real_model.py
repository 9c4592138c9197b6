"""A real chat model, SmolLM2-135M-Instruct, sampled by vLLM in this process and behind vLLM's own server: the whole command, from a shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import smollm2
from killing import facts_of, finish
from smollm2 import END, TEMPERATURE

from cropi_tools.data.records import Rollout, read_rollouts
from cropi_tools.policy.loading import load_policy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from serving import serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SAMPLES, MAX_TOKENS = 4, 24


def sampled(place: Path, policy: Path, *words: str) -> list[Rollout]:
    """What cropi-rollout makes of a few prompts, by the engine that `words` name."""
    (place / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in smollm2.prompts()))
    line = f"--model {policy} -n {SAMPLES} --max-tokens {MAX_TOKENS} --temperature {TEMPERATURE} --dtype float32 --verifier maths --quiet"
    finish(place, [*words, *line.split(), "prompts.jsonl", "-o", "rollouts.jsonl"])
    return list(read_rollouts([str(place / "rollouts.jsonl")]))


def check(rollouts: list[Rollout], folder: Path) -> None:
    """Prompts by the chat template, responses up to the end token, and log-probabilities of one pass of the policy's own each."""
    import torch

    policy: Any = load_policy(str(folder), "cpu", "float32")
    samples = [sample for rollout in rollouts for sample in rollout.record["samples"]]
    assert len({tuple(sample["token_ids"]) for sample in samples}) > len(rollouts)
    stopped = [sample for sample in samples if sample["finish_reason"] == "stop"]
    assert len(stopped) > len(samples) / 2
    for sample in samples:
        assert END not in sample["token_ids"][:-1]
        assert (sample["token_ids"][-1] == END) == (sample in stopped)
        assert "<|" not in sample["text"]
    assert {sample["outcome"] for sample in samples} >= {"correct", "wrong"}
    for rollout, question in zip(rollouts, smollm2.QUESTIONS, strict=True):
        assert policy.tokenizer.decode(rollout.prompt_token_ids) == smollm2.rendered(question)
        for sample in rollout.samples:
            sequence = torch.tensor([rollout.prompt_token_ids + sample.token_ids])
            with torch.no_grad():
                logits = policy.model(input_ids=sequence, use_cache=False).logits[
                    0, len(rollout.prompt_token_ids) - 1 : -1
                ]
            own = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            assert float((own - torch.tensor(sample.logprobs)).abs().max()) < 1e-3


def test_vllm_in_this_process(real_policy: Path, tmp_path: Path) -> None:
    check(sampled(tmp_path, real_policy, "--engine", "vllm"), real_policy)
    assert facts_of(tmp_path / "rollouts.jsonl")["sampling"]["engine"] == "vllm"


def test_vllm_behind_its_server(real_policy: Path, tmp_path: Path) -> None:
    options = ("--logprobs-mode", "processed_logprobs", "--max-model-len", "512")
    with serving(real_policy, tmp_path / "log", *options) as url:
        check(sampled(tmp_path, real_policy, "--engine", "server", "--server", url), real_policy)
    assert facts_of(tmp_path / "rollouts.jsonl")["sampling"]["server"] == "vllm"
