"""The choice of a token against its definition in float64, and the numbers it uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from cropi_tools.engines.next_token import choose, uniforms


def test_uniforms_are_uniform_and_independent_over_positions() -> None:
    seeds = np.arange(20000, dtype=np.uint64)  # neighbouring seeds, the worst case
    first, second = uniforms(seeds, 0), uniforms(seeds, 1)
    assert kstest(first, "uniform").pvalue > 1e-3
    assert kstest(second, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03


def test_uniforms_are_those_of_splitmix64() -> None:
    """The first outputs of the published generator for seed 1234567, 53 bits of each."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = [float(uniforms(np.array([1234567], np.uint64), position)[0]) for position in range(5)]
    assert found == [(value >> 11) / 2**53 for value in published]


def test_positions_may_differ_from_seed_to_seed() -> None:
    seeds = np.array([3, 4, 5], np.uint64)
    together = uniforms(seeds, np.array([7, 0, 2]))
    assert together.tolist() == [uniforms(seeds, place)[row] for row, place in enumerate((7, 0, 2))]


@pytest.mark.parametrize("vocabulary", [1, 80, 512, 513, 1024, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_inverts_the_cumulative_distribution(vocabulary: int, temperature: float) -> None:
    """Against float64; a number within float rounding of a border may fall on either side of it."""
    draw = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(400, vocabulary, generator=draw)
    numbers = torch.rand(400, generator=draw, dtype=torch.float64)
    chosen, logprobs = choose(logits, numbers, temperature)
    probabilities = torch.log_softmax(logits.double() / temperature, -1)
    cumulative = probabilities.exp().cumsum(-1)
    expected = (cumulative > numbers[:, None]).long().argmax(-1)
    near = (cumulative - numbers[:, None]).abs().amin(-1) < 1e-6
    assert near.float().mean() < 0.05
    assert torch.equal(chosen[~near], expected[~near])
    assert logprobs.dtype == torch.float32
    own = probabilities.gather(-1, chosen[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), own, atol=3e-6, rtol=0)


@pytest.mark.parametrize("vocabulary", [80, 2000])
def test_tokens_without_probability_are_never_chosen(vocabulary: int) -> None:
    """Not at the ends of the unit interval, where rounding would choose them, and not in blocks without any probability."""
    numbers = torch.tensor([0.0, 0.25, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for possible in ([17], [17, vocabulary - 30], [vocabulary - 1], [0, 1, 60]):
        logits = torch.full((4, vocabulary), -torch.inf)
        logits[:, possible] = torch.linspace(-1, 1, len(possible))
        chosen, logprobs = choose(logits, numbers, 1.0)
        assert set(chosen.tolist()) <= set(possible)
        assert (chosen[0], chosen[3]) == (possible[0], possible[-1])
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("vocabulary", [80, 2000])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_one_wrong_logit_is_told(vocabulary: int, wrong: float, temperature: float) -> None:
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[1, 40] = wrong
    _, values = choose(logits, torch.tensor([0.3, 0.3], dtype=torch.float64), temperature)
    assert values.isfinite().tolist() == [True, False]
