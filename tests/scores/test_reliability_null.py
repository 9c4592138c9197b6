"""Reliability where validation has no direction: means, stores and figures as the commands make them, of simulated gradients.

All prompts of a half share the validation prompts, as in life, so their noise moves all scores together; gradients vary in few dimensions, as
those of real pools do. Intervals over the prompts of the pool alone then exclude 0 in most trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import naive_policy
import numpy as np
import pytest
import torch
from gradient_stores import open_output, unseal

from cropi_tools.data.records import Rollout, Sample
from cropi_tools.data.store import Store
from cropi_tools.gradients.accumulator import Measure
from cropi_tools.gradients.batching import survey
from cropi_tools.gradients.estimates import BackwardEstimates
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, PromptGradient
from cropi_tools.gradients.reference import Consume
from cropi_tools.gradients.targets import Against
from cropi_tools.gradients.write_mean import collect_mean
from cropi_tools.gradients.write_store import collect_store
from cropi_tools.scores import reliability
from cropi_tools.scores.reliability import as_json, as_table, measure
from cropi_tools.sketches.spec import Layout, ProjectionSpec

SETTINGS = GradientSettings()
SIZE, SAMPLES = 64, 8
CPU = torch.device("cpu")


class Simulated:
    """Gradients by the number in a prompt's tokens: the sum over samples of advantage x (reward x the prompt's vector + noise) / K."""

    def __init__(self, seed: int, dimensions: int, direction: float) -> None:
        self.parameters = [("all.weight", torch.nn.Parameter(torch.zeros(SIZE)))]
        self._seed, self._dimensions, self._direction = seed, dimensions, direction

    def room_for(self, tasks: Sequence[GradientTask], task: GradientTask) -> bool:
        return len(tasks) < 16

    def compute(self, tasks: Sequence[GradientTask], consume: Consume) -> list[PromptGradient]:
        consume("all.weight", torch.stack([self._gradient(task) for task in tasks]))
        entries = [{"id": t.rollout.id, "source": "s", "pass_rate": 0.5, "status": "ok"} for t in tasks]
        return [PromptGradient("ok", entry, 1) for entry in entries]

    def _gradient(self, task: GradientTask) -> torch.Tensor:
        number = task.prompt[0]
        vector = self._draw(number)
        if number >= 1000:  # a validation prompt
            vector[0] += self._direction
        found = np.zeros(SIZE)
        for advantage, sample in zip(task.advantages, task.rollout.samples, strict=True):
            noise = 0.7 * self._draw(number, 1 + sample.token_ids[0])
            found += advantage * (sample.reward * vector + noise) / len(task.responses)
        return torch.tensor(found, dtype=torch.float32)

    def _draw(self, *numbers: int) -> np.ndarray:
        found = np.zeros(SIZE)
        found[: self._dimensions] = np.random.default_rng([self._seed, *numbers]).normal(size=self._dimensions)
        return found


def prompts(first: int, count: int, flipped: np.random.Generator | None = None) -> list[Rollout]:
    """Prompts of eight samples, two right and two wrong in each half whatever the split; `flipped`: by a coin the wrong ones are right."""
    found = []
    for number in range(first, first + count):
        sign = flipped is not None and bool(flipped.integers(2))
        samples = [Sample([k], [-1.0], float((k // 2 % 2 == 0) != sign)) for k in range(SAMPLES)]
        found.append(Rollout(f"q{number}", "s", [number], samples, {}))
    return found


class Made(NamedTuple):
    mean: Path
    store: Store


def make(folder: Path, seed: int, dimensions: int, direction: float = 0.0, pool: int = 60, valid: int = 24) -> Made:
    """A mean and a store in halves. direction: what all validation prompts share; 0: nothing, their signs are random."""
    folder.mkdir()
    path = Simulated(seed, dimensions, direction)
    layout = Layout.of(path.parameters)  # type: ignore[arg-type]
    facts: dict[str, Any] = {"policy": "P", "objective": {}, "tokenizer": "T"}
    flipped = None if direction else np.random.default_rng([seed, 7])
    made = naive_policy.write(folder / "v.jsonl", prompts(1000, valid, flipped))
    mean, output = folder / "v.safetensors", open_output(folder / "v.safetensors", folder=False)
    collect_mean(path, SETTINGS, survey([str(made)], 5000, SETTINGS), output, layout, facts, halves=True)  # type: ignore[arg-type]
    against = Against({"v": str(mean)}, layout, "P", {}, halves=True)
    spec = ProjectionSpec.create("none", layout)
    estimates = BackwardEstimates(
        path,  # type: ignore[arg-type]
        SETTINGS,
        Measure(layout, spec, against.directions, CPU),
        against,
        Measure(layout, against.groups, against.half_directions, CPU),
    )
    work = survey([str(naive_policy.write(folder / "p.jsonl", prompts(0, pool)))], 5000, SETTINGS)
    attributes = {**facts, "layout": layout.to_json(), "device": "cpu", "against": against.attributes}
    attributes["projection"] = spec.to_json()
    collect_store(estimates, SETTINGS, work, open_output(folder / "p.zarr"), attributes)
    return Made(mean, Store(folder / "p.zarr"))


def excluded(folder: Path, trials: int, dimensions: int) -> tuple[int, int]:
    """In how many trials without a direction the interval excludes 0, and in how many one over the prompts of the pool alone would."""
    with_all = with_prompts = 0
    for seed in range(trials):
        store = make(folder / str(seed), seed, dimensions).store
        found = measure([store]).sets[0].spearman
        without_groups(store)
        narrow = measure([Store(store.path)]).sets[0].spearman
        assert found is not None
        assert narrow is not None
        assert found.value == narrow.value
        with_all += not found.low <= 0 <= found.high
        with_prompts += not narrow.low <= 0 <= narrow.high
    return with_all, with_prompts


def without_groups(store: Store) -> None:
    """Turn a store into one as older versions made them."""
    import json

    index = store.path / "index.jsonl"
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    for entry in entries:
        for half in entry.get("halves") or ():
            if half is not None:
                half.pop("groups", None)
    index.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    metadata = store.path / "zarr.json"
    said = json.loads(metadata.read_text())
    for mean in said["attributes"]["against"].values():
        mean.pop("groups", None)
    metadata.write_text(json.dumps(said))
    unseal(store.path)


def test_without_a_direction_the_interval_holds_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "BOOTSTRAP_ROUNDS", 200)
    with_all, with_prompts = excluded(tmp_path, 16, 4)
    assert with_all <= 2
    assert with_prompts >= 5  # that it would show


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [1, 4, 64])
def test_without_a_direction_in_many_trials(tmp_path: Path, dimensions: int) -> None:
    """At most 5 % of 100 trials."""
    with_all, _ = excluded(tmp_path, 100, dimensions)
    assert with_all <= 5


def test_a_direction_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval excludes 0 and holds what the halves' agreement is over fresh validation prompts."""
    monkeypatch.setattr(reliability, "BOOTSTRAP_ROUNDS", 200)
    found = []
    for seed in range(6):
        one = measure([make(tmp_path / str(seed), seed, 4, direction=2.0).store]).sets[0].spearman
        assert one is not None
        assert one.low <= one.value <= one.high
        found.append(one)
    usual = float(np.median([one.value for one in found]))
    assert sum(one.low > 0 for one in found) >= 5
    assert sum(one.low <= usual <= one.high for one in found) >= 5


def test_stores_and_means_of_older_versions_open_and_say_what_their_intervals_leave_out(tmp_path: Path) -> None:
    made = make(tmp_path / "a", 0, 4)
    whole = measure([made.store])
    assert whole.sets[0].interval_in_words is None
    without_groups(made.store)
    old = measure([Store(made.store.path)])
    words = old.sets[0].interval_in_words
    assert words is not None
    assert "leave out the noise of the validation prompts" in words
    assert words in as_table(old)
    assert as_json(old)["sets"][0]["interval_in_words"] == words
    assert whole.sets[0].spearman is not None
    assert old.sets[0].spearman is not None
    assert old.sets[0].spearman.value == whole.sets[0].spearman.value


def test_a_half_of_one_validation_prompt_has_nothing_to_draw(tmp_path: Path) -> None:
    made = next(
        one
        for count in range(2, 12)
        if min((one := make(tmp_path / str(count), 0, 4, valid=count)).store.attributes["against"]["v"]["groups"]) == 1
    )
    words = measure([made.store]).sets[0].interval_in_words
    assert words is not None
    assert "fewer than 2 groups of validation prompts" in words
