"""Figures of prompts: exact influence against brute force, halves, subsets of parameters, the geometry of Adam."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import naive_policy
import numpy as np
import pytest
import torch
from gradient_stores import open_output
from safetensors.torch import save_file
from scipy.stats import spearmanr

from cropi_tools.data.means import read_facts, read_tensors, write_mean
from cropi_tools.data.policies import OPTIMIZER_STATE
from cropi_tools.data.records import Rollout
from cropi_tools.gradients.accumulator import Measure
from cropi_tools.gradients.batching import batches, survey
from cropi_tools.gradients.estimates import BackwardEstimates, PromptFigures
from cropi_tools.gradients.half_sums import DIM
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.jvp_estimates import ForwardEstimates
from cropi_tools.gradients.preconditioner import EPSILON, Preconditioner
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.gradients.splitting import GROUPS, place_of, samples_of
from cropi_tools.gradients.targets import Against
from cropi_tools.gradients.write_mean import collect_mean
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.parameters import add_adapters, train_only
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.sketches.spec import Layout, ProjectionSpec

SETTINGS = GradientSettings()
CPU = torch.device("cpu")
EIGHT = ((7, True), (5, False), (3, True), (6, False), (4, True), (9, False), (2, True), (5, False))


def eight(number: int) -> Rollout:
    """A prompt of eight samples, some right and some wrong in each half."""
    made = naive_policy.rollout(number, EIGHT)
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, float(number % 2), 0.0, 1.0]
    return made._replace(samples=[s._replace(reward=r) for s, r in zip(made.samples, rewards, strict=True)])


def layout_of(policy: Policy) -> Layout:
    return Layout.of(policy.trained)


def make_mean(
    path: Path, policy: Policy, rollouts: list[Rollout], halves: bool = False, scaling: Preconditioner | None = None
) -> Path:
    source = naive_policy.write(path.with_suffix(".jsonl"), rollouts)
    collect_mean(
        ReferenceGradients(policy, SETTINGS),
        SETTINGS,
        survey([str(source)], 70, SETTINGS),
        open_output(path, folder=False),
        layout_of(policy),
        {"policy": "P", "tokenizer": "T", "objective": {}},
        halves,
        scaling,
    )
    return path


def estimates(
    policy: Policy,
    rollouts: list[Rollout],
    means: dict[str, Path],
    halves: bool = False,
    scaling: Preconditioner | None = None,
) -> list[PromptFigures]:
    layout = layout_of(policy)
    against = Against({name: str(path) for name, path in means.items()}, layout, "P", {}, halves)
    spec = ProjectionSpec.create("none", layout)
    measure = Measure(layout, spec, against.directions, CPU, scaling)
    other = Measure(layout, against.groups, against.half_directions, CPU, scaling) if halves else None
    made = BackwardEstimates(ReferenceGradients(policy, SETTINGS), SETTINGS, measure, against, other)
    tasks = [prepare(rollout, SETTINGS) for rollout in rollouts]
    return [estimate for task in tasks if isinstance(task, GradientTask) for estimate in made.of([task])]


def flat(gradient: dict[str, torch.Tensor], names: list[str] | None = None) -> torch.Tensor:
    return torch.cat([gradient[name].double().reshape(-1) for name in names or sorted(gradient)])


def mean_of(gradients: list[torch.Tensor], count: int) -> torch.Tensor:
    return torch.stack(gradients).sum(0) / count


def test_exact_influence_ranks_as_float64_brute_force(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    train, sets = [eight(n) for n in range(60)], {"a": [eight(n) for n in range(100, 106)], "b": [eight(200)]}
    means = {name: make_mean(tmp_path / f"{name}.safetensors", policy, made) for name, made in sets.items()}
    found = estimates(policy, train, means)
    wide = naive_policy.double_copy(policy.model)
    gradients = [flat(naive_policy.gradient(wide, rollout)) for rollout in train]
    for name, made in sets.items():
        direction = mean_of([flat(naive_policy.gradient(wide, rollout)) for rollout in made], len(made))
        truth = [float(g @ direction / (g.norm() * direction.norm())) for g in gradients]
        norm = read_facts(means[name])["norm"]
        mine = [e.entry["inner"][name] / (e.entry["gradient_norm"] * norm) for e in found]
        assert spearmanr(mine, truth)[0] >= 0.9999
        np.testing.assert_allclose(mine, truth, atol=1e-5)


def test_halves_are_the_gradients_of_half_the_samples_and_half_the_prompts(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    train, valid = [eight(n) for n in range(4)], [eight(n) for n in range(100, 105)]
    # one prompt whose first half has no advantage, and a validation prompt that has none at all
    first, second = (samples_of(train[2].id, 8, half) for half in (0, 1))
    train[2] = train[2]._replace(
        samples=[s._replace(reward=float(k in first or k == second[1])) for k, s in enumerate(train[2].samples)]
    )
    valid[1] = valid[1]._replace(samples=[sample._replace(reward=1.0) for sample in valid[1].samples])
    mean = make_mean(tmp_path / "v.safetensors", policy, valid, halves=True)
    found = estimates(policy, train, {"v": mean}, halves=True)
    wide = naive_policy.double_copy(policy.model)
    single = {
        r.id: torch.zeros(layout_of(policy).size, dtype=torch.float64)
        if n == 1
        else flat(naive_policy.gradient(wide, r))
        for n, r in enumerate(valid)
    }
    parts = [[name for name in single if place_of(name).half == half] for half in (0, 1)]
    assert sorted(map(len, parts)) == [2, 3]  # what these ids give
    directions = [mean_of([single[name] for name in part], len(part)) for part in parts]
    norms = read_facts(mean)["halves"]["norms"]
    assert norms == pytest.approx([float(direction.norm()) for direction in directions], rel=1e-5)
    for rollout, estimate in zip(train, found, strict=True):
        for half, direction in enumerate(directions):
            given = estimate.entry["halves"][half]
            if rollout.id == train[2].id and half == 0:
                assert given is None
                continue
            chosen = [rollout.samples[number] for number in samples_of(rollout.id, 8, half)]
            gradient = flat(naive_policy.gradient(wide, rollout._replace(samples=chosen)))
            assert given["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
            scale = float(gradient.norm() * direction.norm())
            assert given["inner"]["v"] == pytest.approx(float(gradient @ direction), abs=1e-5 * scale)
            # what groups of prompts add to it, in the order of their numbers, to the precision of their sketches
            groups = [sum(single[n] for n in parts[half] if place_of(n).group == g) for g in range(GROUPS)]
            held = [g for g in range(GROUPS) if any(place_of(n).group == g for n in parts[half])]
            assert len(given["groups"]["v"]) == len(held) > 1
            for value, group in zip(given["groups"]["v"], held, strict=True):
                vector = groups[group] / len(parts[half])
                noise = float(gradient.norm() * vector.norm()) / math.sqrt(DIM)
                assert value == pytest.approx(float(gradient @ vector), abs=5 * noise)


def test_a_mean_without_halves_is_refused_where_halves_are_wanted(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    mean = make_mean(tmp_path / "v.safetensors", policy, [eight(1)])
    assert read_tensors(mean, half=True) == {}
    with pytest.raises(InputError, match="--mean --halves"):
        estimates(policy, [eight(2)], {"v": mean}, halves=True)
    with pytest.raises(InputError, match="two prompts"):
        make_mean(tmp_path / "w.safetensors", policy, [eight(1)], halves=True)


def test_a_mean_names_the_prompt_whose_gradient_is_not_finite(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    far = eight(7)
    far = far._replace(samples=[s._replace(logprobs=[x - 85.0 for x in s.logprobs or []]) for s in far.samples])
    with pytest.raises(InputError, match="prompt 'r7': its gradient is not finite; bound its weights"):
        make_mean(tmp_path / "m.safetensors", policy, [eight(6), far])


def test_an_unfinished_mean_is_refused(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    path = tmp_path / "part.safetensors"
    write_mean(path, {name: p.detach() for name, p in policy.model.named_parameters()}, {"done": 1})
    with pytest.raises(InputError, match="unfinished mean"):
        Against({"v": str(path)}, layout_of(policy), "P", {})


def test_chosen_parameters_have_the_gradients_they_have_among_all(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    whole = naive_policy.gradient(naive_policy.double_copy(policy.model), eight(3))
    train_only(policy, ["model.layers.1.*", "*.norm.weight"])
    names = [name for name, _ in layout_of(policy).entries]
    assert names
    assert all(name.startswith("model.layers.1.") or name == "model.norm.weight" for name in names)
    (found,) = estimates(policy, [eight(3)], {})
    expected = flat(whole, names)
    assert found.entry["gradient_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
    np.testing.assert_allclose(found.sketch, expected.numpy(), atol=1e-5 * float(expected.norm()))
    with pytest.raises(UsageError, match=r"--params nothing: no parameter"):
        train_only(policy, ["nothing"])


def test_adapters_see_the_gradient_of_their_layer_through_the_random_factor() -> None:
    policy = naive_policy.policy()
    whole = naive_policy.gradient(naive_policy.double_copy(policy.model), eight(4))
    ids = torch.tensor([[5, 6, 7]])
    before = policy.model(input_ids=ids).logits
    add_adapters(policy, 4, seed=3)
    torch.testing.assert_close(policy.model(input_ids=ids).logits, before)
    random_factors = {name: p.detach().double() for name, p in policy.model.named_parameters() if "lora_A" in name}
    names = [name for name, _ in layout_of(policy).entries]
    assert len(names) == len(random_factors) == 14
    (found,) = estimates(policy, [eight(4)], {})
    expected = torch.cat(
        [
            (whole[name.replace(".lora_B.default", "")] @ random_factors[name.replace("lora_B", "lora_A")].T).reshape(
                -1
            )
            for name in names
        ]
    )
    np.testing.assert_allclose(found.sketch, expected.numpy(), atol=1e-5 * float(expected.norm()))
    again = naive_policy.policy()
    add_adapters(again, 4, seed=3)
    assert all(
        torch.equal(p.double(), random_factors[name]) for name, p in again.model.named_parameters() if "lora_A" in name
    )


def test_the_geometry_of_adam(tmp_path: Path) -> None:
    policy = naive_policy.policy()
    layout = layout_of(policy)
    draw = torch.Generator().manual_seed(0)
    squares = {name: torch.rand(shape, generator=draw) * 1e-6 for name, shape in layout.entries}
    squares["model.norm.weight"][:5] = 0.0  # never had a gradient
    state = tmp_path / "P1" / OPTIMIZER_STATE
    state.parent.mkdir(parents=True)
    save_file({f"exp_avg_sq/{name}": value for name, value in squares.items()}, state)
    scaling = Preconditioner(str(tmp_path / "P1"), layout, CPU)
    valid = [eight(n) for n in range(100, 103)]
    mean = make_mean(tmp_path / "v.safetensors", policy, valid, scaling=scaling)
    found = estimates(policy, [eight(5), eight(6)], {"v": mean}, scaling=scaling)
    wide = naive_policy.double_copy(policy.model)
    names = [name for name, _ in layout.entries]
    roots = torch.cat([squares[n].double().sqrt().reshape(-1) for n in names])
    metric = torch.where(roots >= scaling.least, 1 / (roots + EPSILON), 0.0)
    direction = mean_of([flat(naive_policy.gradient(wide, r), names) for r in valid], 3)
    for number, estimate in zip((5, 6), found, strict=True):
        gradient = flat(naive_policy.gradient(wide, eight(number)), names)
        norms = [math.sqrt(float(vector @ (metric * vector))) for vector in (gradient, direction)]
        assert estimate.entry["gradient_norm"] == pytest.approx(norms[0], rel=1e-5)
        assert read_facts(mean)["norm"] == pytest.approx(norms[1], rel=1e-5)
        inner = float(gradient @ (metric * direction))
        assert estimate.entry["inner"]["v"] == pytest.approx(inner, abs=1e-5 * norms[0] * norms[1])
        np.testing.assert_allclose(estimate.sketch, (metric.sqrt() * gradient).numpy(), atol=1e-5 * norms[0])
    # forward mode takes the metric on the side of the mean alone
    against = Against({"v": str(mean)}, layout, "P", {})
    against.directions["v"].scale_by(scaling)
    forward = ForwardEstimates(ForwardMode(policy, SETTINGS, against.directions), SETTINGS, against, halves=False)
    for number, estimate in zip((5, 6), found, strict=True):
        task = prepare(eight(number), SETTINGS)
        assert isinstance(task, GradientTask)
        (same,) = forward.of([task])
        scale = estimate.entry["gradient_norm"] * read_facts(mean)["norm"]
        assert same.entry["inner"]["v"] == pytest.approx(estimate.entry["inner"]["v"], abs=1e-5 * scale)
    other = Layout((*layout.entries, ("extra", (3,))))
    with pytest.raises(InputError, match="no state of parameter extra"):
        Preconditioner(str(tmp_path / "P1"), other, CPU)


def test_batches_follow_from_the_prompts_alone() -> None:
    made = [eight(n) if n % 3 else eight(n)._replace(samples=eight(n).samples[:1]) for n in range(20)]

    def room(tasks: Any, task: GradientTask) -> bool:
        return len(tasks) < 4

    whole = list(batches(iter(made), SETTINGS, room))
    assert [rollout.id for batch in whole for rollout, _ in batch.prompts] == [rollout.id for rollout in made]
    assert max(len(batch.tasks) for batch in whole) == 4
    done = len(whole[0].prompts)
    rest = list(batches(iter(made[done:]), SETTINGS, room))
    assert [[r.id for r, _ in b.prompts] for b in rest] == [[r.id for r, _ in b.prompts] for b in whole[1:]]
