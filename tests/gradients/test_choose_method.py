"""Which way is taken: by the memory that a device has, never by what is free, and as before for policies that are not large."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import naive_policy
import pytest
import test_per_sample as per_sample_tests
import torch

from cropi_tools.gradients import choose_method, per_sample
from cropi_tools.gradients.choose_method import Method, choose_path
from cropi_tools.gradients.estimates import GradientPath
from cropi_tools.gradients.per_sample import FastGradients
from cropi_tools.gradients.prompt_objective import GradientSettings
from cropi_tools.gradients.reference import ReferenceGradients
from cropi_tools.policy.loading import Policy

SETTINGS = GradientSettings()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """One whose embedding is most of it, and too large for the fast path's usual memory."""
    monkeypatch.setattr(per_sample, "GRADIENT_BYTES", 1 << 18)
    monkeypatch.setattr(choose_method, "GRADIENT_BYTES", 1 << 18)
    return per_sample_tests.policy_of("Qwen2", vocab_size=4000, tie_word_embeddings=request.param)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory that a process may have."""
    return lambda size: monkeypatch.setattr(choose_method, "memory_limit", lambda: size)


def needed(policy: Policy) -> int:
    """What the gradients may take: all of one prompt's, and the largest parameter's of two."""
    sizes = [parameter.nbytes for _, parameter in policy.trained]
    return sum(sizes) + 2 * max(sizes)


def chosen(policy: Policy, method: Method = "auto") -> GradientPath:
    return choose_path(method, policy, SETTINGS, None, 16384, False)


def test_a_large_embedding_takes_the_fast_path_two_prompts_a_pass(
    policy: Policy, memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    memory(4 * needed(policy))
    path = chosen(policy)
    assert isinstance(path, FastGradients)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("two short prompts a pass: their gradients take ")
    tasks = per_sample_tests.tasks_of(per_sample_tests.rollouts())
    assert path.room_for(tasks[:1], tasks[1])
    assert not path.room_for(tasks[:2], tasks[2])
    for pair in (tasks[:2], tasks[2:4], tasks[4:]):
        found, _ = per_sample_tests.gradients_of(path, pair)
        expected, _ = per_sample_tests.one_by_one(ReferenceGradients(policy, SETTINGS), pair)
        per_sample_tests.assert_equal(found, expected)


def test_with_too_little_memory_it_takes_the_reference_path_and_says_why(
    policy: Policy, memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    memory(4 * needed(policy) - 1)
    assert isinstance(chosen(policy), ReferenceGradients)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("one prompt a pass: the gradients of two would take ")
    assert line.endswith(" of memory on cpu")
    fast = chosen(policy, "fast")
    assert isinstance(fast, FastGradients)
    tasks = per_sample_tests.tasks_of(per_sample_tests.rollouts())
    assert fast.room_for([], tasks[0])
    assert not fast.room_for(tasks[:1], tasks[1])


def test_a_policy_that_is_not_large_is_batched_as_ever(
    memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """However little memory there is: stores that are half done have these batches."""
    policy = naive_policy.policy()
    task = per_sample_tests.tasks_of(per_sample_tests.rollouts())[0]
    for size in (1, 1 << 50):
        memory(size)
        path = chosen(policy)
        assert isinstance(path, FastGradients)
        together = [task]
        while path.room_for(together, task):
            together.append(task)
        assert len(together) == per_sample.CPU_STATES // 32 // (len(task.prompt) + task.tokens)
    assert capsys.readouterr().err == ""


def test_the_memory_of_a_gpu_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(total_memory=80 << 30)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device = torch.device("cuda", 1)
    assert choose_method.device_memory(device) == 80 << 30
    assert asked == [device]
