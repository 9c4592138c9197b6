"""cropi-train --against: each prompt's figures are cropi-grad's on the same rollouts, the update is the same to the byte, and a resume too."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import naive_policy
import pytest
import tiny_policy
import torch
from training_runs import PARITY, SETTINGS, contents, options, options_of, same_run, train

from cropi_tools.cli import grad as grad_command
from cropi_tools.cli import rollout as rollout_command
from cropi_tools.cli import train as train_command
from cropi_tools.data.records import Rollout
from cropi_tools.data.store import Store
from cropi_tools.gradients import pass_figures
from cropi_tools.gradients.accumulator import Measure
from cropi_tools.gradients.pass_figures import PassFigures
from cropi_tools.gradients.per_sample_rules import NoRule
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.objective import Estimator
from cropi_tools.policy import logprobs
from cropi_tools.policy.loading import Policy, load_policy
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.sketches.spec import Layout
from cropi_tools.training import influence
from cropi_tools.training.batches import advantage_groups
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.influence import ByProduct
from cropi_tools.training.inputs import check_available
from cropi_tools.training.loss_settings import LossSettings
from cropi_tools.training.update import Updater, mixed_precision
from cropi_tools.verl_backend.config import refuse_what_verl_cannot

CLIP = (0.2, 0.28)
RESPONSES = [
    ((7, True), (12, False), (1, False), (3, True)),
    ((6, False), (6, False), (6, True)),
    ((1, True), (0, False), (5, False)),
    ((4, True), (9, True)),
]


class Direction:
    """A mean gradient in memory."""

    bytes = 0

    def __init__(self, policy: Policy, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.parts = {name: torch.randn(p.numel(), generator=draw) for name, p in policy.trained}
        self.norm = math.sqrt(sum(float(part.square().sum()) for part in self.parts.values()))

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        return self.parts[name]


def rollouts(policy: Policy, temperature: float = 1.0) -> list[Rollout]:
    """Prompts of different lengths, one without advantage, one whose equal responses got unequal rewards; nearly on policy."""
    made = [naive_policy.rollout(n, shape, prompt=(5, 2, 9, 1)[n]) for n, shape in enumerate(RESPONSES)]
    flat = naive_policy.rollout(4, RESPONSES[1])
    made.insert(1, flat._replace(samples=[sample._replace(reward=0.1) for sample in flat.samples]))
    same = naive_policy.rollout(5, ((4, True), (4, True)))
    made.append(same._replace(samples=[same.samples[0], same.samples[0]._replace(reward=0.0)]))
    draw = random.Random(0)
    found = []
    for rollout in made:
        pairs = [(rollout.prompt_token_ids, sample.token_ids) for sample in rollout.samples]
        present = iter(logprobs.separate_logprobs(policy.model, pairs, temperature).tolist())
        samples = [
            sample._replace(logprobs=[next(present) + draw.uniform(-0.3, 0.3) for _ in sample.token_ids])
            for sample in rollout.samples
        ]
        found.append(rollout._replace(samples=samples))
    return found


def observed(
    policy: Policy,
    made: Sequence[Rollout],
    loss: LossSettings,
    directions: dict[str, Direction],
    autocast: bool = False,
    **given: Any,
) -> tuple[list[dict[str, Any]], Updater]:
    """The records of an update by these rollouts, and what made it, with the gradients still there."""
    figures = PassFigures(
        policy,
        directions,  # type: ignore[arg-type] # all that is asked of it
        loss.temperature,
        lambda: mixed_precision(policy.device, autocast),
        torch.bfloat16 if autocast else torch.float32,
    )
    norms = {name: one.norm for name, one in directions.items()}
    settings = GradientSettings(aggregation=loss.aggregation, baseline=loss.advantage)
    seen = ByProduct(figures, norms, settings)
    updater = Updater(policy, None, options_of(loss, **given), Ranks(), autocast, seen)
    add(updater, made)
    return list(seen.records(1, [[naive_policy.record(rollout) for rollout in made]])), updater


def add(updater: Updater, made: Sequence[Rollout]) -> None:
    """Add the gradient of these rollouts' loss to the parameters' own."""
    updater._gradient(advantage_groups([naive_policy.record(one) for one in made], updater._loss, updater._ranks))


def reference(
    policy: Policy, made: Sequence[Rollout], settings: GradientSettings, directions: dict[str, Direction]
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Of each rollout its status, and by cropi-grad's reference path norm and products."""
    path = ReferenceGradients(policy, settings)
    measure = Measure(Layout.of(policy.trained), None, directions, policy.device)  # type: ignore[arg-type]
    for rollout in made:
        # on policy no bound drops one of two equal responses
        task = prepare(rollout, settings._replace(estimator=Estimator()))
        if isinstance(task, GradientTask):
            measure.begin()
            path.compute([task], measure.add)
            (found,) = measure.finish()
            yield "ok", math.sqrt(found.square), found.inner
        else:
            yield task, 0.0, {}


def same_figures(
    found: Sequence[dict[str, Any]],
    expected: Sequence[tuple[str, float, dict[str, float]]],
    directions: dict[str, Direction],
    tolerance: float = 1e-4,
) -> None:
    assert len(found) == len(expected)
    assert [one["status"] for one in found] == [status for status, _, _ in expected]
    for one, (status, norm, inner) in zip(found, expected, strict=True):
        if status != "ok":
            assert (one["norm"], one["inner"], one["scores"]) == (None, None, None)
            continue
        assert one["norm"] == pytest.approx(norm, rel=tolerance)
        for name, product in inner.items():
            length = directions[name].norm
            assert one["inner"][name] == pytest.approx(product, rel=tolerance, abs=tolerance * norm * length)
            assert one["scores"][name] == pytest.approx(product / norm / length, rel=tolerance, abs=tolerance)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "gpt2": {},  # transposed layers, learned positions, tied
    "phi": {},  # biases everywhere, in the head too
    "qwen3": {"tie_word_embeddings": False},  # norms over heads
    "gemma2": {},  # does more than its head to its states
    "mistral": {},  # rows that are padded
    "llama dynamic": {"tie_word_embeddings": True},  # responses of one prompt in passes of two kinds
}
QUICK = {(family, "whole") for family in FAMILIES} | {("qwen2", "split"), ("qwen2", "pieces"), ("llama", "pieces")}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param(family, how, marks=() if (family, how) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for how in ("whole", "split", "pieces")
    ],
)
def test_families(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All responses in one pass, prompts split over passes, logits in pieces that end within prompts."""
    more = FAMILIES[family]
    policy = families.policy(family, **more)
    directions = {"a": Direction(policy, 1), "b": Direction(policy, 2)}
    if how == "pieces":
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 90 * 7)
    loss, made = LossSettings(1.0, CLIP, 0.0, 0.0, "sequence"), rollouts(families.policy(family, **more))
    found, _ = observed(policy, made, loss, directions, tokens_per_pass=20 if how == "split" else 16384)
    settings = GradientSettings(Estimator(ppo_clip=CLIP), aggregation="sequence")
    expected = list(reference(families.policy(family, **more), made, settings, directions))
    assert {status for status, _, _ in expected} == {"ok", "zero-advantage", "zero-gradient"}
    same_figures(found, expected, directions)


@pytest.mark.parametrize(
    ("aggregation", "advantage", "temperature", "cap"),
    [
        ("token", "group", 1.0, 0.0),
        ("constant", "centered", 1.0, 0.0),
        ("sequence", "leave-one-out", 0.7, 0.0),
        ("token", "centered", 0.7, 1.1),
    ],
)
def test_objectives(aggregation: Any, advantage: Any, temperature: float, cap: float) -> None:
    """The loss's denominators are the mini-batch's, the gradient is cropi-grad's; also at the sampling temperature and with a cap."""
    directions = {"a": Direction(naive_policy.policy(), 1)}
    loss = LossSettings(temperature, CLIP, 0.0, 0.0, aggregation, advantage, 13, importance_cap=cap)
    made = rollouts(naive_policy.policy(), temperature)
    found, _ = observed(naive_policy.policy(), made, loss, directions)
    estimator = Estimator(weight_clip=(0.0, cap)) if cap else Estimator(ppo_clip=CLIP)
    settings = GradientSettings(estimator, temperature, aggregation, advantage)
    same_figures(found, list(reference(naive_policy.policy(), made, settings, directions)), directions)


@pytest.mark.parametrize("given", [{}, {"tokens_per_pass": 20}])
def test_the_gradient_is_the_same_to_the_byte(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where logits are formed in pieces; and nothing stays on the model."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 90 * 7)
    loss = LossSettings(1.0, CLIP, 0.0, 0.0, "token")
    policy = naive_policy.policy()
    made = rollouts(policy)
    _, updater = observed(policy, made, loss, {"a": Direction(policy, 1)}, **given)
    plain = Updater(naive_policy.policy(), None, options_of(loss, **given), Ranks())
    add(plain, made)
    for one, other in zip(updater.parameters, plain.parameters, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert not any(module._forward_hooks for module in policy.model.modules())


def test_in_half_precision() -> None:
    """Beside the reference path in the same arithmetic."""
    policy, wide = naive_policy.policy(), (9e-1, 9.0)
    directions, made = {"a": Direction(policy, 1)}, rollouts(policy)
    found, _ = observed(policy, made, LossSettings(1.0, wide, 0.0, 0.0, "token"), directions, autocast=True)
    settings = GradientSettings(Estimator(ppo_clip=wide), aggregation="token")
    with mixed_precision(policy.device, True):
        expected = list(reference(naive_policy.policy(), made, settings, directions))
    same_figures(found, expected, directions, 0.02)


@pytest.mark.parametrize(
    ("family", "module"), [("opt", "embed_positions"), ("mixtral", r"layers\.0\.mlp\.gate"), ("mamba", "mixer")]
)
def test_a_module_without_a_rule_is_named(family: str, module: str) -> None:
    with pytest.raises(NoRule, match=rf"{module} \(\w+\) has no rule for per-prompt gradients"):
        PassFigures(families.policy(family), {})


def test_a_wrong_rule_is_found_in_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pass_figures.figures_of

    def wrong(rule: Any, parameter: Any, module: Any, *given: Any) -> torch.Tensor:
        return plain(rule, parameter, module, *given) * (1.01 if parameter.shape == (64, 32) else 1)

    monkeypatch.setattr(pass_figures, "figures_of", wrong)
    with pytest.raises(NoRule, match=r"^model\.layers\.0\.mlp\.(gate|up)_proj \(Linear\) has no rule"):
        PassFigures(naive_policy.policy(), {"a": Direction(naive_policy.policy(), 1)})  # type: ignore[dict-item]


def call(monkeypatch: pytest.MonkeyPatch, command: Any, *words: object, code: int = 0) -> None:
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", ["a command", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == code


class Made(NamedTuple):
    """Means of the tiny policy in two objectives, and the prompts."""

    token: Path
    sequence: Path
    prompts: Path


@pytest.fixture(scope="module")
def made(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("means")
    prompts = tiny_policy.write_jsonl(folder / "p.jsonl", tiny_policy.prompts(7))
    with pytest.MonkeyPatch.context() as patch:
        words = (prompts, "-n", 6, "--max-tokens", 6, "--verifier", PARITY, "-o", folder / "r.jsonl")
        call(patch, rollout_command, "--model", policy_folder, *words)
        for kind in ("token", "sequence"):
            words = ("--mean", "--aggregation", kind, "-o", folder / f"{kind}.safetensors")
            call(patch, grad_command, "--model", policy_folder, folder / "r.jsonl", *words)
    return Made(folder / "token.safetensors", folder / "sequence.safetensors", prompts)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "influence.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_command(policy_folder: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's rollouts through cropi-grad give the same; without the option all other files are the same."""
    seen: list[list[Any]] = []
    plain = ByProduct.records

    def kept(self: ByProduct, step: int, parts: Any) -> Iterator[Any]:
        seen.append([record for part in parts for record in part])
        return plain(self, step, parts)

    monkeypatch.setattr(ByProduct, "records", kept)
    base = ("--model", policy_folder, made.prompts, "--steps", 2, "--batch", 5, "-n", 4, "--max-tokens", 6)
    base += ("--verifier", PARITY, "--learning-rate", "1e-2", "--eval-every", 9, "--collapse", 0)
    call(monkeypatch, train_command, *base, "--against", f"t={made.token}", "-o", tmp_path / "P1")
    call(monkeypatch, train_command, *base, "-o", tmp_path / "plain")
    found, expected = contents(tmp_path / "P1"), contents(tmp_path / "plain")
    assert found.keys() - expected.keys() == {"influence.jsonl"}
    assert [name for name in expected if found[name] != expected[name]] == []
    told = lines(tmp_path / "P1")
    assert [(one["step"], one["id"]) for one in told] == [
        (step, record["id"]) for step, records in enumerate(seen, 1) for record in records
    ]
    step = tiny_policy.write_jsonl(tmp_path / "step.jsonl", seen[0])
    words = (step, "--method", "reference", "--aggregation", "token", "--against", f"t={made.token}")
    call(monkeypatch, grad_command, "--model", policy_folder, *words, "-o", tmp_path / "grads.zarr", "--dim", 64)
    entries = list(Store(tmp_path / "grads.zarr").entries())
    assert [entry["status"] for entry in entries] == [one["status"] for one in told[: len(entries)]]
    assert sum(entry["status"] == "ok" for entry in entries) >= 2
    length = Store(tmp_path / "grads.zarr").attributes["against"]["t"]["norm"]
    for entry, one in zip(entries, told, strict=False):
        assert (one["id"], one["source"], one["pass_rate"]) == (entry["id"], entry["source"], entry["pass_rate"])
        if entry["status"] == "ok":
            assert one["norm"] == pytest.approx(entry["gradient_norm"], rel=1e-4)
            assert one["inner"]["t"] == pytest.approx(entry["inner"]["t"], rel=1e-4, abs=1e-4 * one["norm"] * length)
            assert one["scores"]["t"] == pytest.approx(one["inner"]["t"] / one["norm"] / length)


def test_killed_and_resumed_equals_straight(policy_folder: Path, made: Made, tmp_path: Path) -> None:
    """Killed in step 6, after lines of step 5 were written: these are dropped and written again."""
    settings = replace(SETTINGS, kl=0.0, entropy=0.0, model=str(policy_folder), against=(("t", str(made.token)),))
    given: dict[str, Any] = {
        "settings": settings,
        "observe": lambda policy: influence.by_product(policy, settings, False),
    }
    train(policy_folder, tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        train(policy_folder, tmp_path / "P1", die_at=6, **given)
    assert {one["step"] for one in lines(tmp_path / "P1.part")} == {1, 2, 3, 4, 5}
    train(policy_folder, tmp_path / "P1", **given)
    assert len(lines(tmp_path / "whole")) == 6 * 3
    same_run(tmp_path / "P1", tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kl": 0.1}, "--kl 0"),
        ({"entropy": 0.1}, "--entropy 0"),
        ({"mask_truncated": True}, "--no-mask-truncated"),
        ({"minibatch": 4}, "--minibatch"),
        ({"lora": 4}, "--lora"),
        ({"checkpoint_activations": True}, "--checkpoint-activations"),
        ({"against": (("t", "a"), ("t", "b"))}, "a name of its own"),
    ],
)
def test_what_it_does_not_go_with(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        options(**{"against": (("t", "mean.safetensors"),), **given})


def test_it_needs_our_own_passes() -> None:
    asked = options(against=(("t", "mean.safetensors"),))
    with pytest.raises(UsageError, match="torchrun"):
        check_available(asked, several=True)
    with pytest.raises(UsageError, match="--engine verl cannot follow --against"):
        refuse_what_verl_cannot(replace(asked, engine="verl"))


def test_means_of_something_else(policy_folder: Path, made: Made, tmp_path: Path) -> None:
    policy = load_policy(str(policy_folder), "cpu")
    other = tiny_policy.save(tmp_path / "other", seed=1)

    def refused(mean: Path, model: Path = policy_folder, **given: Any) -> str:
        with pytest.raises(InputError) as end:
            influence.by_product(policy, options(model=str(model), against=(("t", str(mean)),), **given), False)
        return str(end.value)

    assert "aggregation sequence, here token" in refused(made.sequence)
    assert "--mean --aggregation token" in refused(made.sequence)
    assert "policy_temperature 1.0, here 0.5" in refused(made.token, temperature=0.5)
    assert "another policy" in refused(made.token, other)
