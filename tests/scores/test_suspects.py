"""Prompts that pull away from a target: the noise of a score against a naive twin, how many are listed where there is nothing, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_reliability_null
import tiny_policy
from gradient_stores import unseal
from halves_stores import halves_store
from scipy import stats
from scipy.optimize import minimize_scalar
from test_reliability_null import Simulated, make

from cropi_tools.cli.score import score
from cropi_tools.data.manifest import read_manifest
from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.scores.noise import below_zero, noise_of, prior_of
from cropi_tools.scores.options import ScoreOptions
from cropi_tools.scores.suspects import CHANCE, LEVEL, TOWARDS, audit, suspect_records


def simulated(
    draw: np.random.Generator, count: int, freedom: float, truth: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, half differences and W of prompts whose noise has variances around 4 W, of so many degrees of freedom."""
    weights = draw.gamma(0.7, size=count)
    deviation = 2 * np.sqrt(weights * freedom / draw.chisquare(freedom, count))
    first, second = truth + np.sqrt(2) * deviation * draw.normal(size=(2, count))
    return (first + second) / 2, (first - second) / 2, weights


@pytest.mark.parametrize("freedom", [3.0, 10.0, 1e6])
def test_the_prior_is_that_of_the_variances(freedom: float) -> None:
    _, differences, weights = simulated(np.random.default_rng(0), 10_000, freedom)
    prior = prior_of(differences**2 / weights)
    assert prior.scale == pytest.approx(4.0, rel=0.1)
    assert 0.7 * min(freedom, 60) < prior.freedom <= 1.1 * freedom  # one standard error below, on a grid
    assert prior_of(differences**2 / weights, least=5.0).scale == 5.0


@pytest.mark.parametrize("freedom", [3.0, 10.0, 1e6])
@pytest.mark.parametrize("count", [25, 300])
def test_of_prompts_without_influence_at_most_the_stated_share_is_below_zero(freedom: float, count: int) -> None:
    draw = np.random.default_rng(1)
    found = []
    for _ in range(4000 // count):
        scores, differences, weights = simulated(draw, count, freedom)
        differences[: count // 3] = np.nan  # only one of their halves has a gradient
        found.append((below_zero(scores, noise_of(differences, weights)) <= LEVEL).mean())
    assert 0.01 < np.mean(found) <= LEVEL + 3 * np.sqrt(LEVEL / 4000)


class Pulling(Simulated):
    """Prompts that pull towards the direction by a shift, of which every fifth has no influence, and every fifth pulls away."""

    def _draw(self, *numbers: int) -> np.ndarray:
        found = super()._draw(*numbers)
        if len(numbers) == 1 and numbers[0] < 1000:
            found[0] = (0.0, -2.0, 2.0, 2.0, 2.0)[numbers[0] % 5]
        return found


def made(folder: Path, seed: int, dimensions: int, direction: float, size: int = 100) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_reliability_null, "Simulated", Pulling)
        return make(folder, seed, dimensions, direction, pool=size).store


def shares(folder: Path, trials: int, dimensions: int) -> dict[int, float]:
    """Of prompts without influence (0), that pull away (1) and that pull towards (2), which share is listed."""
    found: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for seed in range(trials):
        checked = audit([made(folder / str(seed), seed, dimensions, 1.5)])
        for record, away in zip(checked.records, (checked.p[:, 0] <= LEVEL).tolist(), strict=True):
            found[min(int(record["id"][1:]) % 5, 2)].append(away)
    return {kind: float(np.mean(listed)) for kind, listed in found.items()}


@pytest.mark.slow
def test_those_that_pull_away_are_listed_and_hardly_any_other(tmp_path: Path) -> None:
    found = shares(tmp_path, 3, 8)
    assert found[0] <= 0.15  # 60 prompts, of which noise of the validation prompts may list several at once
    assert found[1] > 0.6
    assert found[2] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [8, 64])
def test_without_influence_at_most_the_stated_share_is_listed(tmp_path: Path, dimensions: int) -> None:
    assert shares(tmp_path, 20, dimensions)[0] <= CHANCE + 0.02  # 400 prompts, in 20 draws of validation prompts


@pytest.mark.parametrize("dimensions", [1, 4])
def test_where_validation_has_no_direction_hardly_any_source_pulls_towards_it(tmp_path: Path, dimensions: int) -> None:
    found = [audit([made(tmp_path / str(seed), seed, dimensions, 0.0, 40)]).kind.any() for seed in range(5)]
    assert sum(found) <= 1


def naive_audit(store: Store) -> tuple[list[float], list[float], bool]:
    """Deviations and p-values from the index of a store of one set and one source, and whether that pulls towards it, prompt by prompt."""
    entries = [json.loads(line) for line in (store.path / "index.jsonl").read_text().splitlines()]
    length = store.attributes["against"]["v"]["norm"]
    scores, halved, parts = [], [], ([], [])
    for entry in entries:
        unit = entry["gradient_norm"] * length
        scores.append(entry["inner"]["v"] / unit)
        for half, own in enumerate(entry["halves"]):
            parts[half].append(None if own is None else [part / unit for part in own["groups"]["v"]])
        first, second = (None if half is None else half["inner"]["v"] / unit for half in entry["halves"])
        halved.append(None if None in (first, second) else (first - second) / 2)

    def residues(values: list[float | None]) -> list[float | None]:
        known = [(x, c) for x, c in zip(values, scores, strict=True) if x is not None]
        slope = sum(x * c for x, c in known) / sum(c * c for _, c in known)
        return [None if x is None else x - slope * c for x, c in zip(values, scores, strict=True)]

    spreads: list[list[float]] = [[] for _ in scores]
    for half in parts:
        width = len(next(adds for adds in half if adds))
        left = [residues([adds and adds[group] for adds in half]) for group in range(width)]
        for place, adds in enumerate(zip(*left, strict=True)):
            if None not in adds:
                middle = sum(adds) / width
                spreads[place].append(width / (width - 1) * sum((part - middle) ** 2 for part in adds))
    weights = [sum(spread) / len(spread) / 2 for spread in spreads]
    owns = [None if d is None else d * d / w for d, w in zip(residues(halved), weights, strict=True)]
    ratios = [own for own in owns if own is not None]
    best = []
    for freedom in (1 / (0.5 + step * (0.001 - 0.5) / 39) for step in range(40)):

        def badness(log_scale: float, freedom: float = freedom) -> float:
            t = np.sqrt(np.array(ratios) / np.exp(log_scale))
            return float(-(stats.t(freedom).logpdf(t) - log_scale / 2).sum())

        least = minimize_scalar(badness, bracket=(-1.0, 1.0), tol=1e-10)
        best.append((-least.fun, freedom, float(np.exp(least.x))))
    top = max(likelihood for likelihood, _, _ in best)
    freedom, scale = next((f, max(1.0, s)) for likelihood, f, s in best if likelihood >= top - 0.5)
    deviations, p = [], []
    for score_, own, weight in zip(scores, owns, weights, strict=True):
        share = scale if own is None else (freedom * scale + own) / (freedom + 1)
        deviations.append(float(np.sqrt(weight * share)))
        p.append(float(stats.t(freedom + (own is not None)).cdf(score_ / deviations[-1])))
    mean = sum(scores) / len(scores)
    variance = np.var(scores, ddof=1) / len(scores)
    for half in parts:
        known = [adds for adds in half if adds]
        adds = [sum(column) / len(known) for column in zip(*known, strict=True)]
        middle = sum(adds) / len(adds)
        variance += len(adds) / (len(adds) - 1) * sum((part - middle) ** 2 for part in adds) / 4
    return deviations, p, bool(mean > TOWARDS * np.sqrt(variance))


@pytest.mark.parametrize("direction", [1.5, 0.3])
def test_figures_agree_with_a_naive_twin(tmp_path: Path, direction: float) -> None:
    store = made(tmp_path / "s", 1, 8, direction)
    drop_second_halves(store, 7)
    store = Store(store.path)
    found = audit([store])
    deviations, p, kind = naive_audit(store)
    np.testing.assert_allclose(found.deviations[:, 0], deviations, rtol=1e-4)
    np.testing.assert_allclose(found.p[:, 0], p, rtol=1e-3)
    assert found.kind.tolist() == [[kind]] * len(p)
    assert kind == (direction > 1)


def drop_second_halves(store: Store, every: int) -> None:
    """As if one half of every so manieth prompt had no gradient."""
    index = store.path / "index.jsonl"
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    for entry in entries[::every]:
        entry["halves"][1] = None
    index.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    unseal(store.path)


PULLING = 8  # of the prompts of the command's tests


def pool(tmp_path: Path, count: int = 60, **more: Any) -> tuple[Path, Path]:
    """A store by halves whose first prompts pull away, p0 the most, and rollouts of its prompts: one right answer of two."""
    draw = np.random.default_rng(4)
    truth = np.where(np.arange(count) < PULLING, -20.0 + np.arange(count), 12.0)
    store = halves_store(tmp_path / "halves.zarr", truth[:, None] + draw.normal(size=(count, 2)), **more)
    return store.path, tiny_policy.write_jsonl(tmp_path / "r.jsonl", [rollout(f"p{n}") for n in range(count)])


def rollout(name: str, **more: Any) -> dict[str, Any]:
    texts = {"3": 1.0, "4": 0.0}
    samples = [{"token_ids": [5, 1], "logprobs": [-1.0, -2.0], "text": t, "reward": r} for t, r in texts.items()]
    prompt = {"id": name, "prompt": f"1+2={name}", "answer": "3", "source": "sums", "verifier": "exact"}
    return {**prompt, **more, "prompt_token_ids": [3, 12], "samples": samples}


def suspects(tmp_path: Path, store: Path, rollouts: Path, **more: Any) -> list[dict[str, Any]]:
    path = tmp_path / "suspects.jsonl"
    score(ScoreOptions(stores=(str(store),), suspects=(str(rollouts),), output=str(path), **more))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_lists_them_with_their_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, rollouts = pool(tmp_path)
    found = suspects(tmp_path, store, rollouts)
    assert {record["id"] for record in found} == {f"p{n}" for n in range(PULLING)}
    said = capsys.readouterr().err
    assert f"t: of 60 prompts whose sources pull towards it {PULLING} pull away by more than noise" in said
    assert f"{PULLING} of 60 prompts with a gradient; look at their reference answers" in said
    assert "is not known for itself" in said  # this store has no groups
    checked = audit([Store(store)])
    place = int(found[0]["id"][1:])
    assert found[0] == {
        "id": f"p{place}",
        "source": "sums",
        "prompt": f"1+2=p{place}",
        "answer": "3",
        "usual_answer": "3",
        "usual_share": 0.5,
        "pass_rate": 0.5,
        "away_from": ["t"],
        "scores": {"t": pytest.approx(float(checked.scores[place, 0]))},
        "deviations": {"t": pytest.approx(float(checked.deviations[place, 0]))},
        "p": pytest.approx(float(checked.p[place, 0])),
    }
    assert [record["p"] for record in found] == sorted(record["p"] for record in found)
    manifest = read_manifest(tmp_path / "suspects.jsonl")
    assert manifest is not None
    assert manifest["rows"] == PULLING
    suspects(tmp_path, store, rollouts)
    assert "up to date" in capsys.readouterr().err


def test_where_none_qualifies_the_file_is_empty_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = tiny_policy.write_jsonl(tmp_path / "r.jsonl", [rollout("p0")])
    halves = np.random.default_rng(5).normal(size=(40, 2))
    for name, shift, words in (
        ("no kind", 0.0, "no source pulls towards it"),
        ("towards", 9.0, "no prompt pulls away"),
    ):
        (tmp_path / name).mkdir()
        store = halves_store(tmp_path / f"{name}.zarr", halves + shift)
        assert suspects(tmp_path / name, store.path, rollouts) == []
        assert words in capsys.readouterr().err
    for name, store in (
        ("few", halves_store(tmp_path / "few.zarr", halves[:21] - 50, missing=[0, 1])),
        ("dead", halves_store(tmp_path / "dead.zarr", np.empty((0, 2)), dead=5)),
    ):
        (tmp_path / name).mkdir()
        assert suspects(tmp_path / name, store.path, rollouts) == []
        assert "prompts have a gradient in both halves, at least 20" in capsys.readouterr().err


def test_refusals(tmp_path: Path) -> None:
    store, rollouts = pool(tmp_path)
    plain = halves_store(tmp_path / "plain.zarr", np.ones((30, 2)), mean={"norm": 1.0, "sha256": "x"})
    with pytest.raises(InputError, match=r"plain\.zarr: holds no halves to compare; cropi-grad --halves makes them"):
        audit([plain])
    found = audit([Store(store)])
    others = tiny_policy.write_jsonl(tmp_path / "others.jsonl", [rollout("q")])
    with pytest.raises(InputError, match=r"rollouts of its prompt 'p\d' are not there"):
        list(suspect_records(found, [str(others)], Store(store)))
    rows = [rollout(f"p{n}") for n in range(60)]
    for row in rows:
        row["samples"][1]["reward"] = 1.0
    graded = tiny_policy.write_jsonl(tmp_path / "graded.jsonl", rows)
    with pytest.raises(InputError, match=r"rollouts of its prompt 'p\d' have other rewards"):
        list(suspect_records(found, [str(graded)], Store(store)))
    assert len(list(suspect_records(found, [str(rollouts)], Store(store)))) == PULLING
    with pytest.raises(InputError, match="--similarity dot"):
        audit([Store(store)], "cosine")
    for wrong in ({"reliability": True}, {"each": True}, {"valid": (("t", "x.zarr"),)}, {"dry_run": True}):
        with pytest.raises(UsageError, match="--suspects"):
            ScoreOptions(stores=("s.zarr",), suspects=("r.jsonl",), **wrong)
