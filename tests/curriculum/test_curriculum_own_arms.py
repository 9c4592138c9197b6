"""Arms of a config's own, RULE.NAME and what they have of their own, and independent draws of the starting policy's rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from curriculum_runs import BookkeptCurriculum


def own(folder: Path, **values: object) -> BookkeptCurriculum:
    """Two stages of random, of a full pool trained otherwise, and of a random choice out of a pool of its own."""
    (folder / "other.jsonl").write_text("other.jsonl\n")
    defaults: dict[str, object] = {
        "ARMS": "random sampled few",
        "STAGES": 2,
        "RULE.sampled": "full",
        "TRAIN_OPTIONS.sampled": "--dynamic-sampling 3",
        "RULE.few": "random",
        "POOL.few": folder / "other.jsonl",
        "SELECT_OPTIONS.few": "-n 5",
    }
    return BookkeptCurriculum(folder, **{**defaults, **values})


def words_of(entries: list[dict[str, Any]], command: str, cell: str) -> list[str]:
    (found,) = (
        entry["words"]
        for entry in entries
        if entry["words"][0] == command and f"/{cell}/" in entry["output"] and entry["outcome"] == "made"
    )
    return list(found)


def test_an_arm_differs_in_what_it_has_of_its_own_and_in_nothing_else(tmp_path: Path) -> None:
    curriculum = own(tmp_path)
    curriculum.make("-j2")
    asked = curriculum.asked()
    assert curriculum.nothing_left()
    for stage in ("1", "2"):
        selecting = {arm: words_of(asked, "cropi-select", f"{arm}/1/{stage}") for arm in ("random", "sampled", "few")}
        assert selecting["sampled"][selecting["sampled"].index("--by") + 1] == "full"
        assert str(tmp_path / "pool.jsonl") in selecting["random"]
        assert "--ratio" in selecting["random"]
        assert str(tmp_path / "other.jsonl") in selecting["few"]
        assert str(tmp_path / "pool.jsonl") not in selecting["few"]
        assert selecting["few"][selecting["few"].index("-n") + 1] == "5"
        assert "--ratio" not in selecting["few"]
        trained = {arm: words_of(asked, "cropi-train", f"{arm}/1/{stage}") for arm in ("random", "sampled", "few")}
        more = ["--dynamic-sampling", "3"]
        assert [word for word in trained["sampled"] if word not in more] == [
            word.replace("/random/", "/sampled/") for word in trained["random"]
        ]
        assert [word.replace("/few/", "/random/") for word in trained["few"]] == trained["random"]


def test_a_change_of_what_is_its_own_touches_that_arm_alone(tmp_path: Path) -> None:
    curriculum = own(tmp_path)
    curriculum.make()
    curriculum.asked()
    for change, arm, first in (
        ("TRAIN_OPTIONS.sampled=--dynamic-sampling 4", "sampled", "policy"),
        ("SELECT_OPTIONS.few=-n 6", "few", "selected.jsonl"),
    ):
        curriculum.make(change, code=2)
        assert curriculum.with_outcome("refused") == [f"{arm}/1/1/{first}"]
        curriculum.make(change, "FORCE=--force")
        made = curriculum.worked()
        assert made[0] == f"{arm}/1/1/{first}"
        assert {name.split("/")[0] for name in made} == {arm}
        curriculum.make("FORCE=--force")
        curriculum.asked()


@pytest.mark.parametrize(
    ("change", "arm"),
    [
        ("RULE.few=full", "few"),
        ("RULE.sampled=random", "sampled"),
        ("TRAIN_OPTIONS.sampled=", "sampled"),
        ("SELECT_OPTIONS.few=", "few"),
        ("POOL.few=", "few"),
        ("TRAIN_OPTIONS.random=--dynamic-sampling 2", "random"),
    ],
)
def test_what_is_its_own_is_remembered(change: str, arm: str, tmp_path: Path) -> None:
    """Changed, taken away, or given to an arm that had nothing of its own."""
    curriculum = own(tmp_path)
    curriculum.make("-j2")
    curriculum.asked()
    curriculum.make("-k", change, code=2)
    refused = curriculum.with_outcome("refused")
    assert refused
    assert {name.split("/")[0] for name in refused} == {arm}


def test_dollars_and_quotes_in_what_is_its_own_reach_the_command_as_they_are(tmp_path: Path) -> None:
    curriculum = own(tmp_path, **{"ARMS": "sampled", "TRAIN_OPTIONS.sampled": "--tracker 'a b' --name '$$HOME'"})
    curriculum.make()
    assert "undefined variable" not in curriculum.make("-n").stderr
    words = words_of(curriculum.asked(), "cropi-train", "sampled/1/1")
    assert "a b" in words
    assert "$HOME" in words


def test_an_own_arm_of_influence_scores_by_its_own_policy_and_probes(tmp_path: Path) -> None:
    curriculum = own(tmp_path, **{"ARMS": "mine", "RULE.mine": "cropi"})
    curriculum.make()
    assert "mine/1/2/grads.zarr" in curriculum.worked()
    (tmp_path / "probing").mkdir()
    curriculum = own(tmp_path / "probing", **{"ARMS": "mine", "RULE.mine": "cropi", "PROBE": "0.1"})
    curriculum.make()
    assert {"mine/1/1/probe.jsonl", "mine/1/2/probe.jsonl"} <= set(curriculum.worked())


def test_mistakes_of_an_own_arm_are_told_in_one_line(tmp_path: Path) -> None:
    curriculum = own(tmp_path)
    for mistake, said in (
        ("RULE.few=randm", "RULE.few=randm: there is no arm randm, only"),
        ("RULE.few=static", "few selects by scores, which are of POOL"),
        ("POOL.few=absent.jsonl", "POOL.few=absent.jsonl: there is no file absent.jsonl"),
        ("RULE.few=complete", "PROBE is not set"),
        ("RULE.few=random full", "RULE.few=random full: expected one arm"),
        ("RULE.random=full", "random is a way of selecting already"),
        ("ARMS=fewer", "ARMS=fewer: there is no arm fewer"),
    ):
        words = [mistake] if "complete" not in mistake else [mistake, "POOL.few="]
        done = curriculum.make(*words, code=2)
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
    assert curriculum.asked() == []


def test_draws_of_the_rollouts_are_independent(tmp_path: Path) -> None:
    curriculum = own(tmp_path, ARMS="cropi")
    seeds = []
    for draw in ("0", "1", "12"):
        shown = curriculum.make("-n", f"DRAW={draw}").stdout
        seeds += [
            line.split("--seed ")[1].split()[0] for line in shown.splitlines() if line.startswith("cropi-rollout")
        ]
    assert seeds[:2] == ["0", "1"], "the first draw is what it always was"
    assert len(set(seeds)) == 6
