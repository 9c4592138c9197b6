"""A prompt's gradient against float64 autograd, and its invariance to batching, order and shards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import naive_policy
import numpy as np
import pytest
import torch

from cropi_tools.data.manifest import Fingerprint
from cropi_tools.data.output import Output
from cropi_tools.data.records import Rollout, Sample
from cropi_tools.data.store import Store
from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.gradients import reference
from cropi_tools.gradients import write_mean as mean_work
from cropi_tools.gradients.accumulator import Measure, squared_norm
from cropi_tools.gradients.batching import survey
from cropi_tools.gradients.estimates import BackwardEstimates
from cropi_tools.gradients.prompt_objective import (
    GradientSettings,
    GradientTask,
    PromptGradient,
    prepare,
    without_gradient,
)
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.gradients.targets import Against
from cropi_tools.gradients.write_mean import collect_mean
from cropi_tools.gradients.write_store import collect_store
from cropi_tools.objective import Estimator
from cropi_tools.policy import packing
from cropi_tools.policy.layers import recomputes_activations
from cropi_tools.policy.loading import Policy
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.spec import Layout, ProjectionSpec

SHAPES = {
    "ragged": ((7, True), (12, False), (1, False), (3, True)),
    "all ended": ((4, True), (4, True), (9, True)),
    "all cut": ((10, False), (10, False), (10, False)),
    "only an end token, and empty": ((1, True), (0, False), (5, False)),
}


class One:
    """The reference path, a prompt at a time; the gradient stays in `gradient`."""

    def __init__(
        self, policy: Policy, settings: GradientSettings, behavior: Policy | None = None, **options: Any
    ) -> None:
        self.path, self.settings = ReferenceGradients(policy, settings, behavior, **options), settings
        self.gradient: dict[str, torch.Tensor] = {}

    def compute(self, rollout: Rollout) -> PromptGradient:
        self.gradient = {}
        task = prepare(rollout, self.settings)
        if isinstance(task, str):
            return without_gradient(rollout, task)

        def consume(name: str, gradients: torch.Tensor) -> None:
            assert name not in self.gradient  # once a parameter, tied weights included
            self.gradient[name] = gradients[0].clone()

        (found,) = self.path.compute([task], consume)
        assert all(parameter.grad is None for _, parameter in self.path.parameters)
        return found


def computed(computer: One, rollout: Rollout) -> dict[str, torch.Tensor]:
    assert computer.compute(rollout).status == "ok"
    return computer.gradient


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_autograd(tie: bool, shape: str) -> None:
    policy = naive_policy.policy(tie=tie)
    rollout = naive_policy.rollout(1, SHAPES[shape])
    found = computed(One(policy, GradientSettings()), rollout)
    assert ("lm_head.weight" in found) is not tie
    assert (
        naive_policy.relative_error(found, naive_policy.gradient(naive_policy.double_copy(policy.model), rollout))
        < 1e-5
    )


@pytest.mark.parametrize("weighting", ["token", "none"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_setting_equals_float64_autograd(weighting: Any, aggregation: Any, temperature: float) -> None:
    policy = naive_policy.policy()
    rollout = naive_policy.rollout(2)
    computer = One(policy, GradientSettings(Estimator(weighting), temperature, aggregation))
    expected = naive_policy.gradient(
        naive_policy.double_copy(policy.model), rollout, temperature, weighting, aggregation
    )
    assert naive_policy.relative_error(computed(computer, rollout), expected) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recomputed_behavior_equals_float64_autograd(temperature: float) -> None:
    policy, behavior = naive_policy.policy(seed=0), naive_policy.policy(seed=3)
    rollout = naive_policy.rollout(3)
    computer = One(policy, GradientSettings(policy_temperature=temperature), behavior)
    expected = naive_policy.gradient(
        naive_policy.double_copy(policy.model), rollout, temperature, behavior=naive_policy.double_copy(behavior.model)
    )
    assert naive_policy.relative_error(computed(computer, rollout), expected) < 1e-5
    assert all(parameter.grad is None for parameter in behavior.model.parameters())


def test_a_final_end_token_counts_only_if_it_was_sampled() -> None:
    policy = naive_policy.policy()
    ended = naive_policy.rollout(4, ((5, True), (6, False)))
    cut = ended._replace(
        samples=[
            Sample(s.token_ids[:-1], s.logprobs[:-1], s.reward) if s.token_ids[-1] == 1 else s for s in ended.samples
        ]
    )
    model = naive_policy.double_copy(policy.model)
    computer = One(policy, GradientSettings())
    for rollout, tokens in ((ended, 11), (cut, 10)):
        assert naive_policy.relative_error(computed(computer, rollout), naive_policy.gradient(model, rollout)) < 1e-5
        assert computer.compute(rollout).entry["tokens"] == tokens
    assert naive_policy.relative_error(computed(computer, ended), naive_policy.gradient(model, cut)) > 1e-2


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_passes_and_recomputed_activations_change_rounding_only(
    layout: str, recompute: bool, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "rows":
        monkeypatch.setattr(packing, "can_pack", lambda model: False)
    estimator = GradientSettings(Estimator(self_normalize=normalize))
    rollout = naive_policy.rollout(5, ((7, True), (12, False), (1, False), (0, False), (3, True), (9, True)))
    whole = One(naive_policy.policy(), estimator)
    expected, facts = computed(whole, rollout), whole.compute(rollout).entry
    passes: list[int] = []
    forward = reference.response_logprobs

    def counted(*given: Any) -> Any:
        passes.append(1)
        return forward(*given)

    monkeypatch.setattr(reference, "response_logprobs", counted)
    # tokens of a pass, and how many passes that makes; a prompt of 5; an empty response alone needs none
    for limit, number in {"packed": ((1, 5), (18, 3), (10**9, 1)), "rows": ((1, 5), (40, 3), (10**9, 1))}[layout]:
        computer = One(naive_policy.policy(), estimator, max_tokens=limit, recompute=recompute)
        passes.clear()
        assert naive_policy.relative_error(computed(computer, rollout), expected) < 2e-6
        # self-normalization needs all weights before the first gradient
        assert len(passes) == (2 * number if normalize and number > 1 else number)
        again = computer.compute(rollout).entry
        assert again.keys() == facts.keys()
        assert all(
            again[key] == (pytest.approx(facts[key], rel=1e-5) if isinstance(facts[key], float) else facts[key])
            for key in facts
        )


def test_recomputed_activations_leave_dropout_off() -> None:
    policy = naive_policy.policy()
    One(policy, GradientSettings(), recompute=True)
    assert recomputes_activations(policy.model)
    assert not [module for module in policy.model.modules() if module.training]


@pytest.mark.parametrize("max_tokens", [10**9, 18], ids=["one pass", "several passes"])
def test_bfloat16_weights_give_nearly_the_gradient(max_tokens: int) -> None:
    rollout = naive_policy.rollout(5)
    policy = naive_policy.policy()
    policy.model.bfloat16()
    exact = naive_policy.gradient(naive_policy.double_copy(policy.model), rollout)
    found = computed(One(policy, GradientSettings(), max_tokens=max_tokens), rollout)
    # one pass hands the weights' own format on, several are summed in float32
    assert {gradient.dtype for gradient in found.values()} == {torch.bfloat16 if max_tokens > 18 else torch.float32}
    assert naive_policy.relative_error(found, exact) < 0.1


def test_order_of_samples_and_earlier_prompts_do_not_matter() -> None:
    computer = One(naive_policy.policy(), GradientSettings())
    rollout = naive_policy.rollout(6)
    expected = computed(computer, rollout)
    computed(computer, naive_policy.rollout(7))
    again = computed(computer, rollout)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    turned = computed(computer, rollout._replace(samples=rollout.samples[::-1]))
    assert naive_policy.relative_error(turned, expected) < 2e-6


def sampled(policy: Policy, temperature: float, count: int = 6) -> Rollout:
    requests = [Request([5, 6, 7, 8], seed) for seed in range(count)]
    found = TransformersEngine(policy).sample(requests, Sampling(12, temperature))
    samples = [Sample(response.token_ids, response.logprobs, float(place % 2)) for place, response in enumerate(found)]
    return Rollout("sampled", "even", [5, 6, 7, 8], samples, {})


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ratio_is_one_at_stage_0_when_temperatures_agree(temperature: float) -> None:
    policy = naive_policy.policy()
    entry = One(policy, GradientSettings(policy_temperature=temperature)).compute(sampled(policy, temperature)).entry
    assert entry["max_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert entry["mean_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert entry["effective_sample_size"] == pytest.approx(1.0, abs=1e-9)
    assert entry["kl"] == pytest.approx(0.0, abs=1e-10)


def test_ratio_against_the_tempered_distribution() -> None:
    policy = naive_policy.policy()
    rollout = sampled(policy, 0.5)
    entry = One(policy, GradientSettings(policy_temperature=1.0)).compute(rollout).entry
    model = naive_policy.double_copy(policy.model)
    with torch.no_grad():
        logratio = torch.cat(
            [
                naive_policy.logprobs(model, rollout.prompt_token_ids, s.token_ids)
                - naive_policy.logprobs(model, rollout.prompt_token_ids, s.token_ids, 0.5)
                for s in rollout.samples
            ]
        )
    ratio = logratio.exp()
    assert float(ratio.min()) < 0.7  # the two distributions do differ
    assert entry["mean_ratio"] == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert entry["max_ratio"] == pytest.approx(float(ratio.max()), rel=1e-5)
    assert entry["kl"] == pytest.approx(float((ratio - 1 - logratio).mean()), rel=1e-4)
    assert entry["effective_sample_size"] == pytest.approx(
        float(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())), rel=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ratio_is_exactly_one_with_the_same_behavior_policy(
    temperature: float,
) -> None:
    rollout = naive_policy.rollout(8)
    bare = rollout._replace(samples=[sample._replace(logprobs=None) for sample in rollout.samples])
    computer = One(
        naive_policy.policy(), GradientSettings(policy_temperature=temperature), naive_policy.policy(), max_tokens=14
    )
    entry = computer.compute(bare).entry
    assert (entry["mean_ratio"], entry["max_ratio"], entry["kl"], entry["effective_sample_size"]) == (
        1.0,
        1.0,
        0.0,
        1.0,
    )


def test_prompts_without_gradient_have_no_forward_pass() -> None:
    policy = naive_policy.policy()
    policy.model.forward = None  # calling the model would fail
    policy.model.model.forward = None
    computer = One(policy, GradientSettings())
    rollout = naive_policy.rollout(9)
    same = rollout._replace(samples=[sample._replace(reward=0.1) for sample in rollout.samples])
    assert computer.compute(same).status == "zero-advantage"
    assert computer.compute(rollout._replace(samples=rollout.samples[:1])).status == "zero-advantage"
    empty = rollout._replace(samples=[Sample([], [], 0.0), Sample([], [], 1.0)])
    assert computer.compute(empty).status == "empty"
    twice = rollout.samples[:2]
    # equal responses with unequal rewards: what is left of their gradients is rounding, which has no direction to score
    cancelling = [
        *twice,
        *(sample._replace(reward=1 - sample.reward) for sample in twice),
        Sample([], [], 1.0),
        Sample([], [], 0.0),
    ]
    assert computer.compute(rollout._replace(samples=cancelling)).status == "zero-gradient"
    for settings in (GradientSettings(), GradientSettings(Estimator(ppo_clip=(0.2, 0.2)))):
        one_more = rollout._replace(samples=[*cancelling, twice[0]])
        assert isinstance(prepare(one_more, settings), GradientTask)
    assert isinstance(
        prepare(rollout._replace(samples=cancelling), settings), GradientTask
    )  # a PPO clip may drop one of two
    assert computer.gradient == {}


def test_refusals_name_the_prompt() -> None:
    computer = One(naive_policy.policy(), GradientSettings())
    rollout = naive_policy.rollout(10)
    greedy = rollout._replace(samples=[sample._replace(logprobs=None) for sample in rollout.samples])
    with pytest.raises(InputError, match=r"'r10'.*no log-probabilities.*--behavior"):
        computer.compute(greedy)
    impossible = rollout._replace(
        samples=[sample._replace(logprobs=[-1e4] * len(sample.token_ids)) for sample in rollout.samples]
    )
    with pytest.raises(InputError, match=r"'r10'.*not finite"):
        computer.compute(impossible)


def test_norm_of_a_large_tensor_does_not_lose_small_terms() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(30_000_000)
    assert squared_norm(gradient) == pytest.approx(float(np.sum(gradient.numpy().astype(np.float64) ** 2)), rel=1e-6)


SETTINGS = GradientSettings()


def make_store(path: Path, rollouts: list[Path], shard: tuple[int, int], mean: Path, max_tokens: int = 10**9) -> Store:
    computer = ReferenceGradients(naive_policy.policy(), SETTINGS, max_tokens=max_tokens)
    layout = Layout.of(computer.parameters)
    output = Output(path, Fingerprint("cropi-grad", {}, {}), {}, folder=True)
    assert output.open()
    spec = ProjectionSpec.create("countsketch", layout, 1024, 0)
    against = Against({"target": str(mean)}, layout, "P", {})
    facts = {
        "policy": "P",
        "objective": {},
        "tokenizer": "T",
        "projection": spec.to_json(),
        "layout": layout.to_json(),
        "device": "cpu",
        "against": against.attributes,
    }
    measure = Measure(layout, spec, against.directions, torch.device("cpu"))
    estimates = BackwardEstimates(computer, SETTINGS, measure, against)
    collect_store(estimates, SETTINGS, survey([str(r) for r in rollouts], 70, SETTINGS, shard), output, facts)
    return Store(path)


def test_sketches_do_not_depend_on_order_shards_or_passes(tmp_path: Path) -> None:
    made = [naive_policy.rollout(n) for n in range(20, 27)]
    made[3] = made[3]._replace(samples=[sample._replace(reward=1.0) for sample in made[3].samples])
    forward = naive_policy.write(tmp_path / "a.jsonl", made)
    backward = naive_policy.write(tmp_path / "b.jsonl", made[::-1])
    policy = naive_policy.policy()
    computer = ReferenceGradients(policy, SETTINGS)
    layout = Layout.of(computer.parameters)
    mean = tmp_path / "mean.safetensors"
    output = Output(mean, Fingerprint("cropi-grad", {}, {}), {})
    output.open()
    facts = {"policy": "P", "tokenizer": "T", "objective": {}}
    collect_mean(computer, SETTINGS, survey([str(forward)], 70, SETTINGS), output, layout, facts)

    def rows(stores: list[Store]) -> dict[str, list[Any]]:
        found = {}
        for store in stores:
            whole = np.concatenate([block for _, block in store.blocks()])
            norms, inner = store.column("gradient_norm"), store.column("inner/target")
            for entry in list(store.entries()):
                row = entry["row"]
                found[entry["id"]] = None if row is None else [*whole[row], norms[row], inner[row]]
        return found

    expected = rows([make_store(tmp_path / "whole.zarr", [forward], (1, 1), mean)])
    assert expected["r23"] is None
    assert len(expected) == 7
    assert rows([make_store(tmp_path / "turned.zarr", [backward], (1, 1), mean)]) == expected
    shards = [make_store(tmp_path / f"shard{i}.zarr", [forward], (i, 3), mean) for i in (1, 2, 3)]
    assert [len(list(store.entries())) for store in shards] == [2, 2, 3]
    assert rows(shards) == expected
    batched = rows([make_store(tmp_path / "batched.zarr", [forward], (1, 1), mean, max_tokens=20)])
    for identity, row in expected.items():
        if row is not None:
            np.testing.assert_allclose(batched[identity][:-2], row[:-2], atol=2e-4)  # rows are float16
            np.testing.assert_allclose(batched[identity][-2:], row[-2:], rtol=1e-5)

    # the mean is over all prompts, and its inner products are those of the gradients themselves
    model = naive_policy.double_copy(policy.model)
    single = {r.id: naive_policy.gradient(model, r) for r in made if r.id != "r23"}
    total = {name: sum(g[name] for g in single.values()) / len(made) for name in single["r20"]}
    for identity, gradient in single.items():
        inner = sum(float((gradient[name] * total[name]).sum()) for name in total)
        norm = math.sqrt(sum(float(value.square().sum()) for value in gradient.values()))
        assert expected[identity][-1] == pytest.approx(inner, rel=1e-4, abs=1e-6)
        assert expected[identity][-2] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("halves", [False, True])
def test_a_mean_goes_on_after_a_kill_at_any_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halves: bool) -> None:
    rollouts = naive_policy.write(tmp_path / "a.jsonl", map(naive_policy.rollout, range(30, 34)))
    computer = ReferenceGradients(naive_policy.policy(), SETTINGS)
    layout = Layout.of(computer.parameters)
    monkeypatch.setattr(mean_work, "SHARE_OF_SAVING", 1e9)
    monkeypatch.setattr(mean_work, "SECONDS_BETWEEN_COMMITS", -1.0)
    facts = {"policy": "P", "tokenizer": "T", "objective": {}}

    def run(path: Path) -> None:
        output = Output(path, Fingerprint("cropi-grad", {}, {}), {})
        assert output.open()
        try:
            work = survey([str(rollouts)], 70, SETTINGS)
            collect_mean(computer, SETTINGS, work, output, layout, facts, halves)
        finally:
            output._release_lock()

    run(tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    replace, saves = mean_work.os.replace, 0

    class Killed(BaseException):
        pass

    for survived in range(1, 5):
        path = tmp_path / f"killed{survived}.safetensors"
        saves = 0

        def dying(source: Any, target: Any, path: Path = path, survived: int = survived) -> None:
            nonlocal saves
            replace(source, target)
            if str(target) == str(path) + ".part":
                saves += 1
                if saves == survived:
                    raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(mean_work.os, "replace", dying)
            with pytest.raises(Killed):
                run(path)
        run(path)
        assert path.read_bytes() == whole
