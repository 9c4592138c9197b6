"""The training loss against TRL's: by TRL's own code on the same tensors, and by a real GRPOTrainer on the same rollouts of a policy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import naive_policy
import pytest
import tiny_policy
import torch
from training_runs import add_gradient, options_of
from trl_loss import HIGH, LENGTHS, LIMIT, LOSSES, LOW, REWARDS, ROWS, Batch, assert_equal, batch, trl_loss

from cropi_tools.objective import group_advantages, token_coefficients
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loss import TokenInputs, token_loss
from cropi_tools.training.loss_settings import LossSettings
from cropi_tools.training.update import Updater


def own_loss(one: Batch, settings: LossSettings, inside: torch.Tensor, old: torch.Tensor | None = None) -> Any:
    """Ours on the tokens `inside` [rows, longest], whole rows."""
    lengths = [length for length, row in zip(LENGTHS, inside, strict=True) if row.any()]
    rows = [number for number, row in enumerate(inside) if row.any()]
    totals = {"sequence": ROWS, "token": int(inside.sum()), "constant": ROWS * settings.fixed_length}
    coefficients = torch.tensor(
        token_coefficients(lengths, settings.aggregation, totals[settings.aggregation]), dtype=one.logits.dtype
    )
    spread = torch.tensor(lengths)
    given = TokenInputs(
        one.behavior[inside],
        one.advantages[rows].repeat_interleave(spread),
        coefficients.repeat_interleave(spread),
        None if old is None else old[inside],
        one.reference[inside] if settings.kl else None,
    )
    return token_loss(one.logprobs()[inside], one.entropy()[inside], given, lengths, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cap", [0.0, 1.2])
def test_equal_to_trl(trainer_class: Any, dtype: torch.dtype, name: str, kl: float, masked: bool, cap: float) -> None:
    """grpo, dapo, dr_grpo as both name them; truncated responses masked; importance weights truncated token by token."""
    one = batch(dtype)
    if LOSSES[name]["advantage"] == "centered":
        groups = [group_advantages(REWARDS[start : start + 4], "centered") or [] for start in (0, 4)]
        one = one._replace(advantages=torch.tensor([value for group in groups for value in group], dtype=dtype))
    mask = one.mask.clone()
    if masked:
        mask[[1, 5]] = 0
    old = weights = None
    if cap:
        # of the policy before the step: between the present one and the engine's
        old = (0.5 * one.behavior + 0.5 * one.logprobs()).detach()
        weights = torch.exp(old - one.behavior).clamp(max=cap)
    settings = LossSettings(
        1.0, (LOW, HIGH), kl, 0.0, LOSSES[name]["aggregation"], LOSSES[name]["advantage"], LIMIT, importance_cap=cap
    )
    own, sums = own_loss(one, settings, mask.bool(), old)
    assert sums["clip_fraction"] > 0
    assert (sums["capped_fraction"] > 0) == bool(cap)
    other = trl_loss(trainer_class, one, name, "token", kl, HIGH, old=old, weights=weights, mask=mask)
    assert_equal(one, own, other)


def test_the_entropy_bonus_is_trls_where_both_average_over_tokens(trainer_class: Any) -> None:
    """TRL's bonus is a mean over tokens whatever the loss; ours follows the loss's own aggregation, as verl's does."""
    one = batch(torch.float64)
    settings = LossSettings(1.0, (LOW, HIGH), 0.0, 0.05, "token", "group", LIMIT)
    own, _ = own_loss(one, settings, one.mask.bool())
    assert_equal(one, own, trl_loss(trainer_class, one, "dapo", "token", 0.0, HIGH, entropy=0.05))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("kl", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_a_policy_equals_a_real_trainers(
    trainer_class: Any, name: str, kl: float, temperature: float, policy_folder: Path, tmp_path: Path
) -> None:
    """TRL pads, masks, divides by the temperature and sums in its own way; the parameters' gradients are the same."""
    from datasets import Dataset
    from trl import GRPOConfig

    made = [naive_policy.rollout(n, ((7, True), (12, False), (1, True), (4, True)), prompt=4 + n) for n in range(3)]
    records = [naive_policy.record(rollout) for rollout in made]
    loss = LossSettings(
        temperature, (LOW, HIGH), kl, 0.0, LOSSES[name]["aggregation"], LOSSES[name]["advantage"], LIMIT
    )
    policy, reference = naive_policy.policy(), naive_policy.policy(seed=5)
    figures = add_gradient(Updater(policy, reference if kl else None, options_of(loss), Ranks()), records)
    assert figures["clip_fraction"] > 0.02
    own = {name: parameter.grad for name, parameter in policy.model.named_parameters()}

    longest_prompt, longest = max(len(r.prompt_token_ids) for r in made), 12
    rows = [(rollout.prompt_token_ids, sample) for rollout in made for sample in rollout.samples]
    inputs: dict[str, Any] = {
        "prompt_ids": torch.tensor([[0] * (longest_prompt - len(p)) + p for p, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (longest_prompt - len(p)) + [1] * len(p) for p, _ in rows]),
        "completion_ids": torch.tensor([s.token_ids + [0] * (longest - len(s.token_ids)) for _, s in rows]),
        "completion_mask": torch.tensor([[1] * len(s.token_ids) + [0] * (longest - len(s.token_ids)) for _, s in rows]),
        "old_per_token_logps": torch.tensor([s.logprobs + [0.0] * (longest - len(s.logprobs)) for _, s in rows]),
    }
    advantages = [group_advantages(rollout.rewards, LOSSES[name]["advantage"]) or [] for rollout in made]
    inputs["advantages"] = torch.tensor([value for group in advantages for value in group])
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    with torch.no_grad():
        known = [naive_policy.logprobs(reference.model, p, s.token_ids, temperature).tolist() for p, s in rows]
    inputs["ref_per_token_logps"] = torch.tensor([values + [0.0] * (longest - len(values)) for values in known])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            loss_type=name,
            beta=0.0,  # set below: it would load a second policy by its name
            use_bias_correction_kl=False,  # plain k3, as in verl and the paper; TRL's default also weighs it by the ratio
            epsilon=LOW,
            epsilon_high=HIGH,
            temperature=temperature,
            max_completion_length=LIMIT,
            per_device_train_batch_size=len(rows),
            num_generations=4,
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
        )
        model = tiny_policy.model()
        trainer = trainer_class(
            model=model,
            args=config,
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": ["1+2="] * len(rows)}),
            processing_class=tiny_policy.tokenizer(),
        )
        trainer.beta = kl
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        theirs = trainer._compute_loss(model, inputs)
        theirs.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert naive_policy.relative_error(own, expected) < 1e-5
    assert figures["loss"] == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-6)
