"""The figures of the synthetic run against figures worked out by hand from its rules (see `synthetic_run.py`)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import synthetic_run as synthetic

from cropi_tools.report.comparison import compare, unit_curve
from cropi_tools.report.costs import Cost
from cropi_tools.report.formatting import summary
from cropi_tools.report.plots import rate_bin, stage_shares
from cropi_tools.report.reading import read_run
from cropi_tools.report.structures import ArmFigures, Comparison
from cropi_tools.runtime.errors import UsageError


def figures(comparison: Comparison, label: str) -> ArmFigures:
    return next(arm for arm in comparison.arms if arm.label == label)


@pytest.fixture(scope="module")
def comparison(whole_run: Path) -> Comparison:
    return compare([read_run(whole_run)])


def test_order_sets_and_start(comparison: Comparison) -> None:
    assert [arm.label for arm in comparison.arms] == ["random", "full", "cropi"]
    assert comparison.sets == comparison.targets == ("gcd", "reverse")
    assert comparison.start_target is not None
    assert comparison.start_target.mean == pytest.approx(0.40 - 0.01 / 3)
    assert comparison.start["gcd"].mean == pytest.approx(0.30 - 0.01 / 3)
    assert comparison.notes == ()


def test_final_accuracy_and_spread(comparison: Comparison) -> None:
    cropi = figures(comparison, "cropi")
    assert cropi.step == 40
    assert cropi.target is not None
    assert cropi.target.mean == pytest.approx((0.72 + 0.74 + 0.696) / 3)
    # Deviations of .72 .74 .696 from .71866: .00133, .02133, -.02267.
    assert cropi.target.spread == pytest.approx(math.sqrt((0.0013333**2 + 0.0213333**2 + 0.0226667**2) / 2), abs=1e-6)
    assert cropi.sets["gcd"].mean == pytest.approx(0.718667 - 0.1, abs=1e-6)
    # Six evaluations (two sets, three seeds) of 400 responses each.
    variances = [p * (1 - p) / 400 for base in (0.72, 0.74, 0.696) for p in (base - 0.1, base + 0.1)]
    assert cropi.target.error == pytest.approx(math.sqrt(sum(variances)) / 6)


def test_paired_difference(comparison: Comparison) -> None:
    gap = figures(comparison, "cropi").difference
    assert gap is not None
    assert gap.step == 40
    assert gap.by_seed == pytest.approx({"1": 0.24, "2": 0.25, "3": 0.236})
    assert gap.interval is not None
    deviation = math.sqrt((0.002**2 + 0.008**2 + 0.006**2) / 2)
    assert gap.interval.high - gap.mean == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-5)
    full = figures(comparison, "full").difference
    assert full is not None
    assert full.mean == pytest.approx(0.08)
    assert full.interval is None  # equal in every seed
    assert figures(comparison, "random").difference is None


def test_speed_in_steps_time_and_tokens(comparison: Comparison) -> None:
    """Full's last two of four evaluations have the mean .40 + .14 - .01/3, where it is at step 35; cropi is at .48 + .002 - .01/3 at step
    10 and rises .008 a step: step 17.25.
    """
    speed = figures(comparison, "cropi").speed
    assert speed is not None
    assert speed["steps"].threshold == pytest.approx(0.54 - 0.01 / 3)
    assert not speed["steps"].beforehand
    assert speed["steps"].needed == pytest.approx(17.25)
    assert speed["steps"].ratio == pytest.approx(35 / 17.25)
    # Alone, up to the same threshold: seeds start at .40, .41 and .38, cropi with a wobble of 0, .01 and -.004.
    rest = {"1": (0.14, 0.14), "2": (0.13, 0.12), "3": (0.16, 0.164)}
    expected = {seed: (full - 0.01 / 3) / 0.004 / ((ours - 0.01 / 3) / 0.008) for seed, (full, ours) in rest.items()}
    assert {seed: factor.exact for seed, factor in speed["steps"].by_seed.items()} == pytest.approx(expected)
    # Drawn three times each, with the threshold of that seed: 35 / 18 and 35 / 16.25. Three seeds are on one side by chance in 1 of 4.
    assert speed["steps"].interval == pytest.approx((35 / 18, 35 / 16.25))
    assert speed["steps"].confidence == 0.75
    # cropi pays 82 s of the first stage and 1 s of selecting, then 3 s a step; full 1 s a stage and 3 s a step.
    assert speed["seconds"].ratio == pytest.approx((2 + 35 * 3) / (83 + 17.25 * 3))
    assert speed["tokens"].ratio == pytest.approx(35 * 1500 / (16000 + 17.25 * 1500))
    random = figures(comparison, "random").speed
    assert random is not None
    assert random["steps"].ratio is None
    assert random["steps"].needed is None
    assert random["steps"].interval is not None
    assert random["steps"].interval[0] == 0  # open: it never gets there
    assert random["steps"].interval[1] < 1
    assert figures(comparison, "full").speed is None


def test_cost_curve_pays_for_selection_before_using_it(comparison: Comparison) -> None:
    cropi = figures(comparison, "cropi")
    curve = unit_curve(cropi, cropi.counted, comparison.targets, "seconds")
    assert curve is not None
    assert [(point.step, point.cost) for point in curve] == [
        (0, 0), (0, 83), (10, 113), (20, 143), (20, 154), (30, 184), (40, 214),
    ]  # fmt: skip


def test_ledger(comparison: Comparison) -> None:
    cropi, full = figures(comparison, "cropi").ledger, figures(comparison, "full").ledger
    assert cropi.sampling == Cost(30, 9000, None, None)
    assert cropi.scoring == Cost(52 + 10 + 2, None, None, 7000 + 5000)
    assert cropi.training == Cost(150, 40000, 20000, None)
    assert cropi.evaluation == 2 * 3 * 4
    assert cropi.total.seconds == 244
    assert cropi.total.tokens == 81000
    assert full.sampling == Cost()
    assert full.scoring == Cost(2, None, None, None)
    assert full.total.seconds == 152
    assert figures(comparison, "cropi").charged
    assert not figures(comparison, "full").charged


def test_random_handed_a_scores_file_pays_nothing(run_folder: Path) -> None:
    synthetic.write_run(run_folder, seeds=["1"], arms=["random", "static"])
    for stage in ("1", "2"):
        inputs = {"scores": {"path": "start/scores.jsonl"}}
        path = run_folder / "random/1" / stage / "selected.jsonl.manifest.json"
        synthetic.write_manifest(path, "cropi-select", {"seconds": 1.0}, inputs=inputs, options={"by": "random"})
    comparison = compare([read_run(run_folder)])
    assert figures(comparison, "random").ledger.total.seconds == 152
    assert figures(comparison, "static").ledger.total.seconds == 152 + 82


def test_one_seed_has_no_interval(run_folder: Path) -> None:
    comparison = compare([read_run(synthetic.write_run(run_folder, seeds=["2"]))])
    gap = figures(comparison, "cropi").difference
    assert gap is not None
    assert gap.interval is None
    assert gap.mean == pytest.approx(0.25)
    target = figures(comparison, "cropi").target
    assert target is not None
    assert target.spread is None
    assert target.error == pytest.approx(math.sqrt(0.64 * 0.36 / 400 + 0.84 * 0.16 / 400) / 2)
    assert "no interval" in summary(comparison)[0]


def test_interval_with_zero_is_called_no_difference(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["random"])
    for seed, shift in (("1", 0.03), ("2", -0.02), ("3", 0.01)):
        for stage in (1, 2):
            synthetic.write_stage(run_folder / "static" / seed / str(stage), "static", seed, stage)
        path = run_folder / "static" / seed / "2/policy/evaluations.jsonl"
        wanted = synthetic.accuracy("random", seed, 40) + shift
        records = [
            {"step": 20, "set": name, "accuracy": wanted, "prompts": 200, "samples": 2} for name in ("gcd", "reverse")
        ]
        synthetic.write_lines(path, records)
    comparison = compare([read_run(run_folder)])
    gap = figures(comparison, "static").difference
    assert gap is not None
    assert gap.interval is not None
    assert gap.interval.includes_zero
    assert "includes zero, so no difference is shown" in summary(comparison)[0]


def test_unfinished_seed_is_shown_but_not_counted(run_folder: Path) -> None:
    synthetic.write_run(run_folder)
    shutil.rmtree(run_folder / "cropi/3/2")
    synthetic.write_stage(run_folder / "cropi/3/2", "cropi", "3", 2, steps=10)
    comparison = compare([read_run(run_folder)])
    cropi = figures(comparison, "cropi")
    assert [seed.name for seed in cropi.counted] == ["1", "2"]
    assert cropi.seed_curves["3"][-1][0] == 30
    assert cropi.target is not None
    assert cropi.target.mean == pytest.approx((0.72 + 0.74) / 2)
    assert comparison.notes == ("cropi, seed 3: stage 2 is unfinished (step 10); not counted in the means.",)
    # An unfinished policy has no ledger: ten steps of 3 s are added up from its log.
    assert cropi.ledgers["3"].training.seconds == 75 + 10 * 3
    assert cropi.speed is not None
    assert cropi.speed["steps"].ratio == pytest.approx(35 / (17.5 - 0.005 / 0.008))  # seeds 1 and 2 of both arms


def test_arm_in_progress_is_compared_at_the_last_common_step(run_folder: Path) -> None:
    synthetic.write_run(run_folder)
    for seed in ("1", "2", "3"):
        shutil.rmtree(run_folder / "cropi" / seed / "2")
    gap = figures(compare([read_run(run_folder)]), "cropi").difference
    assert gap is not None
    assert gap.step == 20
    assert gap.by_seed["1"] == pytest.approx((0.008 - 0.002) * 20)


def test_set_missing_in_one_arm_leaves_the_mean(run_folder: Path) -> None:
    synthetic.write_run(run_folder, arms=["random"])
    for seed in ("1", "2", "3"):
        for stage in (1, 2):
            folder = run_folder / "cropi" / seed / str(stage)
            synthetic.write_stage(folder, "cropi", seed, stage, sets=["gcd", "reverse", "lcm"])
    run = read_run(run_folder)
    comparison = compare([run])
    assert comparison.sets == ("gcd", "lcm", "reverse")
    assert comparison.targets == ("gcd", "reverse")
    assert comparison.notes == ("Set lcm was not evaluated in random: it is left out of the mean.",)
    assert "lcm" not in figures(comparison, "random").sets
    assert figures(comparison, "cropi").sets["lcm"].mean == pytest.approx(0.718667, abs=1e-6)
    asked = figures(compare([run], targets=["gcd"]), "cropi").target
    assert asked is not None
    assert asked.mean == pytest.approx(0.618667, abs=1e-6)
    with pytest.raises(UsageError, match=r"sudoku: no such evaluation set"):
        compare([run], targets=["sudoku"])


def test_several_runs_pair_within_their_run(tmp_path: Path) -> None:
    first = synthetic.write_run(tmp_path / "a", arms=["random", "full", "cropi"])
    second = synthetic.write_run(tmp_path / "b", arms=["random", "cropi"])
    comparison = compare([read_run(first), read_run(second)])
    assert [arm.label for arm in comparison.arms] == ["a/random", "b/random", "a/full", "a/cropi", "b/cropi"]
    gap = figures(comparison, "b/cropi").difference
    assert gap is not None
    assert gap.baseline == "b/random"
    speed = figures(comparison, "b/cropi").speed
    assert speed is not None
    assert speed["steps"].reference == "a/full"


def test_arms_of_another_start_are_noticed(run_folder: Path) -> None:
    synthetic.write_run(run_folder, seeds=["1"])
    path = run_folder / "cropi/1/1/policy/evaluations.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.3', '"accuracy": 0.6', 1))
    [note] = compare([read_run(run_folder)]).notes
    assert note.startswith("Seed 1: the arms start between 40.0 and 55.0 %")


def test_shares_of_a_selection(comparison: Comparison) -> None:
    [share] = stage_shares(figures(comparison, "full"))[:1]
    assert share.prompts == 20
    assert share.sources == pytest.approx({"gcd": 0.4, "reverse": 0.6})
    assert share.rates == pytest.approx({"0": 0.2, "up to ½": 0.4, "1": 0.2, "unknown": 0.2})
    assert share.stages == "stages 1–2"  # both stages alike: one bar


@pytest.mark.parametrize(
    ("rate", "name"),
    [
        (0.0, "0"),
        (0.01, "up to ¼"),
        (0.25, "up to ¼"),
        (0.26, "up to ½"),
        (0.75, "up to ¾"),
        (0.9, "below 1"),
        (1.0, "1"),
        (None, "unknown"),
    ],
)
def test_pass_rate_bins(rate: float | None, name: str) -> None:
    assert rate_bin(rate) == name
