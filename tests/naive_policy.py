"""Log-probabilities and gradients once more, from the definitions: float64, one sequence at a time, no padding."""

from __future__ import annotations

import copy
import json
import random
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiny_policy
import torch
import transformers

from cropi_tools.data.records import Rollout, Sample
from cropi_tools.policy.loading import Policy


class _Norm(torch.nn.Module):
    """RMS norm in float64; the library's own passes through float32."""

    def __init__(self, weight: torch.nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states / (states.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()


def small_model(family: str, special: dict[str, Any]) -> Any:
    """A random model of one of the library's families, such as `Llama`, with these settings of its own."""
    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    config = getattr(transformers, f"{family}Config")(
        **{**sizes, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **special}
    )
    heads = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    torch.manual_seed(0)
    return getattr(transformers, heads.get(family, f"{family}ForCausalLM"))(config).eval()


def double_copy(model: Any) -> Any:
    """The same weights in float64, with parameters of the same names."""
    wide = copy.deepcopy(model).double()
    for parent in list(wide.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _Norm(child.weight, child.variance_epsilon))
    return wide


def all_logprobs(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of every continuation at every response token."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : len(prompt) + len(response) - 1] / temperature, -1)


def logprobs(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [tokens] of a response."""
    table = all_logprobs(model, prompt, response, temperature)
    return torch.stack([table[place, token] for place, token in enumerate(response)])


def advantages(rewards: list[float]) -> list[float]:
    """(R - mean) / (Bessel-corrected standard deviation + 1e-4)."""
    return [(reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4) for reward in rewards]


def gradient(
    model: Any,
    rollout: Rollout,
    temperature: float = 1.0,
    weighting: str = "token",
    aggregation: str = "sequence",
    behavior: Any = None,
) -> dict[str, torch.Tensor]:
    """Sum over k of A_k / (K |tau_k|) times the sum over t of rho_t grad log pi(a_t), float64, by parameter name.

    behavior: a float64 model that gives beta at the policy temperature; None: beta as stored.
    """
    model.zero_grad(set_to_none=True)
    every_token = sum(len(sample.token_ids) for sample in rollout.samples)
    for advantage, sample in zip(advantages(rollout.rewards), rollout.samples, strict=True):
        if not sample.token_ids:
            continue
        logpi = logprobs(model, rollout.prompt_token_ids, sample.token_ids, temperature)
        if behavior is not None:
            beta = logprobs(behavior, rollout.prompt_token_ids, sample.token_ids, temperature).detach()
        else:
            beta = torch.tensor(sample.logprobs, dtype=torch.float64)
        rho = torch.exp(logpi.detach() - beta) if weighting == "token" else torch.ones_like(beta)
        share = 1 / (len(rollout.samples) * len(sample.token_ids)) if aggregation == "sequence" else 1 / every_token
        (advantage * share * (rho * logpi).sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected| over all parameters together; their names must agree."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def policy(**settings: Any) -> Policy:
    """The tiny policy without a folder."""
    return Policy(tiny_policy.model(**settings), tiny_policy.tokenizer(), [1], "memory")


def rollout(
    number: int,
    responses: tuple[tuple[int, bool], ...] = ((7, True), (12, False), (1, False), (3, True)),
    prompt: int = 5,
    drift: float = 0.3,
) -> Rollout:
    """Random rollouts. responses: (tokens, whether the last is the end token); the others are never the end token.

    Rewards 1, 0, 1, ... and a half for the last; logprobs within about `drift` of those of the tiny policy, seed 0.
    """
    draw = random.Random(number)
    ids = [draw.randrange(2, 70) for _ in range(prompt)]
    model = double_copy(tiny_policy.model())
    samples = []
    for place, (length, ended) in enumerate(responses):
        tokens = [draw.randrange(2, 70) for _ in range(length - ended)] + [1] * ended
        with torch.no_grad():
            values = logprobs(model, ids, tokens).tolist() if tokens else []
        reward = 0.5 if place == len(responses) - 1 else float(place % 2 == 0)
        samples.append(
            Sample(tokens, [float(torch.tensor(value + draw.uniform(-drift, drift))) for value in values], reward)
        )
    return Rollout(f"r{number}", "odd" if number % 2 else "even", ids, samples, {})


def record(made: Rollout) -> dict[str, Any]:
    """The line of a rollouts file that reads back as `made`."""
    return {
        "id": made.id,
        "source": made.source,
        "prompt": "?",
        "answer": "?",
        "prompt_token_ids": made.prompt_token_ids,
        "samples": [
            {
                "token_ids": s.token_ids,
                "logprobs": s.logprobs,
                "text": "",
                "finish_reason": "stop",
                "reward": s.reward,
                "outcome": "correct",
            }
            for s in made.samples
        ],
    }


def write(path: Path, made: Iterable[Rollout]) -> Path:
    """A rollouts file."""
    path.write_text("".join(json.dumps(record(rollout)) + "\n" for rollout in made))
    return path
