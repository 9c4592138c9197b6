"""cropi-select as it is called: what stands in its output, and how many prompts are asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.cli.select import select
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.selection.options import SelectOptions

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # outputs of commands that fail
SCORES = {"a": {"x": 0.1, "y": 0.4}, "b": {"x": 0.3, "y": 0.2}, "c": None, "d": {"x": -0.5, "y": -0.5}}


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    records = [{"id": name, "prompt": name, "answer": "1", "source": "s"} for name in SCORES]
    scored = [
        {"id": name, "source": "s", "scores": scores, "pass_rate": 0.25, "status": "ok"}
        for name, scores in SCORES.items()
    ]
    for path, lines in (("p.jsonl", records), ("s.jsonl", scored)):
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def selected(**given: Any) -> list[dict[str, Any]]:
    options = SelectOptions(
        **{"scores": ("s.jsonl",), "prompts": ("p.jsonl",), "output": "o.jsonl", "force": True, **given}
    )
    select(options)
    return [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("by", ["influence", "shuffled"])
def test_influence_says_its_scores_and_what_they_were_merged_into(by: str, pool: Path) -> None:
    found = selected(by=by, number=2)
    assert sorted(record["score"]["x"] for record in found) == [0.1, 0.3]
    assert [record["reciprocal_rank"] for record in found] == [1.5, 1.5]


@pytest.mark.parametrize(
    ("by", "score"), [("learnability", 0.1875), ("pass-rate", 0.25), ("random", None), ("full", None)]
)
def test_the_score_of_other_rules_is_a_number_or_nothing(by: str, score: float | None, pool: Path) -> None:
    for record in selected(by=by, ratio="1"):
        assert record["score"] == score
        assert "reciprocal_rank" not in record


def test_a_number_beyond_what_can_be_selected_is_said(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(selected(number=4)) == 3
    assert "-n 4 asks for 4 prompts, and only 3 can be selected" in capsys.readouterr().err
    assert len(selected(number=9, by="random")) == 4
    assert "-n 9 asks for 9 prompts, and only 4 can be selected" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"ratio": "0.1"}, {"by": "full"}])
def test_a_number_stands_alone(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="-n 3"):
        SelectOptions(prompts=("p.jsonl",), number=3, **given)


def test_only_what_changed_has_another_fingerprint() -> None:
    """Influence has other fields than before; a number is another question than a share."""
    plain = {
        by: SelectOptions(prompts=("p.jsonl",), by=by).decisive() for by in ("influence", "shuffled", "random", "full")
    }  # type: ignore[arg-type]
    assert [by for by, found in plain.items() if "fields" in found] == ["influence", "shuffled"]
    assert plain["random"] == {"by": "random", "ratio": "0.1", "band": None, "seed": 0, "format": "jsonl"}
    number = SelectOptions(prompts=("p.jsonl",), by="random", number=3).decisive()
    assert number == {"by": "random", "number": 3, "band": None, "seed": 0, "format": "jsonl"}


def with_predictions() -> None:
    records = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    for record, measured in zip(records, (True, False, True, False), strict=True):
        record["measured"] = measured
        if not measured:
            record |= {"status": "predicted", "deviation": {"x": 0.1, "y": 0.1}, "pass_rate": None}
    Path("s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(("among", "ids"), [("measured", {"a"}), ("predicted", {"b", "d"}), ("all", {"a", "b", "d"})])
def test_measured_and_predicted_scores_are_chosen_among(among: str, ids: set[str], pool: Path) -> None:
    with_predictions()
    given = {} if among == "measured" else {"among": among}
    assert {record["id"] for record in selected(ratio="1", **given)} == ids


@pytest.mark.parametrize("among", ["predicted", "all"])
def test_predictions_are_asked_of_a_file_that_has_some(among: str, pool: Path) -> None:
    with pytest.raises(InputError, match=f"--among {among}: s.jsonl has measured scores alone"):
        selected(among=among, ratio="1")


RATES = {"a": 0.5, "b": 0.25, "c": 0.0, "d": 1.0}


def with_rollouts(*left_out: str) -> None:
    """Scores and, in two shards, rollouts of the same pass rates."""
    scored = [
        json.loads(line) | {"pass_rate": rate}
        for line, rate in zip(Path("s.jsonl").read_text().splitlines(), RATES.values(), strict=True)
    ]
    Path("s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in scored))
    lines = [
        {
            "id": name,
            "source": "s",
            "prompt_token_ids": [1],
            "samples": [{"token_ids": [2], "reward": float(k < 4 * rate)} for k in range(4)],
        }
        for name, rate in RATES.items()
        if name not in left_out
    ]
    for path, part in (("r1.jsonl", lines[:2]), ("r2.jsonl", lines[2:])):
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in part))


@pytest.mark.parametrize("by", ["learnability", "hardest", "pass-rate"])
def test_rollouts_tell_the_pass_rates_as_scores_do(by: str, pool: Path) -> None:
    with_rollouts()
    by_scores = selected(by=by, ratio="0.5")
    assert selected(by=by, ratio="0.5", scores=(), rollouts=("r1.jsonl", "r2.jsonl")) == by_scores
    assert [record["pass_rate"] for record in by_scores] == [RATES[record["id"]] for record in by_scores]


def test_rollouts_of_a_part_of_the_pool_are_refused(pool: Path) -> None:
    with_rollouts("d")
    with pytest.raises(InputError, match="'d' has no record in the scores or rollouts"):
        selected(by="hardest", ratio="1", scores=(), rollouts=("r1.jsonl", "r2.jsonl"))


@pytest.mark.parametrize("by", ["influence", "shuffled", "random", "full"])
def test_other_rules_read_no_rollouts(by: str) -> None:
    with pytest.raises(UsageError, match=f"--by {by} reads none"):
        SelectOptions(prompts=("p.jsonl",), rollouts=("r.jsonl",), by=by)


def test_scores_and_rollouts_are_not_mixed() -> None:
    with pytest.raises(UsageError, match="give one"):
        SelectOptions(prompts=("p.jsonl",), scores=("s.jsonl",), rollouts=("r.jsonl",), by="hardest")


@pytest.mark.parametrize("given", [{"among": "all", "by": "random"}, {"per_source": True}])
def test_options_of_other_rules_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SelectOptions(prompts=("p.jsonl",), **given)


def test_every_source_gives_as_many_as_far_as_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"a": 100, "b": 37, "c": 3}
    pool = [
        {"id": f"{name}{n}", "prompt": "q", "answer": "1", "source": name} for name in sizes for n in range(sizes[name])
    ]
    Path("p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pool))

    def chosen(seed: int) -> list[str]:
        options = SelectOptions(
            prompts=("p.jsonl",), by="random", per_source=True, ratio="0.1", seed=seed, output="o.jsonl", force=True
        )
        select(options)
        return [json.loads(line)["id"] for line in Path("o.jsonl").read_text().splitlines()]

    for seed in range(3):
        # 14 of 140: all three of the smallest, and 11 of the other two; the larger gives one more
        assert Counter(name[0] for name in chosen(seed)) == {"a": 6, "b": 5, "c": 3}
        assert len({name[0] for name in chosen(seed)[:3]}) == 3
    assert chosen(1) != chosen(2)
    assert chosen(1) == chosen(1)
