"""Generated prompts: reproducible, typed, shaped, kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.prompts.duplicates import Exclusion
from cropi_tools.prompts.families import plain, shape
from cropi_tools.prompts.recipes import reasoning_gym_prompts, recipe_prompts
from cropi_tools.runtime.errors import InputError, UsageError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_family_gives_the_items_of_reasoning_gym_itself() -> None:
    import reasoning_gym

    ours = list(reasoning_gym_prompts("gcd", 5, 2, {"max_value": "50"}, source="divisors"))
    theirs = reasoning_gym.create_dataset("gcd", size=5, seed=2 * 1_000_003, max_value=50)
    assert [record["id"] for record in ours] == [f"divisors-2-{index}" for index in range(5)]
    for record, entry in zip(ours, theirs, strict=True):
        assert (record["prompt"], record["answer"]) == (entry["question"], entry["answer"])
        assert record["source"] == "divisors"
        assert record["verifier"] == "reasoning-gym"
        kept = json.loads(json.dumps(record))["extra"]["reasoning_gym"]
        assert kept["dataset"] == "gcd"
        assert theirs.score_answer(entry["answer"], kept["entry"]) == 1.0


def test_the_same_seed_gives_the_same_records_and_the_next_seed_other_ones() -> None:
    first, again, other = (list(reasoning_gym_prompts("chain_sum", 30, seed)) for seed in (1, 1, 2))
    assert first == again
    assert not {record["prompt"] for record in first} & {record["prompt"] for record in other}


def test_settings_get_the_types_of_the_configuration() -> None:
    given = {"min_terms": "2", "max_terms": "3", "operators": "+,-", "operators_weights": "0.5,0.5"}
    for settings in (given, {"min_terms": 2, "max_terms": 3, "operators": ["+", "-"], "operators_weights": [0.5, 0.5]}):
        (record,) = reasoning_gym_prompts("simple_equations", 1, 3, settings)
        difficulty = record["extra"]["reasoning_gym"]["entry"]["metadata"]["difficulty"]
        assert (difficulty["min_terms"], difficulty["max_terms"], difficulty["operators_weights"]) == (2, 3, [0.5, 0.5])
    for text, negative in (("true", True), ("no", False)):
        records = reasoning_gym_prompts("chain_sum", 40, 1, {"allow_negation": text}, template="{expression}")
        assert any(record["prompt"].startswith("-") for record in records) == negative


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("chain_sums", {}, "did you mean chain_sum"),
        ("gcd", {"max_valu": "3"}, "did you mean max_value"),
        ("gcd", {"max_value": "three"}, "max_value=three is not a whole number"),
        ("chain_sum", {"allow_negation": "perhaps"}, "true or false"),
        ("gcd", {"seed": "3"}, "give it as --seed"),
        ("gcd", {"min_value": "9", "max_value": "3"}, "refuses these settings of gcd: max_value"),
        ("rearc", {}, "cannot be scored from a file"),
        ("game_of_life_halting", {}, "full credit to any text"),
    ],
)
def test_what_a_family_does_not_take_is_named(family: str, settings: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        next(reasoning_gym_prompts(family, 1, 1, settings))
    assert "\n" not in str(raised.value)


def test_templates_shape_question_and_answer() -> None:
    shaped = list(reasoning_gym_prompts("chain_sum", 4, 1, {}, "S{expression:nospace}=", "{answer:nospace,lower}"))
    unshaped = list(reasoning_gym_prompts("chain_sum", 4, 1))
    for short, long in zip(shaped, unshaped, strict=True):
        entry = long["extra"]["reasoning_gym"]["entry"]
        assert short["prompt"] == "S" + entry["metadata"]["expression"].replace(" ", "") + "="
        assert short["answer"] == entry["answer"]
        assert short["verifier"] == "exact"
        assert short["extra"] == {"reasoning_gym": {"dataset": "chain_sum"}}


def test_template_language() -> None:
    fields = {"question": "What  Is 2?", "numbers": (48, 36), "word": "Sun"}
    assert shape("G{numbers}=", fields) == "G48,36="
    assert shape("{question:nospace,lower}|{word:upper}{{}}", fields) == "whatis2?|SUN{}"
    assert shape("{word} \\boxed{} {{x}}", fields) == "Sun \\boxed{} {x}"
    for template, said in (
        ("{nubmers}", "no field 'nubmers'; there are numbers, question, word"),
        ("{0}", "no field '0'"),
        ("{word:tiny}", "no conversion 'tiny'; there are nospace"),
        ("{word!r}", "'!r' is not supported"),
        ("{word", "expected '}'"),
    ):
        with pytest.raises(UsageError, match=said.replace("{", "[{]")):
            shape(template, fields)


def test_further_items_replace_excluded_ones_until_the_family_runs_out() -> None:
    small = {"min_value": "1", "max_value": "6"}  # 36 questions
    first = list(reasoning_gym_prompts("gcd", 12, 1, small))
    exclusion = Exclusion()
    exclusion.forbid("seen", (record["prompt"] for record in first))
    second = list(reasoning_gym_prompts("gcd", 12, 2, small, exclusion=exclusion))
    assert len({record["prompt"] for record in first + second}) == 24
    assert exclusion.kept == 12
    assert exclusion.excluded + exclusion.exact > 0
    assert len({record["id"] for record in second}) == 12
    assert 30 <= len(list(reasoning_gym_prompts("gcd", 50, 3, small))) <= 36


def test_recipe_lines_share_one_exclusion(tmp_path: Path) -> None:
    level = {"family": "gcd", "source": "gcd", "template": "G{numbers}=", "answer_template": "{answer}"}
    recipe = write(
        tmp_path / "families.jsonl",
        {**level, "name": "gcd-9", "set": {"min_value": 1, "max_value": 9}, "size": 8},
        {**level, "name": "gcd-99", "set": {"min_value": 1, "max_value": 99}, "size": 5},
        {"family": "lcm", "size": 2},
    )
    records = list(recipe_prompts(recipe, 4))
    assert [record["source"] for record in records] == ["gcd"] * 13 + ["lcm"] * 2
    assert records[0]["id"].startswith("gcd-9-4-")
    assert len({record["prompt"] for record in records}) == 15
    assert list(recipe_prompts(recipe, 4, only=["gcd"])) == records[:13]
    names = [record["id"].rsplit("-", 1)[0] for record in recipe_prompts(recipe, 4, size=1)]
    assert names == ["gcd-9-4", "gcd-99-4", "lcm-4"]
    with pytest.raises(UsageError, match="no source 'gdc'; did you mean gcd"):
        list(recipe_prompts(recipe, 4, only=["gdc"]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"famly": "gcd"}, "unknown key 'famly'; did you mean family"),
        ({"source": "gcd"}, "no 'family'"),
        ({"family": "gcd", "size": 0}, "'size' must be"),
        ({"family": "gcd", "size": 1, "template": 3}, "'template' must be text"),
        ({"family": "gcd"}, "no 'size'"),
        ({"family": "lcm", "size": 1}, "the name 'lcm' stands on line 1 too"),
        ({"family": "gcd", "size": 1, "set": {"low": 1}}, "gcd has no setting 'low'"),
    ],
)
def test_a_faulty_recipe_names_the_line(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    recipe = write(tmp_path / "r.jsonl", {"family": "lcm", "size": 1}, line)
    with pytest.raises(InputError, match=f"r.jsonl:2: {said}"):
        list(recipe_prompts(recipe, 1))


def test_plain_is_what_json_gives_back() -> None:
    import datetime

    import numpy

    value = {1: (2, {"b", "a"}), "when": datetime.date(2026, 1, 2), "n": numpy.arange(2), "x": None, "y": 0.5}
    assert plain(value) == {"1": [2, ["a", "b"]], "when": "2026-01-02", "n": [0, 1], "x": None, "y": 0.5}
