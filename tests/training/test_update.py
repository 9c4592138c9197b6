"""The GRPO loss and its gradient against a naive float64 twin."""

from __future__ import annotations

import itertools
import random
from typing import Any

import naive_policy
import pytest
import torch
from training_runs import add_gradient, options_of

from cropi_tools.data.records import Sample
from cropi_tools.policy import packing
from cropi_tools.policy.loading import Policy
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loss_settings import LossSettings
from cropi_tools.training.update import Updater, clip_gradient

CLIP = (0.2, 0.28)


def backward(
    policy: Policy, reference: Policy | None, rollouts: list[dict[str, Any]], loss: LossSettings, **given: Any
) -> dict[str, float]:
    """Add the loss's gradient to the policy's; the figures."""
    return add_gradient(Updater(policy, reference, options_of(loss, **given), Ranks()), rollouts)


def batch(drift: float = 0.6) -> list[dict[str, Any]]:
    """Four prompts of ragged length: ended, cut, empty responses, and a group with equal rewards."""
    shapes = [
        ((7, True), (12, False), (1, False)),
        ((4, True), (4, True), (9, True)),
        ((1, True), (0, False), (5, False)),
    ]
    made = [naive_policy.rollout(n, shape, prompt=3 + n, drift=drift) for n, shape in enumerate(shapes)]
    flat = naive_policy.rollout(3, ((11, True), (6, False), (2, True)))
    made.insert(1, flat._replace(samples=[sample._replace(reward=0.1) for sample in flat.samples]))
    records = [naive_policy.record(rollout) for rollout in made]
    for record in records:
        for sample in record["samples"]:
            sample["finish_reason"] = "stop" if sample["token_ids"][-1:] == [1] else "length"
    return records


def naive_advantages(rewards: list[float], baseline: str) -> list[float]:
    """By the definitions."""
    mean = sum(rewards) / len(rewards)
    if baseline == "group":
        return naive_policy.advantages(rewards)
    if baseline == "centered":
        return [reward - mean for reward in rewards]
    return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]


def naive_loss(
    model: Any, reference: Any, rollouts: list[dict[str, Any]], settings: LossSettings, old: Any = None
) -> torch.Tensor:
    """The module's formula, one response and one token at a time, as one float64 graph. old: the model before the step's first update."""
    responses = sum(len(record["samples"]) for record in rollouts)
    masked = lambda sample: settings.mask_truncated and sample["finish_reason"] == "length"  # noqa: E731
    every = [sample for record in rollouts for sample in record["samples"]]
    every_token = sum(len(sample["token_ids"]) for sample in every if not masked(sample))
    loss = torch.zeros((), dtype=torch.float64)
    for record in rollouts:
        rewards = [sample["reward"] for sample in record["samples"]]
        if len(set(rewards)) == 1:
            continue
        advantages = naive_advantages(rewards, settings.advantage)
        for advantage, sample in zip(advantages, record["samples"], strict=True):
            tokens = sample["token_ids"]
            if not tokens or masked(sample):
                continue
            share = {
                "token": 1 / every_token,
                "sequence": 1 / (responses * len(tokens)),
                "constant": 1 / (responses * settings.fixed_length),
            }[settings.aggregation]
            pair = record["prompt_token_ids"], tokens
            table = naive_policy.all_logprobs(model, *pair, settings.temperature)
            with torch.no_grad():
                known = None if reference is None else naive_policy.logprobs(reference, *pair, settings.temperature)
                before = naive_policy.logprobs(old or model, *pair, settings.temperature)
            for t, token in enumerate(tokens):
                logpi = table[t, token]
                anchor, weight = torch.tensor(sample["logprobs"][t], dtype=torch.float64), torch.tensor(1.0)
                if settings.importance_cap:
                    weight = torch.exp(before[t] - anchor).clamp(max=settings.importance_cap)
                    anchor = before[t]
                rho = torch.exp(logpi - anchor)
                bounded = min(max(rho, torch.tensor(1 - settings.clip[0])), torch.tensor(1 + settings.clip[1]))
                loss = loss - share * weight * min(rho * advantage, bounded * advantage)
                if known is not None:
                    loss = loss + settings.kl * share * (torch.exp(known[t] - logpi) - 1 - (known[t] - logpi))
                loss = loss - settings.entropy * share * -(table[t].exp() * table[t]).sum()
    return loss


def equal_float64(policy: Policy, reference: Policy | None, settings: LossSettings) -> dict[str, float]:
    """Compare loss and gradient of the batch with the naive ones; the figures."""
    found = backward(policy, reference, batch(), settings)
    wide = naive_policy.double_copy(policy.model)
    loss = naive_loss(wide, None if reference is None else naive_policy.double_copy(reference.model), batch(), settings)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in wide.named_parameters()}
    gradient = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    assert naive_policy.relative_error(gradient, expected) < 1e-5
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-7)
    assert reference is None or all(parameter.grad is None for parameter in reference.model.parameters())
    return found


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(("kl", "entropy"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_equal_float64(aggregation: Any, kl: float, entropy: float, temperature: float) -> None:
    reference = naive_policy.policy(seed=5) if kl else None
    found = equal_float64(naive_policy.policy(), reference, LossSettings(temperature, CLIP, kl, entropy, aggregation))
    assert 0.02 < found["clip_fraction"] < 0.9  # the clip has a part in this test


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("advantage", ["group", "centered", "leave-one-out"])
@pytest.mark.parametrize(("mask_truncated", "cap"), [(True, 0.0), (False, 1.1), (True, 1.1)])
def test_every_word_of_the_objective_equals_float64(
    aggregation: Any, advantage: Any, mask_truncated: bool, cap: float
) -> None:
    settings = LossSettings(1.0, CLIP, 0.3, 0.1, aggregation, advantage, 13, mask_truncated, cap)
    found = equal_float64(naive_policy.policy(), naive_policy.policy(seed=5), settings)
    assert (0.05 < found["capped_fraction"] < 0.95) == bool(cap)
    whole = equal_float64(naive_policy.policy(), naive_policy.policy(seed=5), settings._replace(mask_truncated=False))
    assert (found["tokens_trained"] < whole["tokens_trained"]) == mask_truncated


def test_later_mini_batches_are_weighed_from_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates with a cap: the second's ratios and weights are to the policy before the first."""
    settings = LossSettings(1.0, CLIP, 0.0, 0.0, "token", importance_cap=1.1)
    policy = naive_policy.policy()
    before = naive_policy.double_copy(policy.model)
    made = Updater(policy, None, options_of(settings, learning_rate=3e-2), Ranks())
    gradients: list[dict[str, torch.Tensor]] = []
    models: list[Any] = []
    plain = made._gradient

    def watched(groups: Any) -> dict[str, float]:
        models.append(naive_policy.double_copy(policy.model))
        found = plain(groups)
        gradients.append({name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()})
        return found

    monkeypatch.setattr(made, "_gradient", watched)
    parts = [batch()[:2], batch()[2:]]
    made.step(parts, 3e-2)
    for part, model, gradient in zip(parts, models, gradients, strict=True):
        naive_loss(model, None, part, settings, old=before).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert naive_policy.relative_error(gradient, expected) < 1e-4
    drifted = naive_policy.double_copy(models[1])
    naive_loss(drifted, None, parts[1], settings, old=drifted).backward()
    wrong = {name: parameter.grad for name, parameter in drifted.named_parameters()}
    assert naive_policy.relative_error(gradients[1], wrong) > 1e-2, "the first update is too small to tell"


def test_packed_and_padded_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = naive_policy.policy(), naive_policy.policy(seed=5)
    settings = LossSettings(0.7, CLIP, 0.3, 0.2, "token")

    def run() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        policy.model.zero_grad(set_to_none=True)
        found = backward(policy, reference, batch(), settings)
        return found, {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}

    assert packing.can_pack(policy.model)
    figures, expected = run()
    monkeypatch.setattr(packing, "can_pack", lambda model: False)
    again, gradient = run()
    assert naive_policy.relative_error(gradient, expected) < 5e-6
    assert again == pytest.approx(figures, rel=1e-5)


def test_figures_are_means_over_the_tokens_trained_on() -> None:
    policy, reference = naive_policy.policy(), naive_policy.policy(seed=5)
    found = backward(policy, reference, batch(), LossSettings(0.7, CLIP, 0.1, 0.0, "token"))
    wide, known = naive_policy.double_copy(policy.model), naive_policy.double_copy(reference.model)
    sums, tokens = dict.fromkeys(("kl", "behavior_kl", "entropy", "clip_fraction"), 0.0), 0
    with torch.no_grad():
        for record in batch():
            rewards = [sample["reward"] for sample in record["samples"]]
            if len(set(rewards)) == 1:
                continue
            for advantage, sample in zip(naive_policy.advantages(rewards), record["samples"], strict=True):
                if not sample["token_ids"]:
                    continue
                pair = record["prompt_token_ids"], sample["token_ids"]
                mine = naive_policy.logprobs(wide, *pair, 0.7)
                for_reference = naive_policy.logprobs(known, *pair, 0.7) - mine
                moved = mine - torch.tensor(sample["logprobs"], dtype=torch.float64)
                table = naive_policy.all_logprobs(wide, *pair, 0.7)
                sums["kl"] += float((for_reference.exp() - 1 - for_reference).sum())
                sums["behavior_kl"] += float((moved.exp() - 1 - moved).sum())
                sums["entropy"] += float(-(table.exp() * table).sum())
                ratio = moved.exp()
                beyond = ratio > 1 + CLIP[1] if advantage > 0 else ratio < 1 - CLIP[0]
                sums["clip_fraction"] += int(beyond.sum()) if advantage else 0
                tokens += len(pair[1])
    assert found["tokens_trained"] == tokens
    for name, value in sums.items():
        assert found[name] == pytest.approx(value / tokens, rel=1e-4), name


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_micro_batches_change_rounding_only(aggregation: Any) -> None:
    policy, reference = naive_policy.policy(), naive_policy.policy(seed=5)
    settings = LossSettings(1.0, CLIP, 0.3, 0.2, aggregation)

    def run(rollouts: list[dict[str, Any]], limit: int = 16384) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        policy.model.zero_grad(set_to_none=True)
        found = backward(policy, reference, rollouts, settings, tokens_per_pass=limit)
        return found, {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}

    figures, expected = run(batch())
    shuffled = batch()
    random.Random(0).shuffle(shuffled)
    for limit, rollouts in itertools.product((1, 35, 10**9), (batch(), shuffled)):
        again, gradient = run(rollouts, limit)
        assert naive_policy.relative_error(gradient, expected) < 5e-6
        assert again == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_groups_without_advantage_give_no_gradient_but_stay_in_the_denominator(aggregation: Any) -> None:
    """Neither KL nor entropy may pull on them; leaving them out altogether scales the rest by the counts alone."""
    policy, reference = naive_policy.policy(), naive_policy.policy(seed=5)
    settings = LossSettings(1.0, CLIP, 0.3, 0.2, aggregation)

    def run(rollouts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        policy.model.zero_grad(set_to_none=True)
        backward(policy, reference, rollouts, settings)
        return {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}

    whole, live = batch(), [record for place, record in enumerate(batch()) if place != 1]

    def size(rollouts: list[dict[str, Any]]) -> int:
        samples = [sample for record in rollouts for sample in record["samples"]]
        return len(samples) if aggregation == "sequence" else sum(len(sample["token_ids"]) for sample in samples)

    assert size(whole) > size(live)
    scaled = {name: value * size(live) / size(whole) for name, value in run(live).items()}
    assert naive_policy.relative_error(run(whole), scaled) < 1e-6


def test_a_batch_without_any_advantage_is_no_step() -> None:
    policy = naive_policy.policy()
    found = backward(policy, None, [batch()[1]], LossSettings(1.0, CLIP, 0.0, 0.2, "token"))
    assert found == {
        "loss": 0.0,
        "kl": 0.0,
        "behavior_kl": 0.0,
        "behavior_gap": 0.0,
        "entropy": 0.0,
        "clip_fraction": 0.0,
        "capped_fraction": 0.0,
        "tokens_trained": 0.0,
    }
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert clip_gradient(list(policy.model.parameters()), 1.0) == 0.0


def test_on_policy_gradient_is_that_of_cropi_grad() -> None:
    """One objective for both: with sequence aggregation the step is minus the mean of the prompts' gradients."""
    from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
    from cropi_tools.gradients.reference import ReferenceGradients

    policy = naive_policy.policy()
    rollouts = [naive_policy.rollout(n, drift=0.0) for n in range(3)]
    backward(
        policy, None, [naive_policy.record(r) for r in rollouts], LossSettings(1.0, (0.2, 0.2), 0.0, 0.0, "sequence")
    )
    step = {name: -parameter.grad.clone() for name, parameter in policy.model.named_parameters()}
    path, total = ReferenceGradients(policy, GradientSettings()), {n: torch.zeros_like(v) for n, v in step.items()}
    for rollout in rollouts:
        task = prepare(rollout, GradientSettings())
        assert isinstance(task, GradientTask)
        path.compute([task], lambda name, gradients: total[name].add_(gradients[0] / 3))
    assert naive_policy.relative_error(step, total) < 1e-5


def test_gradient_flat_where_every_token_is_clipped() -> None:
    policy = naive_policy.policy()
    rollout = naive_policy.rollout(1, ((5, True), (6, True)), drift=0.0)
    far = [
        Sample(s.token_ids, [value - 1.0 if s.reward == 1.0 else value + 1.0 for value in s.logprobs], s.reward)
        for s in rollout.samples
    ]
    record = naive_policy.record(rollout._replace(samples=far))
    found = backward(policy, None, [record], LossSettings(1.0, CLIP, 0.0, 0.0, "token"))
    assert found["clip_fraction"] == 1.0
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in policy.model.parameters())


def test_clip_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    for largest, expected in ((10.0, 5.0), (1.0, 1.0), (0.0, 5.0)):
        parameter.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
        assert clip_gradient([parameter], largest) == pytest.approx(5.0)
        assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-5)
    parameter.grad = torch.full((4,), float("nan"))
    assert clip_gradient([parameter], 1.0) != clip_gradient([parameter], 1.0)
