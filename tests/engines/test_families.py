"""A sweep over the library's families, beyond every length at which a model computes something else: samples, log-probabilities, gradients.

Everything is compared with one fresh pass over each prompt and response alone, through a model no pass went through before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import families
import naive_policy
import pytest
import torch
import transformers
from training_runs import add_gradient, options_of

from cropi_tools.data.records import Rollout, Sample
from cropi_tools.engines.decoding import can_decode
from cropi_tools.engines.generating import EQUAL_LENGTHS, GENERATE, WITHOUT_CACHE, Way, way_to_sample
from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.gradients.jvp import ForwardMode
from cropi_tools.gradients.per_sample import FastGradients
from cropi_tools.gradients.per_sample_rules import NoRule
from cropi_tools.gradients.prompt_objective import GradientSettings, GradientTask, prepare
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.objective import Estimator, group_advantages
from cropi_tools.policy.loading import Policy
from cropi_tools.policy.packing import can_pack
from cropi_tools.runtime.errors import InputError
from cropi_tools.training.distributed import Ranks
from cropi_tools.training.loss_settings import LossSettings
from cropi_tools.training.update import Updater

LENGTHS = (1, 5, families.LIMIT - 1, families.LIMIT, families.LIMIT + 1, 24)  # of prompts
TOKENS = 14
QUICK = ("llama4_text", "rwkv", "phi3 longrope", "llama dynamic")


def sweep(quick: Iterable[str]) -> Any:
    """All families; those that are not `quick` are slow tests."""
    marked = [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in families.FAMILIES]
    return pytest.mark.parametrize("family", marked)


def requests(lengths: tuple[int, ...] = LENGTHS) -> list[Request]:
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 90, (length,), generator=draw).tolist() for length in lengths]
    return [Request(ids, sample_seed(5, number, k)) for number, ids in enumerate(prompts) for k in range(2)]


def same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@sweep(QUICK)
def test_samples(family: str) -> None:
    """Their log-probabilities are those of a fresh pass, and they depend on nothing but their own request."""
    pristine = families.build(family)
    for loop in (True, False) if can_decode(families.build(family)) else (False,):
        engine, wanted, sampling = TransformersEngine(families.policy(family), loop), requests(), Sampling(TOKENS, 1.0)
        found = engine.sample(wanted, sampling)
        for request, one in zip(wanted, found, strict=True):
            assert len(one.token_ids) == TOKENS
            expected = families.logprobs(pristine, request.prompt_token_ids, one.token_ids)
            assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        same(engine.sample(wanted[3:5], sampling), found[3:5])
        same([engine.sample([wanted[place]], sampling)[0] for place in (9, 0)], [found[9], found[0]])


def rollouts() -> list[Rollout]:
    """Prompts and responses below and beyond the limit, in one prompt too."""
    draw = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 90, (count,), generator=draw).tolist()

    shapes = [(2, (3, 4, 0)), (5, (4, 25, 11, 12, 0)), (families.LIMIT, (1, 9)), (20, (6, 3, 6))]
    return [
        Rollout(
            f"r{number}",
            "s",
            ids(prompt),
            [Sample(ids(tokens), [-4.0] * tokens, float(place % 2)) for place, tokens in enumerate(lengths)],
            {},
        )
        for number, (prompt, lengths) in enumerate(shapes)
    ]


def naive_gradient(pristine: Any, task: GradientTask) -> dict[str, torch.Tensor]:
    """The sum over responses of A_k c_k grad log pi, by single fresh passes."""
    total: dict[str, torch.Tensor] = {}
    for response, advantage, share in zip(task.responses, task.advantages, task.coefficients, strict=True):
        if response:
            model = copy.deepcopy(pristine)
            (advantage * share * families.differentiable_logprobs(model, task.prompt, response).sum()).backward()
            add(total, model)
    return total


@sweep(QUICK[2:])
def test_gradients(family: str) -> None:
    """Reference, fast and forward mode, in the batches that they allow."""
    pristine, policy = families.build(family), families.policy(family)
    settings = GradientSettings(Estimator("none"))
    tasks = [task for task in (prepare(rollout, settings) for rollout in rollouts()) if isinstance(task, GradientTask)]
    expected = [naive_gradient(pristine, task) for task in tasks]
    reference = ReferenceGradients(policy, settings)
    for task, naive in zip(tasks, expected, strict=True):
        found: dict[str, torch.Tensor] = {}
        reference.compute([task], lambda name, gradients, found=found: found.__setitem__(name, gradients[0].clone()))
        close(found, naive)
    try:
        fast = FastGradients(policy, settings)
    except NoRule:
        fast = None
    for batch in batches(fast, tasks) if fast else ():
        rows: list[dict[str, torch.Tensor]] = [{} for _ in batch]

        def consume(name: str, gradients: torch.Tensor, rows: list[dict[str, torch.Tensor]] = rows) -> None:
            for row, gradient in zip(rows, gradients, strict=True):
                row[name] = gradient.clone()

        fast.compute(batch, consume)
        for task, row in zip(batch, rows, strict=True):
            close(row, expected[tasks.index(task)])
    direction = {name: parameter.detach().flatten().sign() for name, parameter in policy.trained}
    try:
        forward = ForwardMode(policy, settings, {"v": Direction(direction)})
    except InputError as error:
        if "use --method reference" not in str(error):
            raise
        return
    for batch in batches(forward, tasks):
        for task, one in zip(batch, forward.compute(batch), strict=True):
            naive = expected[tasks.index(task)]
            wanted = sum(float(g.flatten().double() @ direction[name].double()) for name, g in naive.items())
            norm = sum(float(g.double().square().sum()) for g in naive.values()) ** 0.5
            size = sum(len(part) for part in direction.values()) ** 0.5
            assert one.inner["v"] == pytest.approx(wanted, abs=1e-4 * norm * size)


@sweep(QUICK[2:])
def test_training(family: str) -> None:
    """One update's gradient, with a reference of the same kind that has moved."""
    pristine, policy, reference = families.build(family), families.policy(family), families.policy(family)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(1.05)
    moved = copy.deepcopy(reference.model)  # before any pass
    loss = LossSettings(1.0, (0.999999, 1e6), 0.3, 0.0, "token")
    records = [{**naive_policy.record(rollout), "prompt_token_ids": rollout.prompt_token_ids} for rollout in rollouts()]
    add_gradient(Updater(policy, reference, options_of(loss), Ranks()), records)
    every = sum(len(sample["token_ids"]) for record in records for sample in record["samples"])
    expected: dict[str, torch.Tensor] = {}
    for record in records:
        advantages = group_advantages([sample["reward"] for sample in record["samples"]], "group")
        assert advantages
        for advantage, sample in zip(advantages, record["samples"], strict=True):
            if sample["token_ids"]:
                model, pair = copy.deepcopy(pristine), (record["prompt_token_ids"], sample["token_ids"])
                found, known = families.differentiable_logprobs(model, *pair), families.logprobs(moved, *pair)
                ratio, gap = (found - torch.tensor(sample["logprobs"])).exp(), known - found
                ((loss.kl * (gap.exp() - 1 - gap) - advantage * ratio).sum() / every).backward()
                add(expected, model)
    close({name: p.grad for name, p in policy.trained if p.grad is not None}, expected)


@pytest.mark.parametrize("behavior", ["llama dynamic", pytest.param("mistral longrope", marks=pytest.mark.slow)])
def test_behavior_policies_have_lengths_of_their_own(behavior: str) -> None:
    pristine, policy, other = families.build("llama"), families.policy("llama"), families.policy(behavior)
    settings = GradientSettings(Estimator("token"))
    assert can_pack(policy.model)
    for made in (ReferenceGradients(policy, settings, other), FastGradients(policy, settings, other)):
        tasks = [prepare(rollout, settings) for rollout in rollouts()]
        for batch in batches(made, [task for task in tasks if isinstance(task, GradientTask)]):
            rows: list[dict[str, torch.Tensor]] = [{} for _ in batch]

            def consume(name: str, gradients: torch.Tensor, rows: list[dict[str, torch.Tensor]] = rows) -> None:
                for row, gradient in zip(rows, gradients, strict=True):
                    row[name] = gradient.clone()

            made.compute(batch, consume)
            for task, row in zip(batch, rows, strict=True):
                expected: dict[str, torch.Tensor] = {}
                for response, advantage, share in zip(task.responses, task.advantages, task.coefficients, strict=True):
                    if response:
                        model = copy.deepcopy(pristine)
                        found = families.differentiable_logprobs(model, task.prompt, response)
                        beta = families.logprobs(families.build(behavior), task.prompt, response)
                        (advantage * share * (found - beta).exp().sum()).backward()
                        add(expected, model)
                close(row, expected)


@sweep(QUICK)
def test_the_loop_samples_in_bfloat16_only_where_it_does_in_float32(family: str) -> None:
    """Rounding may hide from a trial what is wrong with the loop, and must not let it in."""
    narrow = families.policy(family).model.to(torch.bfloat16)
    assert not can_decode(narrow) or can_decode(families.policy(family).model)


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *(("llama", GENERATE), ("mistral", GENERATE), ("llama dynamic", GENERATE), ("gpt_oss", GENERATE)),
        *(("llama4_text", EQUAL_LENGTHS), ("bart", EQUAL_LENGTHS), ("rwkv", WITHOUT_CACHE), ("moshi", WITHOUT_CACHE)),
    ],
)
@pytest.mark.parametrize(
    "kind", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_which_way_each_is_sampled(family: str, way: Way, kind: torch.dtype) -> None:
    policy = families.policy(family)
    policy.model.to(kind)
    limits = [copy.deepcopy(vars(module.config)) for module in policy.model.modules() if hasattr(module, "config")]
    assert way_to_sample(policy.model, "memory") == way or (kind == torch.bfloat16 and way != GENERATE)
    # whether the loop samples does not depend on the number format, which hides errors
    by_loop = TransformersEngine(policy).settings(Sampling(3, 1.0))["decoder"] == "loop"
    assert by_loop == can_decode(families.policy(family).model)
    after = [vars(module.config) for module in policy.model.modules() if hasattr(module, "config")]
    assert [one == other for one, other in zip(limits, after, strict=True)] == [True] * len(limits)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(num_hidden_layers=2, num_attention_heads=4),
        transformers.XLMConfig(n_layers=2, n_heads=4),
    ],
    ids=["bert", "xlm"],
)
def test_a_model_that_sees_what_follows_is_refused(config: Any) -> None:
    for name, value in {"vocab_size": 90, "hidden_size": 32, "initializer_range": 0.3, "pad_token_id": 0}.items():
        setattr(config, name, value)
    config.embed_init_std = 0.3
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    with pytest.raises(InputError, match=r"memory: (Bert|XLM).* no causal language model"):
        TransformersEngine(Policy(model, None, [1], "memory")).sample(requests((3,)), Sampling(4, 1.0))


def test_the_manifest_says_where_frequencies_change(capsys: pytest.CaptureFixture[str]) -> None:
    for family, limit in (("llama longrope", families.LIMIT), ("llama dynamic", families.LIMIT), ("llama yarn", None)):
        engine = TransformersEngine(families.policy(family))
        settings = engine.settings(Sampling(TOKENS, 1.0))
        assert settings.get("rotary_frequencies_change_beyond") == limit
        assert settings["decoder"] == "loop"
        engine.sample(requests((1,)), Sampling(4, 1.0))
        assert not capsys.readouterr().err
        engine.sample(requests((10,)), Sampling(TOKENS, 1.0))
        engine.sample(requests((10,)), Sampling(TOKENS, 1.0))
        assert capsys.readouterr().err.count("rotary frequencies change") == (limit is not None)


def add(total: dict[str, torch.Tensor], model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            total[name] = total.get(name, 0) + parameter.grad


class Direction:
    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self._parts = parts

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        return self._parts[name].to(device)


def batches(computer: Any, tasks: list[GradientTask]) -> Iterator[list[GradientTask]]:
    batch: list[GradientTask] = []
    for task in tasks:
        if batch and not computer.room_for(batch, task):
            yield batch
            batch = []
        batch.append(task)
    yield batch


def close(found: dict[str, torch.Tensor], naive: dict[str, torch.Tensor]) -> None:
    zero = {name for name, gradient in naive.items() if not gradient.any()}
    found, naive = ({n: g for n, g in one.items() if n not in zero} for one in (found, naive))
    assert naive_policy.relative_error(found, naive) < 1e-4
