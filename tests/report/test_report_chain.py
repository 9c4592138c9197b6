"""Policies that were trained one from another by hand, as a run of one arm."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import synthetic_run as synthetic

from cropi_tools.report.comparison import unit_curve
from cropi_tools.report.page import _manifests as shown
from cropi_tools.report.page import page
from cropi_tools.report.run import compare_runs, run_input
from cropi_tools.report.tables import print_tables
from cropi_tools.runtime.errors import InputError


def described(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256(path.read_bytes()).hexdigest() if path.is_file() else "0" * 64}


def note(path: Path, command: str, ledger: dict[str, float], inputs: dict[str, Path], **more: Any) -> None:
    """The manifest of a file or folder that a command made of others."""
    place = path / "manifest.json" if path.is_dir() else path.with_name(path.name + ".manifest.json")
    outputs = {} if path.is_dir() else {path.name: {"sha256": described(path)["sha256"]}}
    known = {name: described(read) for name, read in inputs.items()}
    synthetic.write_manifest(place, command, ledger, inputs=known, outputs=outputs, **more)


def write_chain(folder: Path, monkeypatch: pytest.MonkeyPatch, stages: int = 2) -> list[Path]:
    """P1, P2, ... from P0: scored anew for every stage, from rollouts that serve all; with relative paths, made in `folder`."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("P0").mkdir()
    rollouts = Path("r.jsonl")
    rollouts.write_text("rollouts\n")
    note(rollouts, "cropi-rollout", {"seconds": 30.0, "tokens_generated": 9000}, {"policy": Path("P0")})
    for number in range(1, stages + 1):
        policy, before = Path(f"P{number}"), Path(f"P{number - 1}")
        synthetic.write_stage(Path("made"), "cropi", "1", number)
        selected, scores, store = Path(f"sel{number}.jsonl"), Path(f"s{number}.jsonl"), Path(f"g{number}.zarr")
        shutil.move(Path("made/policy"), policy)
        shutil.move(Path("made/selected.jsonl"), selected)
        scores.write_text(f"scores {number}\n")
        store.mkdir()
        note(store, "cropi-grad", {"seconds": 10.0, "tokens_scored": 500}, {"rollouts": rollouts, "policy": before})
        note(scores, "cropi-score", {"seconds": 2.0}, {"gradients 1": store})
        note(selected, "cropi-select", {"seconds": 1.0}, {"scores": scores}, options={"by": "influence"})
        (policy / "training.json").write_text("{}")
        ledger = {"seconds": 75.0, "tokens_generated": 20000, "tokens_trained": 10000}
        note(policy, "cropi-train", ledger, {"policy": before, "prompts": selected}, options={"seed": 7})
    return [Path(f"P{number}") for number in range(1, stages + 1)]


@pytest.mark.parametrize("turned", [False, True])
def test_a_chain_has_a_curve_and_a_table(turned: bool, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order it is given."""
    chain = write_chain(run_folder, monkeypatch, 3)
    comparison = compare_runs(chain[::-1] if turned else chain)
    (arm,) = comparison.arms
    assert (arm.label, arm.step, [seed.name for seed in arm.counted]) == ("P3", 60, ["7"])
    assert [stage.offset for stage in arm.arm.seeds[0].stages] == [0, 20, 40]
    assert [step for step, _ in arm.curve] == [0, 10, 20, 30, 40, 50, 60]
    assert arm.curve[-1][1] == pytest.approx(synthetic.accuracy("cropi", "1", 60))
    stream = io.StringIO()
    print_tables(comparison, stream)
    assert "After 60 steps P3 reaches 88.0 %" in stream.getvalue()
    assert "What each stage selected" in page(comparison)


def test_selecting_is_charged_once_wherever_its_files_are(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = compare_runs(write_chain(run_folder, monkeypatch)).arms[0].ledger
    assert ledger.sampling.seconds == 30  # the rollouts serve both stages
    assert ledger.sampling.generated == 9000
    assert ledger.scoring.seconds == 2 * (10 + 2 + 1)
    assert ledger.scoring.scored == 1000
    assert ledger.training.generated == 40000


@pytest.mark.parametrize(
    ("first", "second", "sampling", "scoring"),
    [
        ("learnability", "pass-rate", 30.0, 1.0 + 1.0),
        # scores that the first stage looked at for their pass rates alone are paid for by the second
        ("learnability", "influence", 30.0 + 5.0, 1.0 + 1.0 + 10.0 + 3.0 + 2.0),
        ("influence", "learnability", 30.0 + 5.0, 1.0 + 1.0 + 10.0 + 3.0 + 2.0),
        ("random", "learnability", 30.0, 1.0 + 1.0),
        ("random", "full", None, 1.0 + 1.0),
    ],
)
def test_a_stage_is_charged_what_its_rule_reads(
    first: str,
    second: str,
    sampling: float | None,
    scoring: float,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both stages from the same scores: of pass rates the rollouts of the pool, without gradients and validation rollouts."""
    chain = write_chain(run_folder, monkeypatch)
    valid, mean, scores = Path("v.jsonl"), Path("v.safetensors"), Path("s1.jsonl")
    for path in (valid, mean):
        path.write_text(f"{path}\n")
    note(valid, "cropi-rollout", {"seconds": 5.0}, {"policy": Path("P0")})
    note(mean, "cropi-grad", {"seconds": 3.0}, {"rollouts": valid})
    note(Path("g1.zarr"), "cropi-grad", {"seconds": 10.0}, {"rollouts": Path("r.jsonl"), "mean target": mean})
    for number, rule in enumerate((first, second), 1):
        note(Path(f"sel{number}.jsonl"), "cropi-select", {"seconds": 1.0}, {"scores": scores}, options={"by": rule})
    comparison = compare_runs(chain)
    ledger = comparison.arms[0].ledger
    assert (ledger.sampling.seconds, ledger.scoring.seconds) == (sampling, scoring)
    curve = unit_curve(comparison.arms[0], comparison.arms[0].counted, comparison.targets, "seconds")
    assert curve is not None
    assert curve[-1].cost == (sampling or 0.0) + scoring + 2 * 60
    assert [item.command for item in shown(comparison.arms[0])].count("cropi-score") == 1


def test_files_that_are_gone_or_replaced_are_left_out(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = write_chain(run_folder, monkeypatch)
    Path("sel1.jsonl").unlink()
    Path("s2.jsonl").write_text("other scores\n")
    note(Path("s2.jsonl"), "cropi-score", {"seconds": 99.0}, {})
    (arm,) = compare_runs(chain).arms
    first, second = arm.arm.seeds[0].stages
    assert first.selection is None
    assert second.selection is not None
    assert [manifest.command for manifest in second.manifests] == ["cropi-select"]
    # elsewhere the paths lead nowhere: the names of the policies tell the order
    monkeypatch.chdir(run_folder.parent)
    elsewhere = compare_runs([run_folder.absolute() / path for path in chain[::-1]])
    assert elsewhere.arms[0].step == 40
    assert elsewhere.arms[0].ledger.scoring.seconds is None


def test_an_unfinished_policy_comes_last(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = write_chain(run_folder, monkeypatch)
    synthetic.write_stage(Path("made"), "cropi", "1", 3, steps=10)
    shutil.move(Path("made/policy.part"), "P3.part")
    Path("P3.part/training.json").write_text("{}")
    (arm,) = compare_runs([Path("P3"), *chain]).arms
    assert arm.arm.seeds[0].stages[-1].offset == 40
    assert not arm.arm.seeds[0].finished
    before = run_input(Path("P3"))
    with open("P3.part/evaluations.jsonl", "a") as stream:
        stream.write("\n")
    assert run_input(Path("P3")) != before


def test_a_run_and_a_chain_side_by_side(whole_run: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = write_chain(run_folder, monkeypatch)
    assert {arm.label for arm in compare_runs([whole_run, *chain]).arms} >= {"demo/random", "P2/P2"}


def _parent(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["policy"]["path"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("parents", "given", "said"),
    [
        ({}, ("P1", "P3"), "P1 and P3: neither was trained from another one"),
        ({"P3": "P1"}, ("P1", "P2", "P3"), "P2 and P3: were both trained from P1"),
        ({"P1": "P3"}, ("P1", "P2", "P3"), "was trained from itself or"),
        ({"P1": "P1"}, ("P1",), "P1: was trained from itself or"),
    ],
)
def test_what_is_no_chain_is_told(
    parents: dict[str, str], given: Sequence[str], said: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chain(run_folder, monkeypatch, 3)
    for name, parent in parents.items():
        _parent(Path(name), parent)
    with pytest.raises(InputError, match=said) as caught:
        compare_runs([Path(name) for name in given])
    assert "give the policies of one chain" in str(caught.value)
