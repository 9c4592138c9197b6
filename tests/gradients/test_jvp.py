"""Forward mode against float64 gradients multiplied with the direction, whatever the objective, the model and the batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import naive_policy
import pytest
import tiny_policy
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cropi_tools.data.means import write_mean
from cropi_tools.data.records import Rollout
from cropi_tools.gradients.accumulator import Direction
from cropi_tools.gradients.jvp import TOKENS_TOGETHER, ForwardMode, inner_of
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.objective import Estimator
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.parameters import add_adapters
from cropi_tools.runtime.errors import InputError

LENGTHS = ((7, True), (12, False), (1, False), (3, True))
ESTIMATORS = {
    "none": Estimator("none"),
    "token": Estimator(),
    "prefix": Estimator("prefix"),
    "suffix": Estimator("suffix"),
    "trajectory": Estimator("trajectory"),
    "sequence": Estimator("sequence"),
    "token, weights clipped": Estimator(weight_clip=(0.9, 1.1)),
    "prefix, ppo clip": Estimator("prefix", ppo_clip=(0.1, 0.1)),
    "suffix, normalized": Estimator("suffix", weight_clip=(0.5, 1.5), self_normalize=True),
}


class Given(Direction):
    """A direction in memory instead of a file; `without`: parameters it has no part of."""

    def __init__(self, model: Any, seed: int = 0, without: str = "nothing") -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tensors = self._tensors = {
            name: torch.randn(parameter.shape, generator=draw)
            for name, parameter in model.named_parameters()
            if without not in name
        }


def task_of(rollout: Rollout, settings: GradientSettings) -> GradientTask:
    task = prepare(rollout, settings)
    assert isinstance(task, GradientTask)
    return task


def gradient_of(policy: Policy, rollout: Rollout, settings: GradientSettings) -> dict[str, torch.Tensor]:
    """In float64, by the reference path, which is tested elsewhere against the definitions."""
    gemma = isinstance(policy.model, Gemma2ForCausalLM)  # with norms of its own kind
    wide = policy._replace(
        model=copy.deepcopy(policy.model).double() if gemma else naive_policy.double_copy(policy.model)
    )
    found: dict[str, torch.Tensor] = {}
    ReferenceGradients(wide, settings).compute([task_of(rollout, settings)], lambda n, g: found.update({n: g[0]}))
    return found


def dot(gradient: dict[str, torch.Tensor], direction: Any) -> float:
    pairs = [(gradient[name], direction.tensors[name]) for name in gradient if name in direction.tensors]
    return sum(float((one.double() * other.double()).sum()) for one, other in pairs)


def size(gradient: dict[str, torch.Tensor], direction: Any) -> float:
    """What an error is small against: the spread of inner products with random directions of this length, |g||v| / sqrt(P)."""
    length = torch.cat([tensor.flatten() for tensor in direction.tensors.values()])
    norm = sum(float(part.square().sum()) for part in gradient.values()) ** 0.5
    return norm * float(length.norm()) / len(length) ** 0.5


def agrees(found: float, gradient: dict[str, torch.Tensor], direction: Any, within: float = 1e-4) -> bool:
    return abs(found - dot(gradient, direction)) <= within * size(gradient, direction)


def small(kind: Any, configuration: Any, **others: Any) -> Policy:
    torch.manual_seed(3)
    settings = {"vocab_size": 70, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    model = kind(configuration(**settings, **others)).eval()
    return Policy(model, tiny_policy.tokenizer(), [1], "memory")


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("weighting", ["token", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_float64_gradient_times_direction(tie: bool, weighting: Any, temperature: float) -> None:
    policy = naive_policy.policy(tie=tie)
    direction = Given(policy.model)
    settings = GradientSettings(Estimator(weighting), temperature)
    forward = ForwardMode(policy, settings, {"v": direction})
    assert forward.by_rules
    rollouts = [naive_policy.rollout(number, LENGTHS, prompt) for number, prompt in ((1, 5), (2, 9), (3, 1))]
    for rollout, found in zip(rollouts, forward.compute([task_of(r, settings) for r in rollouts]), strict=True):
        gradient = naive_policy.gradient(naive_policy.double_copy(policy.model), rollout, temperature, weighting)
        assert agrees(found.inner["v"], gradient, direction)
        assert not agrees(found.inner["v"] + 1e-3 * size(gradient, direction), gradient, direction)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_and_its_facts(name: str) -> None:
    policy = naive_policy.policy()
    direction = Given(policy.model)
    for aggregation, baseline in (("sequence", "group"), ("token", "leave-one-out")):
        settings = GradientSettings(ESTIMATORS[name], 1.0, aggregation, baseline)
        forward = ForwardMode(policy, settings, {"v": direction})
        rollouts = [naive_policy.rollout(number) for number in (1, 2)]
        found = forward.compute([task_of(rollout, settings) for rollout in rollouts])
        for rollout, one in zip(rollouts, found, strict=True):
            assert agrees(one.inner["v"], gradient_of(policy, rollout, settings), direction)
            (reference,) = ReferenceGradients(policy, settings).compute([task_of(rollout, settings)], lambda *_: None)
            assert one.gradient.entry.keys() == reference.entry.keys()
            for key, value in reference.entry.items():
                known = pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
                assert one.gradient.entry[key] == known
            assert (one.gradient.status, one.gradient.tokens) == ("ok", reference.tokens)


MODELS = {
    "llama": lambda: small(LlamaForCausalLM, LlamaConfig, **SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: small(Qwen3ForCausalLM, Qwen3Config, **SHAPE, head_dim=16, tie_word_embeddings=True),
    "gelu": lambda: small(LlamaForCausalLM, LlamaConfig, **SHAPE, hidden_act="gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("name", MODELS)
def test_rules_hold_for_other_decoders(name: str) -> None:
    policy = MODELS[name]()
    direction = Given(policy.model)
    forward = ForwardMode(policy, GradientSettings(), {"v": direction})
    assert forward.by_rules
    rollout = naive_policy.rollout(1)
    (found,) = forward.compute([task_of(rollout, GradientSettings())])
    assert agrees(found.inner["v"], gradient_of(policy, rollout, GradientSettings()), direction)


def gpt2() -> Policy:
    return small(GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def gemma2() -> Policy:
    """Soft caps and sliding windows: neither packed nor with a plain head."""
    return small(Gemma2ForCausalLM, Gemma2Config, **SHAPE, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0)


@pytest.mark.parametrize("make", [gpt2, gemma2])
def test_automatic_differentiation_where_a_rule_is_missing(make: Any) -> None:
    policy = make()
    directions = {"v": Given(policy.model), "w": Given(policy.model, 1)}
    forward = ForwardMode(policy, GradientSettings(), directions)
    assert not forward.by_rules
    rollout = naive_policy.rollout(1)
    (found,) = forward.compute([task_of(rollout, GradientSettings())])
    for name, direction in directions.items():
        assert agrees(found.inner[name], gradient_of(policy, rollout, GradientSettings()), direction)


def test_several_directions_each_as_if_alone() -> None:
    policy = naive_policy.policy()
    directions = {"v": Given(policy.model), "w": Given(policy.model, 1, "mlp"), "none": Given(policy.model, 2, "")}
    tasks = [task_of(naive_policy.rollout(number), GradientSettings()) for number in (1, 2)]
    together = ForwardMode(policy, GradientSettings(), directions).compute(tasks)
    for name, direction in directions.items():
        alone = ForwardMode(policy, GradientSettings(), {name: direction}).compute(tasks)
        for one, other in zip(together, alone, strict=True):
            assert torch.allclose(one.tangents[name], other.tangents[name], rtol=1e-5, atol=1e-5)
    assert together[0].inner["none"] == 0.0
    assert together[0].inner["v"] != pytest.approx(together[0].inner["w"])


def test_only_trained_parameters_move() -> None:
    policy = naive_policy.policy()
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("down_proj" in name or "norm" in name)
    direction, rollout = Given(policy.model), naive_policy.rollout(1)
    (found,) = ForwardMode(policy, GradientSettings(), {"v": direction}).compute([task_of(rollout, GradientSettings())])
    gradient = gradient_of(policy, rollout, GradientSettings())
    assert len(gradient) < len(direction.tensors)
    assert agrees(found.inner["v"], gradient, direction)


def test_low_rank_adapters() -> None:
    policy = naive_policy.policy()
    add_adapters(policy, 2, 0)
    direction, rollout = Given(policy.model), naive_policy.rollout(1)
    forward = ForwardMode(policy, GradientSettings(), {"v": direction})
    assert forward.by_rules
    (found,) = forward.compute([task_of(rollout, GradientSettings())])
    assert agrees(found.inner["v"], gradient_of(policy, rollout, GradientSettings()), direction)


def test_halves_need_no_pass_of_their_own() -> None:
    policy = naive_policy.policy()
    direction = Given(policy.model)
    settings = GradientSettings(Estimator("prefix", self_normalize=True))
    rollout = naive_policy.rollout(1, (*LENGTHS, (0, False), (5, True)))
    forward = ForwardMode(policy, settings, {"v": direction})
    (found,) = forward.compute([task_of(rollout, settings)])
    halves = []
    for half in (0, 1):
        part = rollout._replace(samples=rollout.samples[half::2])
        if half == 0:  # its rewards are all alike
            part.samples[0] = part.samples[0]._replace(reward=0.25)
        task, rows = task_of(part, settings), range(half, len(rollout.samples), 2)
        inner = inner_of(found, task, rows, settings)
        assert inner is not None
        halves.append(inner["v"])
        assert agrees(halves[-1], gradient_of(policy, part, settings), direction)
        with pytest.raises(ValueError, match="r1"):
            inner_of(found, task, rows[:1], settings)
    assert halves[0] != pytest.approx(halves[1])


def test_batches_and_passes_change_rounding_only() -> None:
    policy = naive_policy.policy()
    directions = {"v": Given(policy.model)}
    settings = GradientSettings(Estimator("token", self_normalize=True))
    tasks = [task_of(naive_policy.rollout(number, LENGTHS, prompt), settings) for number, prompt in ((1, 5), (2, 30))]
    together = ForwardMode(policy, settings, directions).compute(tasks)
    for limit in (1, 20, 10_000):
        forward = ForwardMode(policy, settings, directions, max_tokens=limit)
        for task, expected in zip(tasks, together, strict=True):
            (found,) = forward.compute([task])
            assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-5)
            assert torch.allclose(found.tangents["v"], expected.tangents["v"], rtol=1e-4, atol=1e-4)
            assert found.inner == pytest.approx(expected.inner, rel=1e-4)
    # a pass a response: the prompt each time, and all of the response but its last token
    expected_tokens = 4 * len(tasks[1].prompt) + tasks[1].tokens - 4
    assert ForwardMode(policy, settings, directions, max_tokens=1).compute(tasks[1:])[0].gradient.tokens == (
        expected_tokens
    )


def test_room() -> None:
    policy = naive_policy.policy()
    task = task_of(naive_policy.rollout(1), GradientSettings())
    tokens = len(task.prompt) + task.tokens
    forward = ForwardMode(policy, GradientSettings(), {"v": Given(policy.model)}, max_tokens=2 * tokens)
    assert forward.room_for([], task)
    assert forward.room_for([task], task)
    assert not forward.room_for([task, task], task)
    wide = ForwardMode(policy, GradientSettings(), {"v": Given(policy.model)}, max_tokens=10**9)
    assert not wide.room_for([task] * (TOKENS_TOGETHER // tokens), task)
    unpackable = gemma2()
    rows = ForwardMode(unpackable, GradientSettings(), {"v": Given(unpackable.model)})
    assert rows.room_for([], task)
    assert not rows.room_for([task], task)


def test_recomputed_behavior() -> None:
    policy, behavior = naive_policy.policy(seed=0), naive_policy.policy(seed=3)
    direction = Given(policy.model)
    settings = GradientSettings(policy_temperature=0.6)
    rollouts = [naive_policy.rollout(number) for number in (1, 2)]
    tasks = [task_of(rollout, settings) for rollout in rollouts]
    for limit in (10_000, 20):
        forward = ForwardMode(policy, settings, {"v": direction}, behavior, limit)
        found = forward.compute(tasks) if limit > 20 else [forward.compute([task])[0] for task in tasks]
        for rollout, one in zip(rollouts, found, strict=True):
            gradient = naive_policy.gradient(
                naive_policy.double_copy(policy.model), rollout, 0.6, behavior=naive_policy.double_copy(behavior.model)
            )
            assert agrees(one.inner["v"], gradient, direction)


def test_long_attention_is_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = naive_policy.policy()
    direction, rollout = Given(policy.model), naive_policy.rollout(1)
    forward = ForwardMode(policy, GradientSettings(), {"v": direction})
    tasks = [task_of(rollout, GradientSettings()), task_of(naive_policy.rollout(2), GradientSettings())]
    (whole, _) = forward.compute(tasks)
    monkeypatch.setattr("cropi_tools.gradients.jvp_rules._SCORES", 1)
    monkeypatch.setattr("cropi_tools.gradients.jvp_rules.CHUNK_ELEMENTS", 300)
    (pieces, _) = forward.compute(tasks)
    assert torch.allclose(pieces.tangents["v"], whole.tangents["v"], rtol=1e-5, atol=1e-5)


def state_of(model: Any) -> tuple[Any, ...]:
    parameters = [(name, p, p.requires_grad, p.grad, p._version, type(p)) for name, p in model.named_parameters()]
    forwards = [vars(module).get("forward") for module in model.modules()]
    return parameters, forwards, model.config._attn_implementation, model.training


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    pairs = zip(before[0], after[0], strict=True)
    return before[1:] == after[1:] and all(one[1] is other[1] and one[2:] == other[2:] for one, other in pairs)


class _NoForwardMode(torch.autograd.Function):
    """An operation without a forward-mode derivative."""

    @staticmethod
    def forward(context: Any, states: torch.Tensor) -> torch.Tensor:
        return states * 2

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class _Doubling(torch.nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return _NoForwardMode.apply(states)


@pytest.fixture(params=[naive_policy.policy, gpt2, gemma2])
def any_policy(request: pytest.FixtureRequest) -> Policy:
    policy = request.param()
    next(policy.model.parameters()).requires_grad_(False)
    return policy


def test_the_model_is_as_before(any_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(any_policy.model)
    forward = ForwardMode(any_policy, GradientSettings(), {"v": Given(any_policy.model)})
    assert same(before, state_of(any_policy.model))
    task = task_of(naive_policy.rollout(1), GradientSettings())
    forward.compute([task])
    assert same(before, state_of(any_policy.model))

    class Stopped(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    last = list(any_policy.model.base_model.modules())[-1]
    hook = last.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        forward.compute([task])
    hook.remove()
    assert same(before, state_of(any_policy.model))


def test_refuses_a_model_without_forward_mode_derivatives() -> None:
    policy = naive_policy.policy()
    policy.model.model.layers[1].mlp.act_fn = _Doubling()
    before = state_of(policy.model)
    with pytest.raises(InputError) as caught:
        ForwardMode(policy, GradientSettings(), {"v": Given(policy.model)})
    assert "\n" not in str(caught.value)
    assert "memory" in str(caught.value)
    assert "--method reference" in str(caught.value)
    assert same(before, state_of(policy.model))


def test_what_the_rules_get_wrong_is_noticed() -> None:
    """A gated module that does more than its rule knows."""
    policy = naive_policy.policy()
    gated = policy.model.model.layers[0].mlp

    class Bounded(type(gated)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states).tanh()

    gated.__class__ = Bounded
    direction, rollout = Given(policy.model), naive_policy.rollout(1)
    mode = ForwardMode(policy, GradientSettings(), {"v": direction})
    assert not mode.by_rules
    (found,) = mode.compute([task_of(rollout, GradientSettings())])
    assert agrees(found.inner["v"], gradient_of(policy, rollout, GradientSettings()), direction)


def test_bfloat16_weights() -> None:
    policy = naive_policy.policy()
    direction, rollout = Given(policy.model), naive_policy.rollout(1)
    gradient = gradient_of(policy, rollout, GradientSettings())
    narrow = policy._replace(model=policy.model.to(torch.bfloat16))
    (found,) = ForwardMode(narrow, GradientSettings(), {"v": direction}).compute([task_of(rollout, GradientSettings())])
    assert found.tangents["v"].dtype == torch.float32
    assert agrees(found.inner["v"], gradient, direction, 0.3)


def test_directions_are_read_from_means(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    given, rollout = Given(policy.model), naive_policy.rollout(1)
    write_mean(tmp_path / "mean.safetensors", given.tensors, {})
    direction = Direction(tmp_path / "mean.safetensors")
    (found,) = ForwardMode(policy, GradientSettings(), {"v": direction}).compute([task_of(rollout, GradientSettings())])
    assert agrees(found.inner["v"], gradient_of(policy, rollout, GradientSettings()), given)


def test_a_wrong_rule_is_found_out_where_the_direction_avoids_the_tried_tokens() -> None:
    """A norm without bias that is no RMS norm; only the embedding moves, and not where the trial looks."""
    policy = naive_policy.policy(tie=False)
    for parent in list(policy.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, torch.nn.LayerNorm(child.weight.numel(), bias=False))
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name)
    tried = {(7 * place + 3) % policy.vocabulary for place in range(16)}
    free = [token for token in range(2, policy.vocabulary) if token not in tried]
    made = naive_policy.rollout(5)
    made = made._replace(
        prompt_token_ids=[free[token % len(free)] for token in made.prompt_token_ids],
        samples=[s._replace(token_ids=[free[token % len(free)] for token in s.token_ids]) for s in made.samples],
    )
    (gradient,) = naive_policy.gradient(policy.model, made).values()
    direction = Given(policy.model)
    (name,) = (name for name, p in policy.model.named_parameters() if p.requires_grad)
    moved = direction.get(name, torch.device("cpu"))
    assert moved is not None
    moved *= gradient.reshape(-1) != 0
    (found,) = ForwardMode(policy, GradientSettings(), {"v": direction}).compute([task_of(made, GradientSettings())])
    expected = float(gradient.reshape(-1).double() @ moved.double())
    assert found.inner["v"] == pytest.approx(expected, abs=1e-4 * float(gradient.norm() * moved.norm()))


def test_an_objective_that_is_flat_is_told() -> None:
    policy = naive_policy.policy()
    rollout = naive_policy.rollout(1, ((5, True), (6, True)), drift=0.0)
    far = [s._replace(logprobs=[x - 1.0 if s.reward == 1.0 else x + 1.0 for x in s.logprobs]) for s in rollout.samples]
    settings = GradientSettings(Estimator("token", ppo_clip=(0.2, 0.2)))
    (found,) = ForwardMode(policy, settings, {"v": Given(policy.model)}).compute(
        [task_of(rollout._replace(samples=far), settings)]
    )
    assert found.flat
    assert found.inner == {"v": 0.0}
    task = task_of(rollout._replace(samples=far), settings)
    assert inner_of(found, task, range(2), settings) is None
    (other,) = ForwardMode(policy, settings, {"v": Given(policy.model)}).compute([task_of(rollout, settings)])
    assert not other.flat
