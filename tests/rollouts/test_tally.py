"""Figures over rollouts: accuracy and its interval, pass@k, lengths, outcomes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cropi_tools.data.records import outcome_of_score
from cropi_tools.rollouts.tally import Tallies, Tally, bootstrap_interval, pass_at_k, table


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(samples: int) -> None:
    """The share of all k-subsets of the samples that hold a correct one."""
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over all outcomes of 6 samples that are correct with probability p is 1 - (1 - p)^k."""
    for p, k in itertools.product((0.1, 0.5, 0.9), range(1, 7)):
        mean = sum(
            p ** sum(outcome) * (1 - p) ** (6 - sum(outcome)) * pass_at_k(6, sum(outcome), k)
            for outcome in itertools.product((0, 1), repeat=6)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k)


def row(source: str, rewards: list[float], lengths: list[int]) -> dict[str, Any]:
    return {
        "source": source,
        "prompt_token_ids": [5, 6],
        "samples": [
            {
                "token_ids": [7] * length,
                "reward": reward,
                "outcome": outcome_of_score(reward),
                "finish_reason": "length" if length == 4 else "stop",
            }
            for reward, length in zip(rewards, lengths, strict=True)
        ],
    }


def test_summary() -> None:
    tallies = Tallies()
    tallies.add([row("a", [1.0, 0.0, 0.0], [1, 2, 4]), row("b", [0.5, 0.5, 0.5], [4, 4, 4])])
    tallies = Tallies(tallies.saved())  # as after a resume
    tallies.add([row("a", [1.0, 1.0, 0.0], [1, 1, 1])])
    found = tallies.summary()
    assert found["prompts"] == 3
    assert found["samples"] == 9
    assert found["accuracy"] == pytest.approx(3 / 9)
    assert found["mean_reward"] == pytest.approx(4.5 / 9)
    assert found["pass_at"] == {
        "1": pytest.approx(1 / 3),
        "2": pytest.approx((2 / 3 + 0 + 1) / 3),
        "3": pytest.approx(2 / 3),
    }
    assert found["response_tokens"] == pytest.approx(22 / 9)
    assert found["truncated_fraction"] == pytest.approx(4 / 9)
    assert found["equal_rewards_fraction"] == pytest.approx(1 / 3)
    assert found["outcomes"] == {"correct": 3, "partial": 3, "wrong": 3}
    assert found["partial_fraction"] == pytest.approx(3 / 9)
    head, *lines = table(found)
    place = head.index("partial") + len("partial")
    assert [line[:place].rsplit(None, 1)[1] for line in lines] == ["0.000", "1.000", "0.333"]
    assert found["by_source"]["a"]["accuracy"] == pytest.approx(3 / 6)
    assert found["by_source"]["b"]["pass_at"]["3"] == 0.0
    assert Tally().samples == 0


def test_the_interval_is_that_of_resampled_prompts() -> None:
    """Against a plain bootstrap that draws prompts one by one."""
    generator = np.random.default_rng(3)
    correct = generator.binomial(4, generator.beta(0.5, 0.5, size=60))
    cells = [(c, 4, int((correct == c).sum())) for c in range(5)]
    found = bootstrap_interval(cells)
    drawn = generator.choice(correct, (20000, 60)).mean(1) / 4
    assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.006)
    # samples of a prompt are alike: an interval over samples would be much narrower
    accuracy = correct.mean() / 4
    over_samples = 2 * 1.96 * (accuracy * (1 - accuracy) / 240) ** 0.5
    assert found is not None
    assert found[1] - found[0] > 1.4 * over_samples


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        correct = generator.binomial(4, generator.beta(2, 2, size=200))  # the true accuracy is 1/2
        cells = [(c, 4, int((correct == c).sum())) for c in range(5)]
        found = bootstrap_interval(cells)
        assert found is not None
        covered += found[0] <= 0.5 <= found[1]
    assert 0.91 <= covered / 300 <= 0.985


def test_one_prompt_has_no_interval() -> None:
    assert bootstrap_interval([(1, 4, 1)]) is None


def test_prompts_with_unequal_numbers_of_samples() -> None:
    """As in rollouts of others: pass@k up to the fewest, accuracy over all samples."""
    tallies = Tallies()
    tallies.add([row("a", [1.0, 0.0], [1, 1]), row("a", [1.0, 1.0, 0.0, 0.0], [1, 1, 1, 1])])
    found = tallies.summary()
    assert set(found["pass_at"]) == {"1", "2"}
    assert found["pass_at"]["2"] == pytest.approx((1 + pass_at_k(4, 2, 2)) / 2)
    assert found["accuracy"] == pytest.approx(3 / 6)


def test_the_table_has_a_line_a_source_and_one_for_all() -> None:
    tallies = Tallies()
    tallies.add([row("a", [1.0, 0.0], [1, 4]), row("long-name", [0.0, 0.0], [4, 4]), row("a", [1.0, 1.0], [2, 2])])
    lines = table(tallies.summary())
    assert [line.split()[0] for line in lines] == ["source", "a", "long-name", "all"]
    assert "0.750 [0.500, 1.000]" in lines[1]
    assert len({len(line) for line in lines}) == 1
