"""The objective against TRL's GRPO loss, by TRL's own code, on the same tensors: value and gradient in the logits.

`GRPOTrainer._compute_loss` is called on an instance that was never set up: it has the settings the loss reads, and its log-probabilities
come from a table of logits. Shared are the losses grpo, bnpo, dapo, dr_grpo, GSPO (ratios of whole sequences), luspo and cispo's gradient.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from cropi_tools.objective import Aggregation, Estimator, group_advantages, kl_k3, policy_terms, token_coefficients

LENGTHS = [7, 3, 1, 5, 4, 7, 2, 6]  # two groups of four
REWARDS = [1.0, 0.0, 0.0, 0.25, 0.0, 1.0, 1.0, 0.5]
LONGEST, ROWS, VOCABULARY, LIMIT = 7, 8, 11, 16
LOW, HIGH = 0.2, 0.28


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL's own imports
        from trl import GRPOTrainer
    return GRPOTrainer


class Batch(NamedTuple):
    """Padded [rows, longest]; logits [rows, longest, vocabulary] is the parameter."""

    logits: torch.Tensor
    tokens: torch.Tensor
    behavior: torch.Tensor
    reference: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor

    def logprobs(self) -> torch.Tensor:
        return torch.log_softmax(self.logits, -1).gather(-1, self.tokens[..., None]).squeeze(-1)


def batch(dtype: torch.dtype) -> Batch:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, LONGEST, VOCABULARY, generator=draw, dtype=torch.float64).to(dtype)
    tokens = torch.randint(VOCABULARY, (ROWS, LONGEST), generator=draw)
    known = torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)
    behavior, reference = known + 0.4 * torch.randn(2, ROWS, LONGEST, generator=draw, dtype=torch.float64).to(dtype)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
    groups = [group_advantages(REWARDS[start : start + 4]) for start in (0, 4)]
    advantages = torch.tensor([value for group in groups for value in group], dtype=dtype)
    return Batch(logits.requires_grad_(), tokens, behavior, reference, mask, advantages)


def trl_loss(trainer_class: Any, one: Batch, loss_type: str, level: str, kl: float, high: float) -> torch.Tensor:
    trainer = object.__new__(trainer_class)
    settings = {
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values
        ),
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": kl,
        "epsilon_low": LOW,
        "epsilon_high": high,
        "max_completion_length": LIMIT,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (one.logprobs(), torch.zeros(ROWS, LONGEST), None),
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": one.tokens,
        "completion_mask": one.mask,
        "advantages": one.advantages,
        "old_per_token_logps": one.behavior,
        "ref_per_token_logps": one.reference,
        "num_items_in_batch": one.mask.sum(),
    }
    return trainer_class._compute_loss(trainer, trainer.model, inputs)


def own_loss(
    one: Batch, estimator: Estimator, aggregation: Aggregation, total: float, kl: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the objective plus the divergence from the reference, over the sampled tokens alone; and the clipped flags."""
    inside = one.mask.bool()
    spread = torch.tensor(LENGTHS)
    logprobs = one.logprobs()[inside]
    advantages = one.advantages.repeat_interleave(spread)
    coefficients = torch.tensor(token_coefficients(LENGTHS, aggregation, total), dtype=logprobs.dtype)
    terms = policy_terms(logprobs, one.behavior[inside], advantages, LENGTHS, estimator)
    per_token = -terms.surrogate + kl * kl_k3(one.reference[inside] - logprobs)
    return (coefficients.repeat_interleave(spread) * per_token).sum(), terms.clipped


def assert_equal(one: Batch, own: torch.Tensor, other: torch.Tensor, value: bool = True) -> None:
    (mine,) = torch.autograd.grad(own, one.logits)
    (theirs,) = torch.autograd.grad(other, one.logits)
    assert float(theirs.norm()) > 1e-3
    tolerance = 1e-6 if own.dtype == torch.float32 else 1e-13
    assert float((mine - theirs).norm() / theirs.norm()) < tolerance
    # the value is what is left of terms near 1 that cancel: in absolute terms
    assert not value or float(own.detach()) == pytest.approx(float(other.detach()), rel=tolerance, abs=tolerance / 5)


AGGREGATIONS: list[Any] = [
    ("grpo", "sequence", ROWS),
    ("bnpo", "token", sum(LENGTHS)),
    ("dapo", "token", sum(LENGTHS)),
    ("dr_grpo", "constant", ROWS * LIMIT),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize(("loss_type", "aggregation", "total"), AGGREGATIONS)
def test_equal_to_trl(
    trainer_class: Any, dtype: torch.dtype, level: Any, kl: float, loss_type: str, aggregation: Any, total: float
) -> None:
    one = batch(dtype)
    own, clipped = own_loss(one, Estimator(level, ppo_clip=(LOW, HIGH)), aggregation, total, kl)
    assert 0 < int(clipped.sum()) < len(clipped)  # the clip has a part in this
    assert_equal(one, own, trl_loss(trainer_class, one, loss_type, level, kl, HIGH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_luspo_is_the_sequence_weight_with_a_constant_denominator(trainer_class: Any, dtype: torch.dtype) -> None:
    one = batch(dtype)
    own, _ = own_loss(one, Estimator("sequence", ppo_clip=(LOW, HIGH)), "constant", ROWS, 0.0)
    assert_equal(one, own, trl_loss(trainer_class, one, "luspo", "sequence", 0.0, HIGH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cispo_has_the_gradient_of_bounded_token_weights(trainer_class: Any, dtype: torch.dtype) -> None:
    """Its value is another (it multiplies log pi), the gradient is that of `weight_clip`."""
    one = batch(dtype)
    own, clipped = own_loss(one, Estimator(weight_clip=(0.0, 1.2)), "token", sum(LENGTHS), 0.0)
    assert 0 < int(clipped.sum()) < len(clipped)
    assert_equal(one, own, trl_loss(trainer_class, one, "cispo", "token", 0.0, 1.2), value=False)
