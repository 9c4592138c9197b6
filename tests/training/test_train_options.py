"""The record of cropi-train's options: presets, what contradicts itself, what decides the output, and that no option is lost on the way."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
from training_runs import OTHER, options

from cropi_tools.runtime.errors import UsageError
from cropi_tools.training import estimate
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.presets import PRESETS

NEEDED = {"prompts": ("p.jsonl",), "model": "P0", "output": "P1", "steps": 2}
# what decides nothing by itself: inputs count by content, the rest leaves the policy the same beyond rounding
UNDECISIVE = {
    "prompts",
    "model",
    "output",
    "against",
    "evaluations",
    "reference",
    "allow_verifier",
    "verl_python",
    "preset",
}
UNDECISIVE |= {"track", "engine_memory", "device", "tokens_per_pass", "checkpoint_activations"}
UNDECISIVE |= {"dry_run", "as_json", "force", "quiet"}
# options that another engine has no use for
ENGINE = {"engine_memory": "vllm", "verl_python": "verl", "verl_option": "verl"}
TOGETHER = {name: {"engine": engine} for name, engine in ENGINE.items()} | {"as_json": {"dry_run": True}}


def test_other_values_are_other_values() -> None:
    assert OTHER.keys() == {field.name for field in fields(TrainOptions)}
    assert [name for name, value in OTHER.items() if getattr(options(), name) == value] == []


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_gives_all_of_its_values(preset: str) -> None:
    found = TrainOptions.asked({**NEEDED, "preset": preset})
    assert {name: getattr(found, name) for name in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_what_is_given_comes_before_a_preset(preset: str) -> None:
    """Also where it is the same as the default."""
    plain = TrainOptions(**NEEDED)
    for name in PRESETS[preset]:
        for value in (OTHER[name], getattr(plain, name)):
            found = TrainOptions.asked({**NEEDED, "preset": preset, name: value})
            assert getattr(found, name) == value
            rest = {other: value for other, value in PRESETS[preset].items() if other != name}
            assert {other: getattr(found, other) for other in rest} == rest


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0.0}, "nothing can be learned"),
        ({"samples": 1}, "give 2 or more"),
        ({"lora": 4, "carry": "full"}, "adapters begin again"),
        ({"clip": (1.0, 0.2)}, "--clip 1,0.2: the lower one is a share; give less than 1"),
        ({"clip": (0.0, 0.2)}, "--clip 0,0.2: expected numbers in the range: above 0"),
        ({"clip": (0.2, 0.0)}, "--clip 0.2,0"),
        ({"betas": (0.9, 1.5)}, "--betas 0.9,1.5"),
        ({"betas": (0.9, 1.0)}, "--betas 0.9,1"),
        ({"evaluations": (("a", "x"), ("a", "y"))}, "--eval: every set needs a name of its own"),
        ({"verl_option": ("a=1",)}, "--verl-option: --engine transformers has no use for it"),
        ({"verl_python": "x", "engine": "vllm"}, "--verl-python: --engine vllm has no use for it"),
        ({"engine_memory": 0.5}, "--engine-memory: --engine transformers has no use for it"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        options(**given)
    assert said in str(refused.value)


def decisive(**given: Any) -> dict[str, Any]:
    found = options(**given)
    return found.decisive(graded(found.verifier, found.partial_credit), dated=True)


def graded(verifier: str | None, partial_credit: bool = False) -> dict[str, Any]:
    """What decides the rewards, as `rewards.checked_verifiers` gives it."""
    return {"verifier": verifier, "own_verifiers": {}, "partial_credit": partial_credit}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_every_option_decides_the_output_or_has_no_part_in_it(name: str) -> None:
    more = TOGETHER.get(name, {})
    assert (decisive(**more) == decisive(**{**more, name: OTHER[name]})) == (name in UNDECISIVE)


def test_the_date_decides_only_where_a_template_asks_for_it() -> None:
    assert "date" not in options().decisive(graded("maths"), dated=False)
    assert options().resolved({})["date"] == options().date


class Probed(Exception):
    """The two steps would be made now."""


def test_an_estimate_follows_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what makes it short and leaves nothing behind."""
    seen: list[TrainOptions] = []

    def train(probe: TrainOptions, *others: Any) -> None:
        seen.append(probe)
        raise Probed

    monkeypatch.setattr(estimate, "train", train)
    test = tiny_policy.write_jsonl(tmp_path / "test.jsonl", tiny_policy.prompts(3))
    given = options(
        **{
            **OTHER,
            "carry": "weights",
            "engine": "verl",
            "evaluations": (("t", str(test)),),
            "as_json": False,
            "against": (),
        }
    )
    with pytest.raises(Probed):
        estimate.estimate(given, {})
    (probe,) = seen
    assert {name for name in OTHER if getattr(probe, name) != getattr(given, name)} == {
        *("steps", "batch", "minibatch", "save_every", "eval_every", "checkpoints", "collapse", "evaluations", "track"),
        *("state", "save_dtype"),
    }
    assert list(probe.sets) == ["t"]
