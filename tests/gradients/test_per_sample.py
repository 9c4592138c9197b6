"""Several prompts a pass: against the reference path, and against float64 automatic differentiation; what it refuses; what it leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import naive_policy
import pytest
import tiny_policy
import torch
import transformers

from cropi_tools.data.records import Rollout
from cropi_tools.gradients import per_sample
from cropi_tools.gradients.per_sample import FastGradients
from cropi_tools.gradients.per_sample_rules import NoRule
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, PromptGradient, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.objective import Estimator
from cropi_tools.policy.layers import checkpoint_activations
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.parameters import add_adapters, train_only
from cropi_tools.runtime.errors import InputError

SETTINGS = GradientSettings()
UNEQUAL = ((7, True), (12, False), (1, False), (3, True))
EQUAL = ((6, False), (6, False), (6, True))
EMPTY = ((1, True), (0, False), (5, False))
SIZES = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}

Gradients = dict[str, torch.Tensor]


def rollouts() -> list[Rollout]:
    """Prompts and responses of different lengths, one without a token among them."""
    return [
        naive_policy.rollout(number, responses, prompt)
        for number, (responses, prompt) in enumerate([(UNEQUAL, 5), (EQUAL, 2), (EMPTY, 9), (UNEQUAL, 1), (EQUAL, 5)])
    ]


def tasks_of(made: Sequence[Rollout], settings: GradientSettings = SETTINGS) -> list[GradientTask]:
    found = [prepare(rollout, settings) for rollout in made]
    return [task for task in found if isinstance(task, GradientTask)]


def gradients_of(path: Any, tasks: Sequence[GradientTask]) -> tuple[list[Gradients], list[PromptGradient]]:
    """The gradients of each task, computed together, with what the path says of it."""
    found: list[Gradients] = [{} for _ in tasks]

    def consume(name: str, gradients: torch.Tensor) -> None:
        assert len(gradients) == len(tasks)
        for own, gradient in zip(found, gradients, strict=True):
            assert name not in own  # once a parameter, tied weights included
            own[name] = gradient.clone()

    return found, path.compute(tasks, consume)


def one_by_one(path: Any, tasks: Sequence[GradientTask]) -> tuple[list[Gradients], list[PromptGradient]]:
    pairs = [gradients_of(path, [task]) for task in tasks]
    return [gradient for (gradient,), _ in pairs], [told for _, (told,) in pairs]


def assert_equal(found: Sequence[Gradients], expected: Sequence[Gradients], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one
        assert naive_policy.relative_error(one, other) < tolerance


def assert_equal_paths(
    policy: Policy, settings: GradientSettings = SETTINGS, behavior: Policy | None = None, made: Any = None
) -> None:
    tasks = tasks_of(made or rollouts(), settings)
    found, told = gradients_of(FastGradients(policy, settings, behavior), tasks)
    expected, told_too = one_by_one(ReferenceGradients(policy, settings, behavior), tasks)
    assert_equal(found, expected)
    for one, other in zip(told, told_too, strict=True):
        assert one.tokens == other.tokens
        assert one.entry.keys() == other.entry.keys()
        for name, value in one.entry.items():
            number = isinstance(value, float)
            assert value == (pytest.approx(other.entry[name], rel=1e-4, abs=1e-6) if number else other.entry[name])


def policy_of(kind: str, **settings: Any) -> Policy:
    """A policy of another family; vectors (norms, biases) away from the ones and zeros they start with."""
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**SIZES, **settings})
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + suffix)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return Policy(model, tiny_policy.tokenizer(), [1], "memory")


FAMILIES: dict[str, Callable[[], Policy]] = {
    "Qwen2": lambda: policy_of("Qwen2", tie_word_embeddings=True),
    "Qwen3, a norm a head": lambda: policy_of("Qwen3", head_dim=8, tie_word_embeddings=False),
    "Llama, biases": lambda: policy_of("Llama", attention_bias=True, mlp_bias=True),
    "Gemma, scaled embedding, 1 + weight": lambda: policy_of("Gemma", head_dim=8),
    "GPT-2, transposed weights": lambda: policy_of("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Phi, LayerNorm, head with bias": lambda: policy_of("Phi"),
    "Olmo2, a norm of all heads": lambda: policy_of("Olmo2"),
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("weighting", "temperature"), [("token", 1.0), ("token", 0.6), ("none", 1.0)])
def test_float64_twin(tie: bool, weighting: Any, temperature: float) -> None:
    settings = GradientSettings(Estimator(weighting), temperature)
    policy = naive_policy.policy(tie=tie)
    found, _ = gradients_of(FastGradients(policy, settings), tasks_of(rollouts(), settings))
    twin = naive_policy.double_copy(policy.model)
    assert_equal(found, [naive_policy.gradient(twin, each, temperature, weighting) for each in rollouts()])


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_the_reference(family: str) -> None:
    assert_equal_paths(FAMILIES[family]())


@pytest.mark.parametrize(
    "family", ["Qwen3, a norm a head", "GPT-2, transposed weights", "Phi, LayerNorm, head with bias"]
)
def test_families_float64_twin(family: str) -> None:
    policy = FAMILIES[family]()
    found, _ = gradients_of(FastGradients(policy, SETTINGS), tasks_of(rollouts()))
    twin = naive_policy.double_copy(policy.model)
    assert_equal(found, [naive_policy.gradient(twin, each) for each in rollouts()])


@pytest.mark.parametrize(
    "settings",
    [
        GradientSettings(Estimator("prefix")),
        GradientSettings(Estimator("suffix", weight_clip=(0.5, 2.0)), 0.8, "token"),
        GradientSettings(Estimator("trajectory"), 1.0, "constant", "leave-one-out"),
        GradientSettings(Estimator("sequence", ppo_clip=(0.1, 0.2)), 1.0, "sequence", "centered"),
        GradientSettings(Estimator("token", ppo_clip=(0.05, 0.05))),
        GradientSettings(Estimator("token", weight_clip=(0.9, 1.1), self_normalize=True)),
        GradientSettings(Estimator("prefix", self_normalize=True), 0.7),
    ],
    ids=lambda settings: f"{settings.estimator.weighting} {settings.aggregation} {settings.baseline}",
)
def test_objectives(settings: GradientSettings) -> None:
    assert_equal_paths(naive_policy.policy(), settings)


@pytest.mark.parametrize(
    "patterns",
    [
        ["*norm*"],
        ["model.layers.1.*"],
        ["*bias"],
        ["model.layers.0.self_attn.q_proj.weight"],
        ["model.embed_tokens.weight"],
        ["lm_head.weight"],
        ["lm_head.weight", "model.layers.0.mlp.*"],
    ],
    ids=" ".join,
)
def test_subsets_of_parameters(patterns: list[str]) -> None:
    policy = naive_policy.policy(tie=False)
    train_only(policy, patterns)
    assert_equal_paths(policy)


def test_untrained_modules_are_left_alone() -> None:
    policy = naive_policy.policy()
    train_only(policy, ["model.layers.1.mlp.*"])
    path, seen = FastGradients(policy, SETTINGS), []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen.append((len(module._forward_hooks), output.requires_grad))

    lower, upper = policy.model.model.layers[0].mlp.down_proj, policy.model.model.layers[1].mlp.down_proj
    for module in (lower, upper):
        module.register_forward_hook(note)
    gradients_of(path, tasks_of(rollouts()))
    assert seen == [(1, False), (2, True)]  # this hook alone, and no graph below what is trained


def test_adapters() -> None:
    pytest.importorskip("peft")
    policy = naive_policy.policy()
    add_adapters(policy, 2, 0)
    assert_equal_paths(policy)


def test_a_module_used_twice() -> None:
    policy = naive_policy.policy()
    layers = policy.model.model.layers
    layers[1].mlp = layers[0].mlp
    assert_equal_paths(policy)


def test_a_use_that_has_no_part_in_the_objective() -> None:
    policy = naive_policy.policy()
    mlp = policy.model.model.layers[0].mlp

    def use_for_nothing(module: Any, inputs: Any) -> None:
        module.up_proj(inputs[0])

    mlp.register_forward_pre_hook(use_for_nothing)
    assert_equal_paths(policy)


def test_padding_token_learns_nothing_as_an_input() -> None:
    made = [each._replace(prompt_token_ids=[0, *each.prompt_token_ids, 0]) for each in rollouts()]
    for tie in (True, False):
        policy = naive_policy.policy(tie=tie)
        assert policy.model.model.embed_tokens.padding_idx == 0
        assert_equal_paths(policy, made=made)


def test_behavior_policy() -> None:
    other = naive_policy.policy(seed=0, scale=0.31)
    assert_equal_paths(naive_policy.policy(), behavior=other)
    sliding = policy_of("Mistral", sliding_window=4)  # cannot be packed
    assert_equal_paths(policy_of("Llama"), behavior=sliding)


def test_the_batch_changes_nothing() -> None:
    path, tasks = FastGradients(naive_policy.policy(), SETTINGS), tasks_of(rollouts())
    together, _ = gradients_of(path, tasks)
    backwards, _ = gradients_of(path, tasks[::-1])
    alone, _ = one_by_one(path, tasks)
    assert_equal(together, backwards[::-1])
    assert_equal(together, alone)


def test_double_and_half_precision() -> None:
    policy, tasks = naive_policy.policy(), tasks_of(rollouts())
    wide = policy._replace(model=copy.deepcopy(policy.model).double())
    expected = [naive_policy.gradient(naive_policy.double_copy(policy.model), each) for each in rollouts()]
    found, _ = gradients_of(FastGradients(wide, SETTINGS), tasks)
    assert found[0]["model.norm.weight"].dtype == torch.float64
    assert_equal(found, expected)
    narrow = policy._replace(model=copy.deepcopy(policy.model).bfloat16())
    found, _ = gradients_of(FastGradients(narrow, SETTINGS), tasks)
    reference, _ = one_by_one(ReferenceGradients(narrow, SETTINGS), tasks)
    assert found[0]["model.norm.weight"].dtype == torch.bfloat16
    assert_equal(found, reference, 0.05)


def test_a_prompt_too_long_takes_the_reference_path() -> None:
    policy = naive_policy.policy()
    task = max(tasks_of(rollouts()), key=lambda task: task.tokens)
    path = FastGradients(policy, SETTINGS, max_tokens=20)
    assert path.room_for([], task)
    assert not path.room_for([task], task)
    found, (told,) = gradients_of(path, [task])
    expected, _ = gradients_of(ReferenceGradients(policy, SETTINGS, max_tokens=20), [task])
    assert_equal(found, expected)
    assert told.tokens > len(task.prompt) + task.tokens  # the prompt once a pass


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    path, (task, *_) = FastGradients(naive_policy.policy(), SETTINGS), tasks_of(rollouts())

    def most() -> int:
        tasks: list[GradientTask] = []
        while path.room_for(tasks, task):
            tasks.append(task)
        return len(tasks)

    vocabulary, width = 71, 32
    assert most() == per_sample.CPU_STATES // width // (len(task.prompt) + task.tokens)
    monkeypatch.setattr(per_sample, "CPU_STATES", 1)
    path = FastGradients(naive_policy.policy(), SETTINGS)
    assert most() == per_sample.CPU_TOKENS // (len(task.prompt) + task.tokens)
    monkeypatch.setattr(per_sample, "GRADIENT_BYTES", 6 * vocabulary * width * 4)
    assert most() == 6
    monkeypatch.setattr(per_sample, "CHUNK_ELEMENTS", 4 * task.tokens * vocabulary)
    assert most() == 4
    assert path.room_for([], task._replace(responses=[[2] * 5000]))


class Gain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(states) * self.gain


class SquaredRMSNorm(torch.nn.Module):
    """Looks like a norm that there is a rule for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.full((size,), 1.5)), 1e-6

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(states, states.shape[-1:]) * self.weight**2


def test_refuses_a_module_without_a_rule_by_name() -> None:
    policy = naive_policy.policy()
    policy.model.model.layers[1].mlp.act_fn = Gain()
    with pytest.raises(NoRule, match=r"^model\.layers\.1\.mlp\.act_fn \(Gain\) has no rule for per-prompt gradients$"):
        FastGradients(policy, SETTINGS)
    policy.model.model.layers[1].mlp.act_fn.gain.requires_grad_(False)  # needs none then
    assert_equal_paths(policy)


def test_refuses_a_module_whose_rule_is_wrong() -> None:
    policy = naive_policy.policy()
    policy.model.model.layers[0].input_layernorm = SquaredRMSNorm(32)
    with pytest.raises(NoRule, match=r"^model\.layers\.0\.input_layernorm \(SquaredRMSNorm\) has no rule"):
        FastGradients(policy, SETTINGS)


def test_refuses_a_weight_that_is_used_outside_its_module() -> None:
    policy = naive_policy.policy()
    mlp = policy.model.model.layers[0].mlp
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ mlp.gate_proj.weight.T)
    with pytest.raises(NoRule, match=r"^model\.layers\.0\.mlp\.gate_proj \(Linear\) has no rule"):
        FastGradients(policy, SETTINGS)


def test_refuses_what_it_cannot_compute() -> None:
    with pytest.raises(NoRule, match="MistralForCausalLM gives other results when several prompts lie in one row"):
        FastGradients(policy_of("Mistral", sliding_window=4), SETTINGS)
    with pytest.raises(NoRule, match="GraniteForCausalLM does more than its output embedding"):
        FastGradients(policy_of("Granite", logits_scaling=8.0), SETTINGS)
    policy = naive_policy.policy()
    checkpoint_activations(policy.model)
    with pytest.raises(NoRule, match="recomputes activations"):
        FastGradients(policy, SETTINGS)


def test_leaves_the_policy_as_it_was() -> None:
    policy = naive_policy.policy()
    train_only(policy, ["*weight"])
    trained = {name: parameter.requires_grad for name, parameter in policy.model.named_parameters()}

    def assert_untouched() -> None:
        for name, parameter in policy.model.named_parameters():
            assert parameter.requires_grad == trained[name]
            assert parameter.grad is None
        assert not any(module._forward_hooks for module in policy.model.modules())
        assert policy.model.config._attn_implementation == "sdpa"

    path, tasks = FastGradients(policy, SETTINGS), tasks_of(rollouts())
    assert_untouched()
    gradients_of(path, tasks)
    assert_untouched()

    def fail(name: str, gradients: torch.Tensor) -> None:
        raise ArithmeticError(name)

    with pytest.raises(ArithmeticError):
        path.compute(tasks, fail)
    assert_untouched()
    lost = tasks[1].rollout._replace(samples=[each._replace(logprobs=None) for each in tasks[1].rollout.samples])
    with pytest.raises(InputError, match="prompt 'r1': sample 0 has no log-probabilities"):
        path.compute([tasks[0], tasks[1]._replace(rollout=lost)], fail)
    assert_untouched()
    found, _ = gradients_of(path, tasks)
    expected, _ = one_by_one(ReferenceGradients(policy, SETTINGS), tasks)
    assert_equal(found, expected)
