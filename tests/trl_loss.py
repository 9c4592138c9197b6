"""TRL's own GRPO loss on fixed tensors.

`GRPOTrainer._compute_loss` is called on an instance that was never set up: it has the settings the loss reads, and its log-probabilities
come from a table of logits.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from cropi_tools.objective import group_advantages

LENGTHS = [7, 3, 1, 5, 4, 7, 2, 6]  # two groups of four
REWARDS = [1.0, 0.0, 0.0, 0.25, 0.0, 1.0, 1.0, 0.5]
LONGEST, ROWS, VOCABULARY, LIMIT = 7, 8, 11, 16
LOW, HIGH = 0.2, 0.28
# TRL's losses as two words of the objective
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence", "advantage": "group"},
    "dapo": {"aggregation": "token", "advantage": "group"},
    "dr_grpo": {"aggregation": "constant", "advantage": "centered"},
}


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

    def entropy(self) -> torch.Tensor:
        table = torch.log_softmax(self.logits, -1)
        return -(table.exp() * table).sum(-1)


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


def trl_loss(
    trainer_class: Any,
    one: Batch,
    loss_type: str,
    level: str,
    kl: float,
    high: float,
    *,
    old: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    entropy: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """TRL's loss of a batch.

    old: what ratios are to, the behavior log-probabilities if not given; weights: importance weights of tokens, already truncated; entropy: of
    the bonus; mask: tokens that count, all sampled ones if not given.
    """
    mask = one.mask if mask is None else mask
    trainer = object.__new__(trainer_class)
    settings = {
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "accelerator": SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda values: values, reduce=lambda values, reduction: values
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
        "use_vllm": weights is not None,
        "vllm_importance_sampling_correction": weights is not None,
        "_entropy_bonus_enabled": entropy > 0,
        "use_adaptive_entropy": False,
        "entropy_coef": entropy,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (one.logprobs(), one.entropy(), None),
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": one.tokens,
        "completion_mask": mask,
        "advantages": one.advantages,
        "old_per_token_logps": one.behavior if old is None else old,
        "ref_per_token_logps": one.reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    return trainer_class._compute_loss(trainer, trainer.model, inputs)


def assert_equal(one: Batch, own: torch.Tensor, other: torch.Tensor, value: bool = True) -> None:
    (mine,) = torch.autograd.grad(own, one.logits)
    (theirs,) = torch.autograd.grad(other, one.logits)
    assert float(theirs.norm()) > 1e-3
    tolerance = 1e-6 if own.dtype == torch.float32 else 1e-13
    assert float((mine - theirs).norm() / theirs.norm()) < tolerance
    # the value is what is left of terms near 1 that cancel: in absolute terms
    assert not value or float(own.detach()) == pytest.approx(float(other.detach()), rel=tolerance, abs=tolerance / 5)
