"""Figures over rollouts: accuracy and its interval, pass@k, lengths, outcomes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cropi_tools.data.records import outcome_of_score
from cropi_tools.intervals import wilson
from cropi_tools.rollouts.metrics import Tallies, Tally, pass_at_k, table


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


def test_sources_of_different_numbers_of_samples() -> None:
    """The fewest samples of all prompts may be a number that a source has no pass@k for."""
    tallies = Tallies()
    tallies.add([row("a", [1.0, 0.0, 0.0], [1, 1, 1]), row("b", [1.0, 0.0, 0.0, 0.0], [1, 1, 1, 1])])
    head, first, second, both = table(tallies.summary())
    assert "pass@3" in head
    assert [line.split()[6] == "-" for line in (first, second, both)] == [False, True, False]


def counted(correct: list[int], samples: int) -> Tally:
    """A tally of prompts with these numbers of correct samples."""
    found = Tally(prompts=len(correct), samples=samples * len(correct), outcomes={"correct": sum(correct)})
    for count in correct:
        found.by_correct[f"{count}/{samples}"] = found.by_correct.get(f"{count}/{samples}", 0) + 1
    return found


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (8, 0), (8, 8)])
def test_nothing_or_everything_correct_is_no_point(samples: int, correct: int) -> None:
    """Of 30 prompts, whatever the samples: Wilson's interval of 0 of 30, z^2 / (30 + z^2), for pass@k as well."""
    found = counted([correct] * 30, samples).summary()
    width = 1.959964**2 / (30 + 1.959964**2)
    expected = [1 - width, 1] if correct else [0, width]
    assert found["accuracy_interval"] == pytest.approx(expected)
    assert all(interval == pytest.approx(expected) for interval in found["pass_at_interval"].values())
    assert len(found["pass_at_interval"]) == (1 if samples == 1 else 4)


def test_pass_at_1_has_the_interval_of_the_accuracy() -> None:
    found = counted([0, 3, 1, 0, 4, 4, 2], 4).summary()
    assert found["pass_at_interval"]["1"] == pytest.approx(found["accuracy_interval"])
    # all four samples of a prompt decide one chance: 5 of 7 prompts
    assert found["pass_at_interval"]["4"] == pytest.approx(wilson(5 / 7, 7))


def test_one_prompt_has_no_interval_and_the_table_says_so() -> None:
    tallies = Tallies()
    tallies.add([row("a", [1.0, 0.0], [1, 2])])
    found = tallies.summary()
    assert found["accuracy_interval"] is None
    assert set(found["pass_at_interval"].values()) == {None}
    assert table(found)[1].count("(one prompt)") == 2


def test_a_summary_of_an_earlier_version_is_shown() -> None:
    tallies = Tallies()
    tallies.add([row("a", [1.0, 0.0], [1, 4]), row("a", [1.0, 1.0], [2, 2])])
    found = tallies.summary()
    for summary in (found, *found["by_source"].values()):
        del summary["pass_at_interval"]
    assert "1.000" in table(found)[1]


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
    low, high = tallies.summary()["by_source"]["a"]["accuracy_interval"]
    assert 0 < low < 0.5 < 0.99 < high
    assert f"0.750 [{low:.3f}, {high:.3f}]" in lines[1]
    assert len({len(line) for line in lines}) == 1
