"""The objective against TRL's GRPO loss, by TRL's own code, on the same tensors: value and gradient in the logits.

Shared are the losses grpo, bnpo, dapo, dr_grpo, GSPO (ratios of whole sequences), luspo and cispo's gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl_loss import HIGH, LENGTHS, LIMIT, LOW, ROWS, Batch, assert_equal, batch, trl_loss

from cropi_tools.objective import Aggregation, Estimator, kl_k3, policy_terms, token_coefficients


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
