"""The geometry of Adam: which coordinates count, by how much, and what opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cropi_tools.data.policies import OPTIMIZER_STATE, adam_beta2, metric_of
from cropi_tools.gradients.preconditioner import EPSILON, LEAST, Preconditioner, weighted_median
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.spec import Layout

CPU = torch.device("cpu")
LAYOUT = Layout((("embedding.weight", (300, 40)), ("layer.weight", (50, 60)), ("layer.bias", (60,))))


def folder(
    path: Path, squares: dict[str, torch.Tensor], betas: Any = (0.9, 0.99), steps: dict[str, float] | None = None
) -> str:
    """A policy folder with an optimizer state; betas: None writes no training.json, a text that text in its place."""
    (path / OPTIMIZER_STATE).parent.mkdir(parents=True)
    tensors = {f"exp_avg_sq/{name}": value for name, value in squares.items()}
    tensors |= {f"step/{name}": torch.tensor(value) for name, value in (steps or {}).items()}
    save_file(tensors, path / OPTIMIZER_STATE)
    if betas is not None:
        said = betas if isinstance(betas, str) else json.dumps({"betas": betas})
        (path / "training.json").write_text(said)
    return str(path)


def ordinary(seed: int = 0) -> dict[str, torch.Tensor]:
    """Second moments whose roots spread over two powers of ten, around 1e-4."""
    draw = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=draw).exp() * 1e-4) ** 2 for name, shape in LAYOUT.entries}


@pytest.mark.parametrize("share", [0.0, 0.04, 0.5, 0.95])
@pytest.mark.parametrize("residue", [0.0, 1e-10, 1e-7])
def test_residues_are_left_out_and_nothing_else(tmp_path: Path, share: float, residue: float) -> None:
    """However many of the embedding's rows training never met, which in a small model are most coordinates of all."""
    squares = ordinary()
    rows = int(share * 300)
    draw = torch.Generator().manual_seed(1)
    squares["embedding.weight"][:rows] = (residue * torch.rand(rows, 40, generator=draw)) ** 2
    scaling = Preconditioner(folder(tmp_path / "P", squares), LAYOUT, CPU)
    factors = {name: scaling.scale(name) for name, _ in LAYOUT.entries}
    left_out = factors["embedding.weight"].view(300, 40)[:rows]
    assert not left_out.any()
    kept = torch.cat([factors["embedding.weight"][rows * 40 :], factors["layer.weight"], factors["layer.bias"]])
    assert float((kept == 0).float().mean()) < 1e-3
    # a gradient of the same size everywhere: no coordinate makes up the norm
    metric = kept.double() ** 2
    assert float(metric.max() / metric.sum()) < 0.05


def test_the_factors_are_those_of_adams_step(tmp_path: Path) -> None:
    """1 / (sqrt(v / (1 - beta2^t)) + epsilon), t of each parameter by itself: experts are not trained in every step."""
    squares = ordinary()
    steps = {"embedding.weight": 30.0, "layer.weight": 4.0}  # and a bias whose count is missing
    scaling = Preconditioner(folder(tmp_path / "P", squares, steps=steps), LAYOUT, CPU)
    for name, _ in LAYOUT.entries:
        roots = squares[name].double().reshape(-1)
        if name in steps:
            roots = roots / (1 - 0.99 ** steps[name])
        roots = roots.sqrt()
        expected = torch.where(roots >= scaling.least, (1 / (roots + EPSILON)).sqrt(), 0.0)
        torch.testing.assert_close(scaling.scale(name).double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("betas", [None, "{", "[]", '{"betas": 3}', '{"betas": [0.9, 1.0]}', '{"betas": null}', "{}"])
def test_without_betas_nothing_is_corrected(tmp_path: Path, betas: str | None) -> None:
    """Folders of older versions, and of others, open as they always did."""
    squares = ordinary()
    made = folder(tmp_path / "P", squares, betas, {name: 3.0 for name, _ in LAYOUT.entries})
    assert adam_beta2(made) is None
    scaling = Preconditioner(made, LAYOUT, CPU)
    roots = squares["layer.bias"].sqrt()
    torch.testing.assert_close(
        scaling.scale("layer.bias"), torch.where(roots >= scaling.least, roots + EPSILON, torch.inf).rsqrt()
    )


def test_what_is_compared_between_means_and_stores_holds_all_that_decides(tmp_path: Path) -> None:
    one, other = (folder(tmp_path / str(beta), ordinary(), (0.9, beta)) for beta in (0.99, 0.999))
    assert len({metric_of(one, "a"), metric_of(one, "b"), metric_of(other, "a")}) == 3
    assert metric_of(one, "a") != "a"  # what older versions, with another rule, have written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.zero_(), "all zero"),
        (lambda v: v[:1].fill_(torch.nan), "not finite"),
        (lambda v: v[:1].fill_(-1.0), "not finite or negative"),
        (lambda v: v[:1].fill_(torch.inf), "not finite"),
    ],
)
def test_states_that_say_nothing_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    squares = ordinary()
    for value in squares.values():
        change(value)
    with pytest.raises(InputError, match=rf"optimizer\.safetensors: its second moments are .*{words}"):
        Preconditioner(folder(tmp_path / "P", squares), LAYOUT, CPU)


@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_median(seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = np.concatenate([np.exp(3 * draw.normal(size=2000)), 1e-9 * draw.random(3000), np.zeros(500)]).astype(
        np.float32
    )
    draw.shuffle(values)
    ordered = np.sort(values).astype(np.float64)
    exact = ordered[np.searchsorted(ordered.cumsum(), ordered.sum() / 2)]
    parts = torch.from_numpy(values).split(700)
    assert weighted_median(parts) == pytest.approx(exact, rel=0.01)
    assert weighted_median([torch.full((7,), 3e-5)]) == pytest.approx(3e-5, rel=0.01)
    assert LEAST < 1
