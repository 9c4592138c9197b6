"""Reading run folders: global steps, unfinished work, and errors that name the file and the line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import synthetic_run as synthetic

from cropi_tools.report.reading import read_run
from cropi_tools.runtime.errors import InputError


def test_steps_are_global_and_the_earlier_evaluation_stands(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["cropi"], seeds=["1"])
    evaluations = run_folder / "cropi/1/2/policy/evaluations.jsonl"
    lines = [json.loads(line) for line in evaluations.read_text().splitlines()]
    for line in lines:
        if line["step"] == 0:
            line["accuracy"] = 0.0  # the same weights measured again: must not replace what stage 1 ended with
    synthetic.write_lines(evaluations, lines)
    [arm] = read_run(run_folder).arms
    [seed] = arm.seeds
    assert [(stage.number, stage.offset, stage.steps, stage.end) for stage in seed.stages] == [
        (1, 0, 20, 20),
        (2, 20, 20, 40),
    ]
    assert sorted({step for step, _ in seed.evaluations}) == [0, 10, 20, 30, 40]
    assert seed.evaluations[20, "gcd"].accuracy == pytest.approx(0.4 + 0.008 * 20 - 0.1)
    assert seed.evaluations[40, "reverse"].accuracy == pytest.approx(0.4 + 0.008 * 40 + 0.1)
    assert seed.finished


def test_first_evaluation_of_a_stage_fills_a_gap(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["full"], seeds=["1"])
    evaluations = run_folder / "full/1/1/policy/evaluations.jsonl"
    kept = [line for line in evaluations.read_text().splitlines(keepends=True) if json.loads(line)["step"] < 20]
    evaluations.write_text("".join(kept))
    [seed] = read_run(run_folder).arms[0].seeds
    assert seed.evaluations[20, "gcd"].accuracy == pytest.approx(0.4 + 0.004 * 20 - 0.1)


def test_selection_and_manifests(whole_run: Path) -> None:
    run = read_run(whole_run)
    assert [arm.name for arm in run.arms] == ["cropi", "full", "random"]
    assert sorted(manifest.command for manifest in run.start) == [
        "cropi-grad",
        "cropi-grad",
        "cropi-rollout",
        "cropi-score",
    ]
    stage = run.arms[0].seeds[0].stages[1]
    assert stage.selection is not None
    assert stage.selection.sources == {"gcd": 4, "reverse": 6}
    assert stage.selection.pass_rates == (0.0, 0.5, 1.0, None, 0.5) * 2
    assert sorted(manifest.path for manifest in stage.manifests) == [
        "cropi/1/2/grads.zarr/manifest.json",
        "cropi/1/2/selected.jsonl.manifest.json",
    ]
    assert stage.policy is not None
    assert stage.policy.command == "cropi-train"


def test_unfinished_stage_is_read_as_far_as_it_goes(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["random"], seeds=["1"])
    shutil.rmtree(run_folder / "random/1/2")
    synthetic.write_stage(run_folder / "random/1/2", "random", "1", 2, steps=10)
    [seed] = read_run(run_folder).arms[0].seeds
    assert not seed.finished
    assert [stage.finished for stage in seed.stages] == [True, False]
    assert seed.stages[1].steps == 10  # the torn eleventh line is passed over
    assert max(seed.evaluations)[0] == 30


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no such folder"):
        read_run(tmp_path / "absent")


def test_no_arm(tmp_path: Path) -> None:
    synthetic.write_start(tmp_path / "start")
    (tmp_path / "logs" / "notes").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no arm in it"):
        read_run(tmp_path)


def test_missing_stage(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["full"], seeds=["1"])
    shutil.rmtree(run_folder / "full/1/1")
    with pytest.raises(InputError, match=r"stage 1 is missing before stage 2"):
        read_run(run_folder)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("policy/metrics.jsonl", "{broken", r"metrics\.jsonl:2: broken JSON"),
        ("policy/timings.jsonl", "[1]", r"timings\.jsonl:2: expected a JSON object"),
        (
            "policy/evaluations.jsonl",
            '{"step": 1, "set": "gcd"}',
            r"evaluations\.jsonl:2: no field 'accuracy'",
        ),
        ("policy/evaluations.jsonl", '{"step": 1, "accuracy": 1}', r"evaluations\.jsonl:2: no field 'set'"),
        ("policy/evaluations.jsonl", '{"step": 1, "set": "a", "accuracy": NaN}', r"evaluations\.jsonl:2: "),
        ("selected.jsonl", '{"id": "a", "pass_rate": "high"}', r"selected\.jsonl:2: 'pass_rate' must be a number"),
    ],
)
def test_broken_line_is_named(run_folder: Path, name: str, line: str, message: str) -> None:
    synthetic.write_run(run_folder, arms=["full"], seeds=["1"])
    path = run_folder / "full/1/1" / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=message):
        read_run(run_folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_manifest_is_named(run_folder: Path, content: str) -> None:
    synthetic.write_run(run_folder, arms=["full"], seeds=["1"])
    (run_folder / "full/1/1/policy/manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"full/1/1/policy/manifest\.json: broken manifest"):
        read_run(run_folder)


def test_pass_rates_of_arms_that_selected_without_scores(run_folder: Path) -> None:
    synthetic.write_run(run_folder, seeds=["1"])
    path = run_folder / "random" / "1" / "1" / "selected.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["pass_rate"] = None
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = [
        {"id": record["id"], "source": "s", "scores": None, "pass_rate": 0.125, "status": "ok"}
        for record in records[1:]
    ]
    (run_folder / "start" / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    arm = next(arm for arm in read_run(run_folder).arms if arm.name == "random")
    selection = arm.seeds[0].stages[0].selection
    assert selection is not None
    assert sorted(selection.pass_rates, key=lambda rate: -1 if rate is None else rate) == [None] + [0.125] * len(scores)
