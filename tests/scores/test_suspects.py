"""Prompts that pull away from a target: the noise of a score against a naive twin, how many are listed where there is nothing, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_policy
from halves_stores import halves_store
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import polygamma

from cropi_tools.cli.score import score
from cropi_tools.data.manifest import read_manifest
from cropi_tools.data.store import Store
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.scores.noise import below_zero, listed, noise_of, prior_of
from cropi_tools.scores.options import ScoreOptions
from cropi_tools.scores.suspects import FALSE_SHARE, audit


def simulated(
    draw: np.random.Generator, count: int, freedom: float, truth: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and half differences of prompts whose noise has variances around 4, of so many degrees of freedom."""
    deviation = 2 / np.sqrt(draw.chisquare(freedom, count) / freedom)
    first, second = truth + np.sqrt(2) * deviation * draw.normal(size=(2, count))
    return (first + second) / 2, (first - second) / 2


def rejected(scores: np.ndarray, differences: np.ndarray) -> np.ndarray:
    return listed(below_zero(scores, noise_of(differences, None)), FALSE_SHARE)


@pytest.mark.parametrize("freedom", [3.0, 10.0, 1e6])
def test_the_prior_is_that_of_the_variances(freedom: float) -> None:
    _, differences = simulated(np.random.default_rng(0), 200_000, freedom)
    prior = prior_of(differences**2)
    assert prior.variance == pytest.approx(4.0, rel=0.05)
    if freedom < 100:
        assert prior.freedom == pytest.approx(freedom, rel=0.1)
    else:
        assert prior.freedom > 50


@pytest.mark.parametrize("freedom", [3.0, 10.0, 1e6])
@pytest.mark.parametrize("count", [25, 400])
def test_without_influence_hardly_any_pool_has_a_suspect(freedom: float, count: int) -> None:
    """The share of pools in which anything is listed is that of lists that are wrong as a whole."""
    draw = np.random.default_rng(1)
    trials = 400
    wrong = sum(rejected(*simulated(draw, count, freedom)).any() for _ in range(trials))
    assert wrong <= trials * FALSE_SHARE + 3 * np.sqrt(trials * FALSE_SHARE)


@pytest.mark.parametrize("freedom", [3.0, 1e6])
def test_of_the_listed_at_most_the_stated_share_is_listed_by_chance(freedom: float) -> None:
    draw = np.random.default_rng(2)
    pulls = np.arange(400) < 80
    shares, found = [], []
    for _ in range(100):
        which = rejected(*simulated(draw, 400, freedom, np.where(pulls, -9.0, 0.0)))
        shares.append((which & ~pulls).sum() / max(which.sum(), 1))
        found.append((which & pulls).sum() / pulls.sum())
    assert np.mean(shares) <= FALSE_SHARE + 0.01
    assert np.mean(found) > 0.5


def naive_noise(differences: list[float], validation: list[float]) -> tuple[list[float], list[float]]:
    """Deviation and degrees of freedom of every prompt, one by one; the prior by search instead of inversion."""
    known = [d * d for d in differences if d == d]
    logs = [np.log(square) for square in known]
    spread = np.var(logs, ddof=1)
    target = spread - polygamma(1, 0.5)
    best = minimize_scalar(
        lambda half: (polygamma(1, half) - target) ** 2, bounds=(1e-3, len(known) / 2), method="bounded"
    )
    freedom = 2 * best.x
    scale = np.exp(
        np.mean(logs) - (polygamma(0, 0.5) - np.log(0.5)) + (polygamma(0, freedom / 2) - np.log(freedom / 2))
    )
    deviations, degrees = [], []
    for d, extra in zip(differences, validation, strict=True):
        own = scale if d != d else (freedom * scale + d * d) / (freedom + 1)
        deviations.append(float(np.sqrt(own + extra)))
        degrees.append(freedom + (d == d))
    return deviations, degrees


def test_noise_and_list_agree_with_a_naive_twin() -> None:
    draw = np.random.default_rng(3)
    scores, differences = simulated(draw, 120, 4.0, np.where(np.arange(120) < 30, -12.0, 1.0))
    differences[::5] = np.nan
    validation = draw.uniform(0.1, 0.5, size=120)
    found = noise_of(differences, validation)
    deviations, degrees = naive_noise(differences.tolist(), validation.tolist())
    np.testing.assert_allclose(found.deviation, deviations, rtol=1e-3)
    np.testing.assert_allclose(found.freedom, degrees, rtol=1e-3)
    p_values = [float(stats.t(n).cdf(x / d)) for x, d, n in zip(scores, found.deviation, found.freedom, strict=True)]
    np.testing.assert_allclose(below_zero(scores, found), p_values, rtol=1e-9)
    wanted = stats.false_discovery_control(p_values) <= FALSE_SHARE
    assert 5 < wanted.sum() < 60
    assert listed(np.array(p_values), FALSE_SHARE).tolist() == wanted.tolist()


PULLING = 8


def pool(tmp_path: Path, count: int = 60, **more: Any) -> tuple[Path, Path]:
    """A store by halves whose first prompts pull away, p0 the most, and rollouts of its prompts: one right answer of two."""
    draw = np.random.default_rng(4)
    truth = np.where(np.arange(count) < PULLING, -20.0 + np.arange(count), 0.5)
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
    assert f"{PULLING} of 60 prompts with a gradient pull away from a target" in said
    assert "one pair of halves alone" in said  # this store has no groups
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
        "scores": {"t": pytest.approx(float(checked.scores[place, 0]))},
        "deviations": {"t": pytest.approx(float(checked.deviations[place, 0]))},
        "p": pytest.approx(float(checked.p[place])),
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
    assert suspects(tmp_path, halves_store(tmp_path / "none.zarr", halves).path, rollouts) == []
    assert "none of 40 prompts with a gradient pulls away" in capsys.readouterr().err
    for name, store in (
        ("few", halves_store(tmp_path / "few.zarr", halves[:21] - 50, missing=[0, 1])),
        ("dead", halves_store(tmp_path / "dead.zarr", np.empty((0, 2)), dead=5)),
    ):
        (tmp_path / name).mkdir()
        assert suspects(tmp_path / name, store.path, rollouts) == []
        assert "prompts have a gradient in both halves, at least 20" in capsys.readouterr().err


def test_refusals(tmp_path: Path) -> None:
    store, rollouts = pool(tmp_path)
    plain = halves_store(tmp_path / "plain.zarr", np.ones((30, 2)), mean={"norm": 1.0, "sha256": "x"}).path
    with pytest.raises(InputError, match=r"plain\.zarr: holds no halves to compare; cropi-grad --halves makes them"):
        suspects(tmp_path, plain, rollouts)
    others = tiny_policy.write_jsonl(tmp_path / "others.jsonl", [rollout("q")])
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"rollouts of its prompt 'p\d' are not there"):
        suspects(tmp_path / "a", store, others)
    rows = [rollout(f"p{n}") for n in range(60)]
    for row in rows:
        row["samples"][1]["reward"] = 1.0
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"rollouts of its prompt 'p\d' have other rewards"):
        suspects(tmp_path / "b", store, tiny_policy.write_jsonl(tmp_path / "b.jsonl", rows))
    for wrong in ({"reliability": True}, {"each": True}, {"valid": (("t", "x.zarr"),)}, {"dry_run": True}):
        with pytest.raises(UsageError, match="--suspects"):
            ScoreOptions(stores=("s.zarr",), suspects=("r.jsonl",), **wrong)
    with pytest.raises(InputError, match="--similarity dot"):
        audit([Store(store)], "cosine")
