"""What of a run's options verl is told, and what is refused; whether verl understands it is asked in tests/peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.verl_backend.config import evaluation_file, override, overrides, rate_of, refuse_what_verl_has_not

OPTIONS: dict[str, Any] = {
    "steps": 5,
    "batch": 4,
    "minibatch": 0,
    "samples": 8,
    "max_tokens": 16,
    "temperature": 1.0,
    "dynamic_sampling": 0,
    "aggregation": "token",
    "advantage": "group",
    "clip": (0.2, 0.2),
    "kl": 0.0,
    "entropy": 0.0,
    "mask_truncated": False,
    "importance_cap": 0.0,
    "learning_rate": 1e-6,
    "schedule": "constant",
    "warmup": 0,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "max_gradient_norm": 1.0,
    "lora": 0,
    "carry": "weights",
    "eval_every": 5,
    "eval_samples": 1,
    "eval_temperature": 0.0,
    "save_every": 25,
    "keep": 1,
    "seed": 0,
}


def told(prompts: int = 9, **changed: Any) -> dict[str, str]:
    given = overrides({**OPTIONS, **changed}, "P0", Path("/work"), prompts, 9, [])
    return dict(text.split("=", 1) for text in given)


@pytest.mark.parametrize(
    ("prompts", "batch", "steps"), [(199, 100, 50), (100, 100, 7), (1000, 64, 15), (1000, 64, 16), (3, 1, 7)]
)
def test_epochs_of_whole_batches_reach_the_last_step(prompts: int, batch: int, steps: int) -> None:
    """verl ends at its last epoch even where steps are left."""
    epochs = int(told(prompts, batch=batch, steps=steps)["trainer.total_epochs"])
    assert (epochs - 1) * (prompts // batch) < steps <= epochs * (prompts // batch)


def test_a_mini_batch_is_no_larger_than_the_batch() -> None:
    assert told(minibatch=64)["actor_rollout_ref.actor.ppo_mini_batch_size"] == "4"


@pytest.mark.parametrize(
    ("changed", "extra", "said"),
    [
        ({"batch": 6, "minibatch": 4}, [], "--minibatch 4: verl fills an incomplete one"),
        ({"samples": 3}, [], "verl shares 12 responses evenly among 8 processes"),
        ({}, ["trainer.n_gpus_per_node=4", "trainer.nnodes=3"], "32 responses evenly among 12 processes"),
        ({}, ["+trainer.n_gpus_per_node=5"], "32 responses evenly among 5 processes"),
    ],
)
def test_mini_batches_that_verl_cannot_share_out_are_refused(
    changed: dict[str, Any], extra: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        refuse_what_verl_has_not({**OPTIONS, **changed}, "P0", None, 9, extra)


def test_processes_that_share_a_row_count_once() -> None:
    shared = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
    refuse_what_verl_has_not({**OPTIONS, "samples": 3}, "P0", None, 9, ["trainer.n_gpus_per_node=8", shared])


def test_the_starting_policy_under_another_name_is_the_reference(tmp_path: Path) -> None:
    (tmp_path / "P0").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "P0")
    refuse_what_verl_has_not(OPTIONS, str(tmp_path / "P0"), str(tmp_path / "link"), 9, ["trainer.n_gpus_per_node=1"])
    with pytest.raises(UsageError, match="--reference other"):
        refuse_what_verl_has_not(OPTIONS, str(tmp_path / "P0"), "other", 9)


def test_values_in_hydras_grammar() -> None:
    value = {"a": [1, 2.5, True, None], "b": "it's", "c": "plain"}
    assert override("+x.y", value) == r"+x.y={a:[1,2.5,true,null],b:'it\'s',c:plain}"
    assert override("x", "null") == "x='null'"


def test_an_evaluation_set_may_have_any_name() -> None:
    assert evaluation_file("train") != told()["data.train_files"].strip("[]").rpartition("/")[2]


def test_the_rate_rises_in_the_first_step_unless_a_cosine_follows() -> None:
    rising = {**OPTIONS, "warmup": 4}
    assert [rate_of(rising, step) / 1e-6 for step in range(1, 6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    late = {**rising, "schedule": "cosine"}
    assert [rate_of(late, step) / 1e-6 for step in range(1, 6)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("+k.style", "${oc.env:HOME}"),
        ("+k.style", "a ${x} b"),
        ("+k.style", ["plain", "${x}"]),
        ("+k.style", {"tone": "${oc.env:HOME}"}),
        ("+k.style", {"a=b": 1}),
        ("+k.style", {"a b": 1}),
        ("+k.style", {"${x}": 1}),
        ("+k.style", {"": 1}),
        ("+k.a=b", 1),
        ("+k.a b", 1),
        ("+k.a\nb", 1),
        ("+k.", 1),
        ("+k..a", 1),
        ("+k.${x}", 1),
        ("~trainer", 1),
        ("+k.style", "two\nlines"),
        ("+k.style", "\x1b[2J"),
    ],
)
def test_what_hydra_would_read_as_something_else_is_refused(name: str, value: Any) -> None:
    """Arguments of a chat template come from records."""
    with pytest.raises(InputError) as refused:
        override(name, value)
    assert "\n" not in str(refused.value)


def test_odd_but_harmless_texts_are_quoted() -> None:
    assert override("+k.style", "it's $5, {so}: yes") == "+k.style='it\\'s $5, {so}: yes'"
