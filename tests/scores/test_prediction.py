"""Predicted scores against pools whose truth is known, and against a plain twin of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradient_stores import make_store, spec
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from cropi_tools.cli.score import score
from cropi_tools.data.features import as_rows, header
from cropi_tools.data.jsonl import read_jsonl
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.scores.options import ScoreOptions
from cropi_tools.scores.prediction import FEWEST, LANDMARKS, RIDGES, Observations, Predictor, foretold_without_fold
from cropi_tools.scores.rank_metrics import spearman

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # outputs of commands that fail
SOURCES = ("sum", "gcd", "reverse")
MEANS = {"sum": 0.0, "gcd": 0.2, "reverse": -0.1}


class World:
    """A pool whose scores are its source's mean, plus something smooth in the features, plus noise."""

    def __init__(self, count: int, noise: float = 0.05, smooth: float = 0.2, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.ids = [f"p{number}" for number in range(count)]
        self.sources = [SOURCES[number % 3] for number in range(count)]
        # features of very different sizes, as hidden states are
        self.features = (draw.normal(size=(count, 6)) * [1, 1, 1, 100, 0.01, 0] + 5).astype(np.float32)
        place = (self.features[:, :2] - 5).astype(np.float64)
        self.truth = np.array([MEANS[source] for source in self.sources]) + smooth * np.sin(place[:, 0]) * place[:, 1]
        self.scores = (self.truth + noise * draw.normal(size=count))[:, None]

    def observed(self, places: NDArray[np.int64], ages: NDArray[np.int64] | None = None) -> Observations:
        return Observations(
            [self.ids[place] for place in places],
            [self.sources[place] for place in places],
            self.features[places],
            self.scores[places],
            np.zeros(len(places), np.int64) if ages is None else ages,
        )


def predicted(world: World, predictor: Predictor, places: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    found, spread = predictor(world.features[places], [world.sources[place] for place in places])
    return found[:, 0], spread[:, 0]


def test_what_is_smooth_in_the_features_is_found() -> None:
    world = World(1200)
    predictor = Predictor(world.observed(np.arange(300)), ["target"])
    rest = np.arange(300, 1200)
    found, spread = predicted(world, predictor, rest)
    right = spearman(found, world.truth[rest])
    assert right > 0.85
    trust = predictor.trust[0]
    # cross-validation foretells what happens on prompts that were not measured, and its interval covers it
    assert trust.spearman[1] < spearman(found, world.scores[rest, 0]) < trust.spearman[2] + 0.05
    assert trust.source_spearman < trust.spearman[0]
    assert trust.weakness is None
    # the deviations are of the right size, and larger away from what was measured
    error = np.abs(found - world.scores[rest, 0])
    assert 0.5 < np.mean(error < spread) < 0.85
    far, _ = np.quantile(spread, [0.8, 0.2])
    assert error[spread > far].mean() > error.mean()


def test_a_plain_twin() -> None:
    """Few observations: Nystroem's features are exact, and ridge on them is kernel ridge with a linear kernel of the sources beside it."""
    world = World(200, seed=3)
    known = np.arange(80)
    predictor = Predictor(world.observed(known), ["target"])
    assert len(known) <= LANDMARKS
    mean, scale = world.features[known].mean(0), world.features[known].std(0)
    standard = ((world.features - mean) / np.where(scale > 0, scale, 1)).astype(np.float64)
    apart = ((standard[:, None] - standard[None]) ** 2).sum(-1)
    width = np.median(apart[np.ix_(known, known)][np.triu_indices(80, 1)])
    sources = np.array(world.sources)
    kernel = np.exp(-apart / width) + (sources[:, None] == sources[None])
    # an intercept without a penalty: solve [K + ridge, 1; 1', 0]
    system = np.zeros((81, 81))
    system[:80, :80] = kernel[np.ix_(known, known)] + predictor.ridge * np.eye(80)
    system[80, :80] = system[:80, 80] = 1.0
    solved = np.linalg.solve(system, np.append(world.scores[known, 0], 0.0))
    rest = np.arange(80, 200)
    expected = kernel[np.ix_(rest, known)] @ solved[:80] + solved[80]
    found, _ = predicted(world, predictor, rest)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("count", "width"), [(60, 12), (40, 90), (300, 40)])
@pytest.mark.parametrize("old", ["none", "some", "without weight"])
def test_cross_validation_is_that_of_a_fit_without_each_fold(count: int, width: int, old: str) -> None:
    """Against scikit-learn fitted anew for every fold and every ridge; more columns than rows, old observations, collinear columns."""
    draw = np.random.default_rng(count + width)
    rows = draw.normal(size=(count, width)) * 10.0 ** draw.uniform(-2, 1, size=width)
    rows[:, 1] = rows[:, 0]
    scores = draw.normal(size=(count, 2)) + 3.0 + rows[:, :1]
    fresh = np.arange(count) if old == "none" else np.arange(0, count, 2)
    weights = np.ones(count)
    if old != "none":
        weights[1::2] = 0.0 if old == "without weight" else 0.3
    folds = [np.arange(number, len(fresh), 7) for number in range(7)]
    found = foretold_without_fold(rows, scores, weights, fresh, folds)
    for number, ridge in enumerate(RIDGES):
        for fold in folds:
            kept = weights.copy()
            kept[fresh[fold]] = 0.0
            model = Ridge(alpha=ridge, solver="svd").fit(rows, scores, sample_weight=kept)
            assert found[number, fold] == pytest.approx(model.predict(rows[fresh[fold]]), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("trials", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_where_there_is_nothing_to_find_it_says_so(trials: int) -> None:
    world = World(120)
    found = 0
    for seed in range(trials):
        draw = np.random.default_rng(seed)
        features, noise = draw.normal(size=(120, 6)).astype(np.float32), draw.normal(size=(120, 1))
        known = Observations(world.ids, ["one"] * 120, features, noise, np.zeros(120, np.int64))
        weakness = Predictor(known, ["target"]).trust[0].weakness
        assert weakness in (None, "on target the prediction is no better than chance")
        found += weakness is None
    assert found <= max(1, 0.05 * trials)


def test_where_sources_say_all_it_says_so() -> None:
    weak = []
    for seed in range(6):
        world = World(240, noise=0.05, smooth=0.0, seed=seed)
        weak.append(Predictor(world.observed(np.arange(240)), ["target"]).trust[0].weakness)
    said = "on target the prediction is no better than the mean score of the prompt's source"
    assert set(weak) <= {said, None}
    assert weak.count(said) >= 3


def test_old_scores_count_as_far_as_they_help() -> None:
    world = World(900, seed=1)
    fresh, old = np.arange(40), np.arange(40, 400)
    places = np.concatenate([fresh, old])
    ages = np.array([0] * len(fresh) + [1] * len(old))
    alike = Predictor(world.observed(places, ages), ["target"])
    assert alike.decay == 1.0
    alone = Predictor(world.observed(fresh), ["target"])
    rest = np.arange(400, 900)
    assert spearman(predicted(world, alike, rest)[0], world.truth[rest]) > 0.05 + spearman(
        predicted(world, alone, rest)[0], world.truth[rest]
    )
    # of a policy that has nothing in common with that of now
    other = world.observed(places, ages)
    other.scores[len(fresh) :] = np.random.default_rng(2).normal(size=(len(old), 1)) * 3
    assert Predictor(other, ["target"]).decay == 0.0


# -- the command


def write_pool(path: Path, world: World) -> Path:
    lines = [
        json.dumps({"id": name, "prompt": f"{name}?", "answer": "1", "source": source})
        for name, source in zip(world.ids, world.sources, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_features(path: Path, world: World, places: NDArray[np.int64] | None = None) -> Path:
    chosen = np.arange(len(world.ids)) if places is None else places
    names = [world.ids[place] for place in chosen]
    facts = {"policy": "P", "pooling": "a test's"}
    path.write_bytes(header(names, world.features.shape[1], facts) + as_rows(world.features[chosen]))
    return path


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A pool of 300, its features, and a store of 60 of them, three of which have no gradient."""
    monkeypatch.chdir(tmp_path)
    world = World(300)
    write_pool(tmp_path / "pool.jsonl", world)
    write_features(tmp_path / "f.safetensors", world)
    make_probe(tmp_path / "probe.zarr", world, range(60))
    return world


def make_probe(path: Path, world: World, places: range) -> None:
    rows = [None if place % 20 == 7 else np.ones(64, np.float32) for place in places]
    inner = [{"target": float(world.scores[place, 0])} for place in places]
    against = {"target": {"norm": 1.0, "sha256": "0" * 64}}
    store = make_store(path, rows, spec(), prefix="p", inner=inner, against=against, norms=[1.0] * len(inner))
    assert store.prompts == len(places)


def run(**options: Any) -> list[dict[str, Any]]:
    given = {"predict": ("pool.jsonl",), "features": ("f.safetensors",), "output": "scores.jsonl", **options}
    score(ScoreOptions(stores=("probe.zarr",), **given))
    return [record for _, record in read_jsonl(given["output"])]


def test_every_prompt_has_a_score_that_says_what_it_is(chain: World, capsys: pytest.CaptureFixture[str]) -> None:
    found = run()
    assert [record["id"] for record in found] == chain.ids
    measured = [record for record in found if record["measured"]]
    assert [record["id"] for record in measured] == chain.ids[:60]
    assert {record["id"] for record in measured if record["scores"] is None} == {"p7", "p27", "p47"}
    for record in found[60:]:
        assert (record["status"], record["pass_rate"], record["norm"]) == ("predicted", None, None)
        assert record["deviation"]["target"] > 0
    truth = chain.truth[60:]
    assert spearman([record["scores"]["target"] for record in found[60:]], truth) > 0.4
    said = capsys.readouterr().err
    assert "predicting from 60 prompts measured now" in said
    assert "a perfect prediction would reach is not known" in said
    assert "297 of 300" not in said
    facts = json.loads(Path("scores.jsonl.manifest.json").read_text())["facts"]["prediction"]
    assert (facts["measured"], facts["old"]) == (60, 0)
    assert [trust["name"] for trust in facts["trust"]] == ["target"]


def test_the_same_command_is_up_to_date_and_another_is_told(chain: World, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    run(if_weak="warn")
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(InputError, match="predict True"):
        run(predict=(), features=())


def write_old(path: str, world: World, places: range, **fields: Any) -> str:
    records = [
        {
            "id": world.ids[place],
            "source": world.sources[place],
            "scores": {"target": float(world.truth[place])},
            "pass_rate": 0.5,
            "status": "ok",
            **fields,
        }
        for place in places
    ]
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_old_scores_are_read_from_files(chain: World, capsys: pytest.CaptureFixture[str]) -> None:
    alone = spearman([record["scores"]["target"] for record in run()[60:]], chain.truth[60:])
    # those that were predicted themselves say nothing, nor those that are measured anew
    guesses = write_old("guesses.jsonl", chain, range(250, 300), measured=False)
    capsys.readouterr()
    found = run(old=(write_old("old.jsonl", chain, range(30, 200)), guesses), force=True)
    assert "from 60 prompts measured now and 140 of earlier stages, each weighing 1 a stage" in capsys.readouterr().err
    assert spearman([record["scores"]["target"] for record in found[200:]], chain.truth[200:]) > alone
    assert [record["id"] for record in found if record["measured"]] == chain.ids[:60]


def test_scores_that_training_made_on_the_side_are_one_a_prompt(
    chain: World, capsys: pytest.CaptureFixture[str]
) -> None:
    write_old("once.jsonl", chain, range(60, 160))
    lines = [json.loads(line) for line in Path("once.jsonl").read_text().splitlines()]
    steps = [
        {**line, "step": step, "scores": {"target": line["scores"]["target"] + shift}}
        for line in lines
        for step, shift in ((1, 0.1), (2, -0.1))
    ]
    steps += [{**line, "step": 3, "scores": None, "status": "zero-advantage"} for line in lines[:50]]
    Path("influence.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    on_the_side = run(old=("influence.jsonl",))
    assert "and 100 of earlier stages" in capsys.readouterr().err
    plain = run(old=("once.jsonl",), output="plain.jsonl")
    for one, other in zip(on_the_side, plain, strict=True):
        assert (one["scores"] is None) == (other["scores"] is None)
        if one["scores"]:
            assert one["scores"]["target"] == pytest.approx(other["scores"]["target"], abs=1e-9)
    Path("influence.jsonl").write_text(json.dumps({**steps[0], "pass_rate": 7}) + "\n")
    with pytest.raises(InputError, match=r"influence\.jsonl:1: 'pass_rate' must be"):
        run(old=("influence.jsonl",), output="again.jsonl")


def broken(name: str, world: World) -> dict[str, Any]:
    if name == "not in the pool":
        Path("small.jsonl").write_text("".join(Path("pool.jsonl").read_text().splitlines(keepends=True)[:30]))
        return {"predict": ("small.jsonl",)}
    if name == "features missing":
        write_features(Path("few.safetensors"), world, np.arange(100))
        return {"features": ("few.safetensors",)}
    if name == "features twice":
        return {"features": ("f.safetensors", "f.safetensors")}
    if name == "cut short":
        Path("cut.safetensors").write_bytes(Path("f.safetensors").read_bytes()[:-7])
        return {"features": ("cut.safetensors",)}
    if name == "not finite":
        world.features[200] = np.nan
        write_features(Path("nan.safetensors"), world)
        return {"features": ("nan.safetensors",)}
    if name == "another kind of file":
        return {"features": ("probe.zarr/manifest.json",)}
    if name == "other sets":
        record = {"id": "p200", "source": "sum", "scores": {"other": 0.1}, "pass_rate": 0.5, "status": "ok"}
        Path("old.jsonl").write_text(json.dumps(record) + "\n")
        return {"old": ("old.jsonl",)}
    assert name == "no such file"
    return {"features": ("absent.safetensors",)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not in the pool", "was measured and is not in the pool"),
        ("features missing", "prompt 'p100' has no features"),
        ("features twice", "prompt 'p0' comes twice"),
        ("cut short", "does not open as safetensors"),
        ("not finite", "not finite"),
        ("another kind of file", "does not open as safetensors"),
        ("other sets", "its scores are on other, those of now on target"),
        ("no such file", "no such file"),
    ],
)
def test_what_does_not_belong_together_is_refused(chain: World, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(**broken(name, chain))
    assert not Path("scores.jsonl").exists()


def test_too_few_and_too_weak_are_refused(chain: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_probe(tmp_path / "probe2.zarr", chain, range(FEWEST - 1))
    with pytest.raises(InputError, match=f"{FEWEST - 1} prompts were measured, too few"):
        score(ScoreOptions(stores=("probe2.zarr",), predict=("pool.jsonl",), features=("f.safetensors",), output="s"))
    noise = World(300)
    noise.scores = np.random.default_rng(5).normal(size=(300, 1)) * 0.1
    make_probe(tmp_path / "noise.zarr", noise, range(60))
    Path("probe.zarr").rename("good.zarr")
    Path("noise.zarr").rename("probe.zarr")
    with pytest.raises(InputError, match=r"no better than chance: measure more prompts.*--if-weak warn"):
        run()
    assert len(run(if_weak="warn", output="all.jsonl")) == 300
    assert "warning: on target the prediction is no better than chance" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"predict": ("pool.jsonl",)},
        {"features": ("f",)},
        {"old": ("s",)},
        {"if_weak": "warn"},
        {"predict": ("pool.jsonl",), "features": ("f",), "reliability": True},
        {"predict": ("pool.jsonl",), "features": ("f",), "each": True, "valid": (("a", "b"),)},
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ScoreOptions(stores=("probe.zarr",), **options)
