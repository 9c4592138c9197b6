"""What of a run's options verl is told, and what is refused; whether verl understands it is asked in tests/peers."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
from training_runs import OTHER, options

from cropi_tools.options import described
from cropi_tools.rewards import allow_files
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.training.options import TrainOptions
from cropi_tools.verl_backend.config import (
    HANDED_OVER,
    IRRELEVANT,
    REFUSED,
    REWARD_FILE,
    TRANSLATED,
    evaluation_file,
    override,
    overrides,
    rate_of,
    refuse_uneven_batches,
    refuse_what_verl_cannot,
)
from cropi_tools.verl_backend.data import prepare


def asked(**changed: Any) -> TrainOptions:
    return options(
        **{"steps": 5, "batch": 4, "samples": 8, "max_tokens": 16, "eval_every": 5, "engine": "verl", **changed}
    )


def told(prompts: int = 9, **changed: Any) -> dict[str, str]:
    wish = asked(**changed)
    given = overrides(wish, Path("/work"), prompts, 9, [Path(f"{name}.parquet") for name in wish.sets])
    return dict(text.split("=", 1) for text in given)


def test_every_option_is_translated_handed_over_irrelevant_or_refused() -> None:
    tables = [set(table) for table in (TRANSLATED, HANDED_OVER, IRRELEVANT, REFUSED)]
    assert set().union(*tables) == {field.name for field in fields(TrainOptions)}
    assert sum(map(len, tables)) - len(set().union(*tables)) == 1, "the schedule: of three verl has two"


@pytest.mark.parametrize("field", sorted(TRANSLATED))
def test_a_translated_option_reaches_verl(field: str) -> None:
    """The setting has another value, or is there at all, when the option is another."""
    setting, sets = TRANSLATED[field], (("t", "t.jsonl"),)
    same = {"batch": 128, "steps": 50, "evaluations": sets}
    before, after = told(999, **same), told(999, **{**same, field: OTHER[field]})
    assert setting in after
    assert before.get(setting) != after[setting]


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_refused_option_is_refused_by_name(field: str) -> None:
    value = {"schedule": "linear"}.get(field, OTHER[field])
    kl = 0.0 if field == "against" else 0.1
    refuse_what_verl_cannot(asked(kl=kl))
    with pytest.raises(
        UsageError, match=f"^--engine verl cannot follow {described(TrainOptions)[field].flag}: "
    ) as said:
        refuse_what_verl_cannot(asked(kl=kl, **{field: value}))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("field", [name for name, where in HANDED_OVER.items() if where == "in the reward file"])
def test_what_is_handed_over_is_in_the_reward_file(field: str, tmp_path: Path) -> None:
    mine = str(tmp_path / "mine.py")
    # the reward file allows the programs that a record names, which the command line has allowed before
    program = field == "allow_verifier"
    allow_files([mine])
    record = {"id": "a", "prompt": "1+1=", "answer": "2", "source": "s", "verifier": "exact"}
    wishes = {
        "before": (asked(), record),
        "after": (asked(**{field: OTHER[field]}), {**record, "verifier": f"{mine}:ok"} if program else record),
    }
    for name, (wish, prompt) in wishes.items():
        prepare(tmp_path / name, wish, [prompt], {}, tiny_policy.tokenizer())
    before, after = ((tmp_path / name / REWARD_FILE).read_text().replace(f"/{name}/", "/") for name in wishes)
    assert before != after
    assert (mine in after) == program


def test_the_users_own_settings_come_last() -> None:
    given = overrides(asked(verl_option=("trainer.nnodes=2",)), Path("/work"), 9, 9, [], ["a=1"])
    assert given[-2:] == ["a=1", "trainer.nnodes=2"]


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
        refuse_uneven_batches(asked(**changed, verl_option=tuple(extra)), 9)


def test_processes_that_share_a_row_count_once() -> None:
    shared = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
    refuse_uneven_batches(asked(samples=3, verl_option=("trainer.n_gpus_per_node=8", shared)), 9)


def test_the_starting_policy_under_another_name_is_the_reference(tmp_path: Path) -> None:
    (tmp_path / "P0").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "P0")
    policy = str(tmp_path / "P0")
    refuse_what_verl_cannot(asked(kl=0.1, model=policy, reference=str(tmp_path / "link")))
    refuse_what_verl_cannot(asked(model=policy, reference="other"))  # without a KL term it has no part
    with pytest.raises(UsageError, match="--reference"):
        refuse_what_verl_cannot(asked(kl=0.1, model=policy, reference="other"))


def test_values_in_hydras_grammar() -> None:
    value = {"a": [1, 2.5, True, None], "b": "it's", "c": "plain"}
    assert override("+x.y", value) == r"+x.y={a:[1,2.5,true,null],b:'it\'s',c:plain}"
    assert override("x", "null") == "x='null'"


def test_an_evaluation_set_may_have_any_name() -> None:
    assert evaluation_file("train") != told()["data.train_files"].strip("[]").rpartition("/")[2]


def test_the_rate_rises_in_the_first_step_unless_a_cosine_follows() -> None:
    rising = asked(warmup=4)
    assert [rate_of(rising, step) / 1e-6 for step in range(1, 6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    late = replace(rising, schedule="cosine")
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
