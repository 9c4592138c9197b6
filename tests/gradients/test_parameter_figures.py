"""The two forms of a linear layer's figures, and those of embeddings and their ties, against each prompt's gradient written out in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cropi_tools.gradients import parameter_figures
from cropi_tools.gradients.parameter_figures import crossed, dense_figures, figures_of
from cropi_tools.gradients.per_sample_rules import Rows, Rule, embedding, linear, transposed_linear

BOUNDS = {"even": [0, 6, 12, 18], "uneven": [0, 1, 9, 9, 18], "one": [0, 18]}
CPU = torch.device("cpu")


def expected(gradients: list[torch.Tensor], means: list[torch.Tensor | None]) -> torch.Tensor:
    flat = [gradient.double().flatten() for gradient in gradients]
    rows = [[g @ g, *(0.0 if mean is None else float(g @ mean.double()) for mean in means)] for g in flat]
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("rule", [linear, transposed_linear])
@pytest.mark.parametrize("forms", [False, True])
@pytest.mark.parametrize("block", [1, 20, 100, 1 << 18])
def test_both_forms_of_a_linear_layer(
    bounds: str, rule: Rule, forms: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fits into a block: a part of a line, some lines, some prompts, all of them."""
    monkeypatch.setattr(parameter_figures, "_forms", lambda *given: forms)
    monkeypatch.setattr(parameter_figures, "_BLOCK", block)
    torch.manual_seed(0)
    states, gradient = torch.randn(1, 18, 7), torch.randn(1, 18, 5)
    rows = Rows(BOUNDS[bounds], CPU)
    pairs = list(pairwise(rows.bounds))
    gradients = [gradient[0, start:end].double().T @ states[0, start:end].double() for start, end in pairs]
    if rule is transposed_linear:
        gradients = [g.T for g in gradients]
    means = [torch.randn(35), None, torch.randn(35)]
    parameter = torch.empty(gradients[0].shape)
    found = figures_of(rule, parameter, None, states, gradient, rows, means)
    torch.testing.assert_close(found, expected(gradients, means), rtol=1e-5, atol=1e-4)


def test_the_cheaper_form_is_taken() -> None:
    """Many tokens, or several means: what is formed once serves all of them. Few tokens in a wide layer: its gradient is never written."""
    wide, long = torch.empty(64, 2048), torch.empty(4096, 64)
    assert not parameter_figures._forms(wide, wide, Rows([0, 16, 32, 48, 64], CPU), 1)
    assert parameter_figures._forms(wide, wide, Rows([0, 64], CPU), 4)
    assert parameter_figures._forms(long, long, Rows([0, 2048, 4096], CPU), 1)


@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding_and_its_tie(padding: int | None) -> None:
    """The product of both parts is what the square of their sum has beside the squares of either."""
    torch.manual_seed(0)
    module = torch.nn.Embedding(8, 4, padding_idx=padding)
    ids = torch.randint(8, (1, 18))
    gradient = torch.randn(1, 18, 4)
    rows = Rows(BOUNDS["uneven"], CPU)
    whole = torch.empty(rows.prompts, 8, 4)
    embedding(module, ids, gradient, rows, whole, True)
    means = [torch.randn(32), None]
    found = figures_of(embedding, module.weight, module, ids, gradient, rows, means)
    torch.testing.assert_close(found, expected(list(whole), means), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, dense_figures(whole.flatten(1), means), rtol=1e-5, atol=1e-5)
    states, logits = torch.randn(5, 4), torch.randn(5, 8)
    tied = whole[1] + logits.T @ states
    each = parameter_figures.row_gradients(module, ids[:, 1:9], gradient[:, 1:9])
    squares = whole[1].square().sum() + (logits.T @ states).square().sum()
    product = crossed(logits[:, ids[0, 1:9]], states, each)
    torch.testing.assert_close((squares + 2 * product).float(), tied.square().sum())
