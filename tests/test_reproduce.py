"""The comparison of benchmarks/reproduce: its plan, its figures on records worked out by hand, and commands run from one warm process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "reproduce"
STEPS = list(range(0, 101, 5))


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    import importlib

    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    try:
        yield {name: importlib.import_module(name) for name in ("plan", "analyze", "tables", "pictures", "warm")}
    finally:
        del sys.path[:2]


def record(seed: int, rises: dict[str, float], start: float = 0.3) -> dict[str, Any]:
    """A record whose arms rise linearly to the same ceiling; a step takes 2 seconds and 10 tokens, selecting 30 seconds and 100 tokens first."""
    arms = {}
    for name, rise in rises.items():
        accuracy = [min(0.9, start + 0.001 * seed + rise * step) for step in STEPS]
        first = {"seconds": 0.0, "tokens": 0.0} if name == "full" else {"seconds": 30.0, "tokens": 100.0}
        spent = {
            unit: {
                "arrived": [0.0, *(first[unit] + each * step for step in STEPS[1:])],
                "ready": [first[unit] + each * step for step in STEPS],
            }
            for unit, each in (("seconds", 2.0), ("tokens", 10.0))
        }
        sets = {name: accuracy for name in ("reverse", "gcd", "others")}
        arms[name] = {
            "points": {
                "finished": True,
                "steps": STEPS,
                "prompts": dict.fromkeys(sets, 100),
                "accuracy": sets,
                **spent,
            },
            "cost": {},
            "selected": [{"prompts": 10, "targets": 4, "wrong": 1}, {"prompts": 10, "targets": 6, "wrong": 1}],
        }
    return {"bed": "families", "seed": seed, "date": "2026-01-01", "device": "x", "arms": arms}


@pytest.fixture
def bench(modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four seeds, two starting policies: full rises by .003 a step, cropi by .009, the controls by less."""
    bed = replace(
        modules["plan"].read_plan()["families"],
        seeds=4,
        policies=2,
        threshold=0.48,
        arms=("full", "random", "learnability", "cropi"),
        controls=("random", "learnability"),
    )
    for name in ("plan", "analyze"):
        monkeypatch.setattr(modules[name], "record_path", lambda bed, seed: tmp_path / f"{bed}-{seed}.json")
    for seed in range(1, 5):
        rises = {"full": 0.003, "random": 0.001, "learnability": 0.002 + 0.0001 * seed, "cropi": 0.009}
        (tmp_path / f"families-{seed}.json").write_text(json.dumps(record(seed, rises)))
    return modules["analyze"].Bench(bed)


def test_the_figures_of_known_curves(bench: Any, modules: dict[str, ModuleType]) -> None:
    found = modules["analyze"].bed_json(bench)
    assert (found["seeds"], found["threshold"]) == (4, 0.48)
    # full is there after (.48 - .3025) / .003 steps, cropi after a third of that; seconds count 30 for selecting first
    speed = found["speedup"]["cropi"]
    assert speed["steps"]["mean"] == pytest.approx(3.0, rel=1e-6)
    needed = 0.1775 / 0.009
    assert speed["work_seconds"]["mean"] == pytest.approx(2 * 0.1775 / 0.003 / (30 + 2 * needed), rel=1e-6)
    assert speed["tokens"]["mean"] == pytest.approx(10 * 0.1775 / 0.003 / (100 + 10 * needed), rel=1e-6)
    assert speed["steps"]["reached"] == 4
    assert speed["steps"]["low"] == pytest.approx(3.0, rel=0.05)
    assert found["speedup"]["random"]["steps"] == {
        "mean": None,
        "at_least": None,
        "low": None,
        "high": pytest.approx(1.0, rel=0.5),
        "reached": 0,
        "own_ratios": None,
    }
    # finals: the mean of steps 90, 95 and 100
    assert found["arms"]["random"]["final"]["mean"] == pytest.approx(0.3025 + 0.001 * 95)
    assert found["arms"]["cropi"]["final"]["mean"] == pytest.approx(0.9)
    gap = found["differences"]["learnability"]
    assert gap["mean"] == pytest.approx(0.9 - (0.3025 + 0.00225 * 95))
    assert gap["corrected"][0] < gap["low"] < gap["mean"] < gap["high"] < gap["corrected"][1]
    assert bench.arms["cropi"].selected[0][0]["targets"] == 4


def test_a_bed_without_a_threshold_has_four_fifths_of_what_full_gains(
    bench: Any, modules: dict[str, ModuleType]
) -> None:
    found = modules["analyze"].Bench(replace(bench.bed, threshold=0.0))
    # full rises from .3025 to .5875, the mean of steps 90, 95 and 100
    assert found.threshold == pytest.approx(0.3025 + 0.8 * 0.003 * 95)
    assert found.speed("cropi", "steps").ratio == pytest.approx(3.0)


def test_a_reference_that_never_gets_there_gives_a_bound(bench: Any, modules: dict[str, ModuleType]) -> None:
    """full ends at .6: an arm that is at .7 needed at least so many times fewer steps than all that full took."""
    found = modules["analyze"].Bench(replace(bench.bed, threshold=0.7))
    needed = (0.7 - 0.3025) / 0.009
    assert found.at_least("cropi", "steps") == pytest.approx(100 / needed, rel=1e-6)
    assert found.at_least("cropi", "work_seconds") == pytest.approx(200 / (30 + 2 * needed), rel=1e-6)
    assert found.at_least("random", "steps") is None
    assert modules["analyze"].speed_json(found, "cropi", "steps")["mean"] is None
    assert modules["tables"].speedup(found, "cropi", "steps").startswith("at least 2.26 [2.2")
    assert any(line.startswith("fewer steps: 2.26, goal 2.66, MISSED") for line in modules["tables"].goals_of(found))


def test_the_null_compares_seeds_of_one_starting_policy_alone(bench: Any) -> None:
    found = bench.null("steps")
    assert len(found) == 4  # 1 and 3, 2 and 4, either way
    assert sorted(factor.exact for factor in found) == pytest.approx(
        sorted([0.177 / 0.179, 0.176 / 0.178, 0.178 / 0.176, 0.179 / 0.177]), rel=1e-6
    )


def test_tables_and_pictures_show_what_the_figures_say(
    bench: Any, modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    table = modules["tables"].tables(bench)
    row = next(line for line in table.splitlines() if line.startswith("| CROPI, probing |"))
    assert "3.00 [" in row
    assert "4 of 4" in row
    assert ".50 |" in row
    assert "| not reached | 0 of 4 |" in next(line for line in table.splitlines() if line.startswith("| random tenth"))
    modules["pictures"].draw_curves(bench, tmp_path / "curves.png")
    modules["pictures"].draw_main([bench], tmp_path / "main.png")
    first = (tmp_path / "main.png").read_bytes()
    modules["pictures"].draw_main([bench], tmp_path / "main.png")
    assert first == (tmp_path / "main.png").read_bytes()
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_record_of_a_run_is_what_the_analysis_reads(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    sys.path.insert(0, str(ROOT / "tests" / "report"))
    synthetic, run = importlib.import_module("synthetic_run"), importlib.import_module("run")
    bed = replace(
        modules["plan"].read_plan()["families"], name="bed", seeds=2, policies=1, untargeted=("gcd",), threshold=0.5
    )
    bed = replace(bed, arms=("full", "random", "cropi"), controls=("random",))
    for name in ("plan", "analyze"):
        monkeypatch.setattr(modules[name], "record_path", lambda bed, seed: tmp_path / f"{bed}-{seed}.json")
    monkeypatch.setattr(run, "record_path", lambda bed, seed: tmp_path / f"{bed}-{seed}.json")
    monkeypatch.setattr(run, "WORK", tmp_path)
    for seed in (1, 2):
        synthetic.write_run(tmp_path / "bed" / str(seed), seeds=(str(seed),))
        run.write_record(run.Unit(bed, seed))
    bench = modules["analyze"].Bench(bed)
    assert bench.seeds == (1, 2)
    # .40 and .41 at the start, .004 and .008 a step; cropi of seed 2 lies .01 above that
    assert bench.speed("full", "steps").needed == pytest.approx(0.095 / 0.004)
    assert bench.arms["cropi"].selected[0] == [{"prompts": 10, "targets": 10, "wrong": 0}] * 2
    assert bench.arms["cropi"].questions(bed.targets) == 400
    (contrast,) = bench.contrasts
    assert contrast.by_seed == pytest.approx([0.006 * 30, 0.006 * 30 + 0.01])


def test_what_has_its_record_is_not_run_again(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    run = importlib.import_module("run")
    (tmp_path / "there.json").touch()
    monkeypatch.setattr(run, "record_path", lambda bed, seed: tmp_path / "there.json")
    monkeypatch.setattr(run, "Warm", None)  # nothing may start
    monkeypatch.setattr(sys, "argv", ["run.py", "--beds", "families", "--seeds", "3"])
    run.main()
    assert "3 of 3 units have their record" in capsys.readouterr().out


def commands(bed: Any, target: str, run: Path) -> str:
    """What make would run for a bed, its data not there yet."""
    words = [
        "make",
        "-n",
        "-B",
        "--no-print-directory",
        f"CONFIG={bed.config}",
        "SEED=2",
        f"VENV={sys.prefix}",
        f"RUN={run}",
    ]
    shown = subprocess.run([*words, target], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_the_plan_names_arms_that_its_configs_have(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    for bed in modules["plan"].read_plan().values():
        if bed.aside:  # its config has gone on since
            continue
        trained = {
            word.split("/")[-4] for word in commands(bed, "curriculum", tmp_path).split() if word.endswith("/policy")
        }
        assert set(bed.arms) <= trained
        assert {bed.subject, *bed.controls, "full"} <= set(bed.arms)


def test_what_seeds_share_is_made_before_two_run_side_by_side(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    def made(shown: str) -> set[str]:
        return {path for path in re.findall(r" -o (\S+)", shown) if not path.startswith(str(tmp_path))}

    for bed in modules["plan"].read_plan().values():
        if bed.aside:  # its config is that of another bed
            continue
        shared = {path for path in made(commands(bed, "curriculum", tmp_path)) if "2" not in path.split("/")}
        assert shared
        assert shared <= made(commands(bed, "starting-policy", tmp_path)), bed.name


def test_records_that_are_kept_are_of_the_plan(modules: dict[str, ModuleType]) -> None:
    """What is in the repository can be analyzed, and the result is what the analysis says."""
    analyze, plan = modules["analyze"], modules["plan"]
    benches = [bench for bench in map(analyze.Bench, plan.read_plan().values()) if bench.records]
    kept = json.loads(analyze.RESULT.read_text()) if analyze.RESULT.exists() else {"beds": {}}
    assert kept == plan.rounded(analyze.as_json(benches), 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_what_was_started(number: signal.Signals, tmp_path: Path) -> None:
    """While a unit is made in the main thread, as starting policies are; its make must not go on by itself."""
    (tmp_path / "Makefile").write_text("curriculum:\n\techo $$$$ > pid; exec sleep 60\n")
    program = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]
import plan, run
run.ROOT = run.WORK = Path({str(tmp_path)!r})
class Dummy:
    alive = True
    def close(self): Path({str(tmp_path / "closed")!r}).touch()
run.WARM.append(Dummy())
signal.signal(signal.{number.name}, run.stop)
run.make(run.Unit(plan.read_plan()["families"], 1), "curriculum", [], dict(os.environ))
"""
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert (tmp_path / "closed").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_a_command_from_the_warm_process_is_the_command(
    modules: dict[str, ModuleType], tmp_path: Path, policy_folder: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"id": f"p{i}", "prompt": "S1+1=", "answer": "2", "source": "sum"}) + "\n" for i in range(40)
        )
    )
    words = ["--model", str(policy_folder), str(prompts), "-n", "4", "--max-tokens", "4", "--seed", "3"]
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    plain["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), plain["PATH"]])
    with modules["warm"].Warm(tmp_path / "warm") as warm:
        quick = {**plain, "PATH": warm.path}
        for name, environment in (("plain", plain), ("warm", quick)):
            subprocess.run(
                ["cropi-rollout", *words, "-o", str(tmp_path / f"{name}.jsonl")],
                env=environment,
                check=True,
                cwd=tmp_path,
            )
        assert (tmp_path / "plain.jsonl").read_bytes() == (tmp_path / "warm.jsonl").read_bytes()
        # whose clock can be that of the processor
        timed = {**quick, modules["warm"].CLOCK: "processor"}
        subprocess.run(["cropi-rollout", *words, "-o", "timed.jsonl"], env=timed, check=True, cwd=tmp_path)
        ledgers = [
            json.loads((tmp_path / f"{name}.jsonl.manifest.json").read_text())["ledger"] for name in ("warm", "timed")
        ]
        assert 0 < ledgers[1]["seconds_work"] <= 2 * ledgers[0]["seconds_work"]
        assert ledgers[1]["seconds_start"] >= 0
        shown = subprocess.run(["cropi-select", "--version"], env=quick, capture_output=True, text=True)
        assert shown.stdout.startswith("cropi-tools")
        refused = subprocess.run(["cropi-train", "--steps", "0"], env=quick, capture_output=True, text=True)
        assert refused.returncode == 2
        assert "cropi-train" in refused.stderr
        # a signal to what was started reaches the command: it keeps what it has and ends with 143
        long = subprocess.Popen(
            [
                "cropi-rollout",
                *words[:3],
                "-n",
                "5000",
                "--verifier",
                "exact",
                "--max-tokens",
                "8",
                "-o",
                str(tmp_path / "long.jsonl"),
            ],
            env=quick,
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        time.sleep(3)
        long.send_signal(signal.SIGTERM)
        assert long.wait(60) == 143
    assert not warm.folder.exists()
    assert not warm.alive
