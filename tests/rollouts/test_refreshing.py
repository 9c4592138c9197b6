"""Sampling some prompts of a rollouts file anew."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.cli.rollout import main
from cropi_tools.data.manifest import read_manifest
from cropi_tools.data.policies import policy_input
from cropi_tools.data.records import prompt_of
from cropi_tools.gradients.batching import survey
from cropi_tools.gradients.prompt_objective import GradientSettings
from cropi_tools.objective import Estimator
from cropi_tools.rollouts.refreshing import index_files, marked, parse_wish, wanted_ids
from cropi_tools.runtime.errors import InputError, UsageError


def rollout(name: str, rewards: list[float], **more: Any) -> dict[str, Any]:
    samples = [
        {
            "token_ids": [5, 1],
            "logprobs": [-1.0, -2.0],
            "text": "3",
            "finish_reason": "stop",
            "reward": reward,
            "outcome": "correct" if reward == 1 else "wrong",
        }
        for reward in rewards
    ]
    prompt = {"id": name, "prompt": "1+2=", "answer": "3", "source": "sums"}
    return {**prompt, **more, "prompt_token_ids": [3, 12, 4, 14], "samples": samples}


ROLLOUTS = [
    rollout("none", [0.0, 0.0]),
    rollout("mixed", [1.0, 0.0], kept=1),
    rollout("all", [1.0, 1.0]),
    rollout("tenths", [0.1, 0.1]),
    rollout("alone", [1.0]),
]
INDEX = [
    {"id": "none", "status": "zero-advantage"},
    {"id": "mixed", "status": "ok", "effective_sample_size": 0.15},
    {"id": "all", "status": "empty"},
    {"id": "tenths", "status": "ok", "effective_sample_size": 0.9},
    {"id": "alone", "status": "zero-gradient"},
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    store = tmp_path / "grads.zarr"
    store.mkdir()
    tiny_policy.write_jsonl(store / "index.jsonl", INDEX)
    return tiny_policy.write_jsonl(tmp_path / "r.jsonl", ROLLOUTS), store


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        (["zero-advantage"], ["none", "all", "tenths", "alone"]),
        (["low-ess"], []),
        (["low-ess=0.2"], ["mixed"]),
        (["low-ess=1"], ["mixed", "tenths"]),
        (["low-ess", "low-ess=0.2"], ["mixed"]),
        (["empty"], ["all"]),
        (["zero-gradient", "low-ess=0.2"], ["mixed", "alone"]),
        (["all"], ["none", "mixed", "all", "tenths", "alone"]),
    ],
)
def test_which_prompts(files: tuple[Path, Path], where: list[str], chosen: list[str]) -> None:
    wish = parse_wish(where)
    indexes = index_files(where, [str(files[1])]) if wish.needs_index else []
    listed, known = wanted_ids(indexes, wish)
    assert len(known) == (len(INDEX) if indexes else 0)
    found = list(marked([str(files[0])], wish, listed))
    assert [record for record, _ in found] == ROLLOUTS
    assert [record["id"] for record, wanted in found if wanted] == chosen


def of_weights(folder: Path, count: int, sizes: dict[str, float]) -> list[str]:
    """The index of a store whose prompts have effective sample sizes of `count` weights, by id."""
    folder.mkdir()
    lines = [
        {"id": name, "status": "ok", "effective_sample_size": size, "weight_count": count}
        for name, size in sizes.items()
    ]
    return [str(tiny_policy.write_jsonl(folder / "index.jsonl", lines))]


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16, 32])
def test_low_ess_can_be_met_whatever_the_number_of_weights(tmp_path: Path, count: int) -> None:
    """Where trajectory and sequence leave a weight a response, the share is never below 1 / count."""
    worst = {"one": 1 / count, "most": 1.9 / count, "all": 1.0}
    indexes = of_weights(tmp_path / "s", count, worst)
    assert wanted_ids(indexes, parse_wish(["low-ess"]))[0] == {"one", "most"}
    share = 1 / count + 1e-3
    assert wanted_ids(indexes, parse_wish([f"low-ess={share}"]))[0] == {"one"}
    with pytest.raises(InputError, match=rf"can never be met: .* of {count} weights is {1 / count:.4g} or more"):
        wanted_ids(indexes, parse_wish([f"low-ess={1 / count}"]))


def test_low_ess_over_many_weights_and_over_a_single_one(tmp_path: Path) -> None:
    many = of_weights(tmp_path / "many", 400, {"far": 0.09, "near": 0.11})
    assert wanted_ids(many, parse_wish(["low-ess"]))[0] == {"far"}
    assert wanted_ids(many, parse_wish(["low-ess=0.01"]))[0] == set()
    single = of_weights(tmp_path / "single", 1, {"only": 1.0})
    assert wanted_ids(single, parse_wish(["low-ess"]))[0] == set()
    # some prompts of a pool may have fewer responses with tokens than others: a share that any can meet is no error
    assert wanted_ids([*many, *single], parse_wish(["low-ess=0.1"]))[0] == {"far"}


@pytest.mark.parametrize("text", ["ok", "zero-advantage=1", "low-ess=", "low-ess=0", "low-ess=1.5", "low-ess=nan", ""])
def test_no_such_status(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_wish([text])


def test_a_status_that_only_gradients_tell_needs_their_store(files: tuple[Path, Path], tmp_path: Path) -> None:
    for where in (["low-ess"], ["empty"], ["zero-advantage", "zero-gradient"]):
        with pytest.raises(UsageError, match="--index"):
            index_files(where, [])
    with pytest.raises(UsageError, match="leave --index out"):
        index_files(["zero-advantage"], [str(files[1])])
    with pytest.raises(InputError, match="no such file"):
        index_files(["low-ess"], [str(tmp_path / "other.zarr")])
    with pytest.raises(InputError, match=r"r\.jsonl:1.*index of a gradient store"):
        wanted_ids([str(files[0])], parse_wish(["low-ess"]))


def test_the_prompt_in_a_rollout() -> None:
    assert prompt_of({**ROLLOUTS[1], "reasoning_open": True}) == {
        "id": "mixed",
        "prompt": "1+2=",
        "answer": "3",
        "source": "sums",
        "kept": 1,
    }


def run(*words: str) -> int:
    """cropi-rollout in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cropi-rollout", *words])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def test_the_command_samples_those_and_passes_on_the_rest(tmp_path: Path, files: tuple[Path, Path]) -> None:
    policy = tiny_policy.save(tmp_path / "P1", seed=3)
    options = ["--model", str(policy), "--max-tokens", "5", "--verifier", "exact", "--quiet"]
    refresh = ["--refresh", str(files[0]), "--where", "zero-advantage", "-o", str(tmp_path / "new.jsonl")]
    assert run(*options, *refresh) == 0
    rows = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [row["id"] for row in ROLLOUTS]
    assert rows[1] == ROLLOUTS[1]
    digest = policy_input(policy).sha256
    for row in (rows[0], *rows[2:]):
        assert row["sampled_by"] == digest
        (old,) = [old for old in ROLLOUTS if old["id"] == row["id"]]
        assert len(row["samples"]) == len(old["samples"])
        assert row["prompt_token_ids"] == [3, 12, 4, 14]
        assert all(sample["logprobs"] for sample in row["samples"])
    manifest = read_manifest(tmp_path / "new.jsonl")
    assert manifest is not None
    new = [row for row in rows if "sampled_by" in row]
    assert manifest["ledger"]["tokens_generated"] == sum(len(s["token_ids"]) for row in new for s in row["samples"])
    # the same policy sampled the first time: the seeds must be others, or a policy that moved little would answer the same
    plain = tiny_policy.write_jsonl(tmp_path / "p.jsonl", [prompt_of(row) for row in ROLLOUTS])
    assert run(*options, str(plain), "-n", "2", "-o", str(tmp_path / "first.jsonl")) == 0
    first = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]
    same = [
        a["token_ids"] == b["token_ids"]
        for i in (0, 2, 3, 4)
        for a, b in zip(first[i]["samples"], rows[i]["samples"], strict=False)
    ]
    assert sum(same) <= 2
    # refreshed again by the same policy with nothing to do: passed on, at no cost
    bare = [
        {**row, "samples": [{k: v for k, v in s.items() if k != "outcome"} for s in row["samples"]]} for row in rows
    ]
    again = tiny_policy.write_jsonl(tmp_path / "bare.jsonl", [row for row in bare if row["id"] == "mixed"])
    twice = ["--refresh", str(again), "--where", "zero-advantage", "-o", str(tmp_path / "twice.jsonl")]
    assert run(*options, *twice) == 0
    assert (tmp_path / "twice.jsonl").read_text() == again.read_text()
    manifest = read_manifest(tmp_path / "twice.jsonl")
    assert manifest is not None
    assert manifest["ledger"]["tokens_generated"] == 0
    assert manifest["facts"]["summary"]["accuracy"] == 0.5


def test_a_mixed_file_has_no_one_behavior_policy(tmp_path: Path) -> None:
    """Neither of the policies may stand for all samples; a file that one of them sampled whole is its own."""
    settings = GradientSettings(Estimator("token", None, None, False), 1.0, "sequence", "group")
    mixed = tiny_policy.write_jsonl(tmp_path / "m.jsonl", [ROLLOUTS[1], {**ROLLOUTS[2], "sampled_by": "P1"}])
    whole = tiny_policy.write_jsonl(tmp_path / "w.jsonl", [{**row, "sampled_by": "P1"} for row in ROLLOUTS])
    plain = tiny_policy.write_jsonl(tmp_path / "p.jsonl", ROLLOUTS)
    assert survey([str(mixed)], 71, settings).prompts == 2
    assert survey([str(whole)], 71, settings, behavior="P1").prompts == 5
    assert survey([str(plain)], 71, settings, behavior="P0").prompts == 5
    for path, behavior in ((mixed, "P0"), (mixed, "P1"), (whole, "P0")):
        with pytest.raises(InputError, match="leave --behavior out"):
            survey([str(path)], 71, settings, behavior=behavior)


def test_another_number_of_samples(tmp_path: Path, files: tuple[Path, Path]) -> None:
    policy = tiny_policy.save(tmp_path / "P1", seed=3)
    line = ["--model", str(policy), "--refresh", str(files[0]), "--where", "all", "-n", "3", "--verifier", "exact"]
    assert run(*line, "--max-tokens", "2", "--quiet", "-o", str(tmp_path / "new.jsonl")) == 0
    rows = [json.loads(text) for text in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [len(row["samples"]) for row in rows] == [3] * 5


def test_an_index_of_other_prompts_is_refused(tmp_path: Path, files: tuple[Path, Path]) -> None:
    policy = tiny_policy.save(tmp_path / "P1", seed=3)
    tiny_policy.write_jsonl(files[1] / "index.jsonl", INDEX[:-1])
    line = ["--model", str(policy), "--refresh", str(files[0]), "--where", "low-ess=0.2", "--index", str(files[1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said := io.StringIO())
        assert run(*line, "--verifier", "exact") == 1
    assert "prompt 'alone' is not in the index" in said.getvalue()
