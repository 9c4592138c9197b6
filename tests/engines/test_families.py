"""A sweep over the library's families, beyond every length at which a model computes something else: samples, log-probabilities, gradients.

Everything is compared with one fresh pass over each prompt and response alone, through a model no pass went through before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import families
import naive_policy
import pytest
import torch

from cropi_tools.data.errors import InputError
from cropi_tools.data.records import Rollout, Sample
from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed
from cropi_tools.engines.transformers_engine import TransformersEngine
from cropi_tools.influence.fast_gradients import FastGradients, NoRule
from cropi_tools.influence.forward_mode import ForwardMode
from cropi_tools.influence.gradients import ReferenceGradients
from cropi_tools.influence.prompt_objective import GradientSettings, Task, prepare
from cropi_tools.objective import Estimator

LENGTHS = (1, 5, families.LIMIT - 1, families.LIMIT, families.LIMIT + 1, 24)  # of prompts
TOKENS = 14
QUICK = ("llama", "mistral", "gpt_oss", "llama4_text", "rwkv", "nemotron_h", "bart", "phi3 longrope", "llama dynamic")


@pytest.fixture(params=[pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in families.FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def requests(lengths: tuple[int, ...] = LENGTHS) -> list[Request]:
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 90, (length,), generator=draw).tolist() for length in lengths]
    return [Request(ids, sample_seed(5, number, k)) for number, ids in enumerate(prompts) for k in range(2)]


def same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_samples(family: str) -> None:
    """Their log-probabilities are those of a fresh pass, and they depend on nothing but their own request."""
    pristine = families.build(family)
    for loop in (True, False):
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


def naive_gradient(pristine: Any, task: Task) -> dict[str, torch.Tensor]:
    """The sum over responses of A_k c_k grad log pi, by single fresh passes."""
    total: dict[str, torch.Tensor] = {}
    for response, advantage, share in zip(task.responses, task.advantages, task.coefficients, strict=True):
        if response:
            model = copy.deepcopy(pristine)
            (advantage * share * families.differentiable_logprobs(model, task.prompt, response).sum()).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0) + parameter.grad
    return total


def test_gradients(family: str) -> None:
    """Reference, fast and forward mode, in the batches that they allow."""
    pristine, policy = families.build(family), families.policy(family)
    settings = GradientSettings(Estimator("none"))
    tasks = [task for task in (prepare(rollout, settings) for rollout in rollouts()) if isinstance(task, Task)]
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


class Direction:
    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self._parts = parts

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        return self._parts[name].to(device)


def batches(computer: Any, tasks: list[Task]) -> Iterator[list[Task]]:
    batch: list[Task] = []
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
