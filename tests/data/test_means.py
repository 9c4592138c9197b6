"""A mean gradient that is not what its header says is refused, by whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cropi_tools.data.means import check_whole, content_hash, read_facts, read_tensors, write_mean
from cropi_tools.runtime.errors import InputError

Tensors = dict[str, torch.Tensor]


def mean(path: Path, halves: bool = False) -> tuple[Tensors, Tensors, dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(3, 5, generator=draw) for name in ("a.weight", "b.weight")}
    half = {name: tensor * 2 for name, tensor in tensors.items()} if halves else {}
    facts: dict[str, Any] = {
        "norm": float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm()),
        "parameters": [[name, [3, 5]] for name in tensors],
        "content": content_hash(tensors, half),
        "prompts": 4,
    }
    if halves:
        facts["halves"] = {"prompts": [2, 2], "norms": [1.0, 1.0]}
    write_mean(path, tensors, facts, half)
    return tensors, half, facts


@pytest.mark.parametrize("halves", [False, True])
def test_a_whole_mean_passes(tmp_path: Path, halves: bool) -> None:
    mean(tmp_path / "m.safetensors", halves)
    check_whole(tmp_path / "m.safetensors", read_facts(tmp_path / "m.safetensors"))


def change_first(tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {name: change(tensor) if name == "a.weight" else tensor for name, tensor in tensors.items()}


DAMAGE: list[tuple[str, Callable[[Tensors], Tensors], str]] = [
    (
        "renamed",
        lambda t: {name.replace("a.", "c."): tensor for name, tensor in t.items()},
        "tensor a.weight is absent",
    ),
    ("left out", lambda t: {"b.weight": t["b.weight"]}, "tensor a.weight is absent"),
    (
        "one more",
        lambda t: {**t, "c.weight": t["a.weight"].clone()},
        "tensor c.weight is float32 .*, its header says absent",
    ),
    ("integers", lambda t: change_first(t, lambda x: x.to(torch.int32)), r"tensor a.weight is int32 \[3, 5\]"),
    ("half precision", lambda t: change_first(t, lambda x: x.half()), "tensor a.weight is float16"),
    ("another shape", lambda t: change_first(t, lambda x: x.T.contiguous()), r"tensor a.weight is float32 \[5, 3\]"),
    ("zero", lambda t: change_first(t, torch.zeros_like), "not those that were written"),
    ("NaN", lambda t: change_first(t, lambda x: x * float("nan")), "not those that were written"),
    ("one bit", lambda t: change_first(t, lambda x: x.nextafter(torch.tensor(9.0))), "not those that were written"),
    ("swapped", lambda t: {"a.weight": t["b.weight"], "b.weight": t["a.weight"]}, "not those that were written"),
]


@pytest.mark.parametrize(("change", "said"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
@pytest.mark.parametrize("where", ["whole", "half"])
def test_damaged_tensors(tmp_path: Path, change: Callable[[Tensors], Tensors], said: str, where: str) -> None:
    path = tmp_path / "m.safetensors"
    tensors, half, facts = mean(path, halves=True)
    write_mean(path, change(tensors) if where == "whole" else tensors, facts, change(half) if where == "half" else half)
    with pytest.raises(InputError, match=said) as caught:
        check_whole(path, read_facts(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", [0.0, -1.0, "1", None, True, [1.0]])
def test_norms_that_are_no_positive_numbers(tmp_path: Path, norm: object) -> None:
    path = tmp_path / "m.safetensors"
    tensors, _, facts = mean(path)
    write_mean(path, tensors, {**facts, "norm": norm})
    with pytest.raises(InputError, match="no positive number"):
        check_whole(path, read_facts(path))
    assert read_tensors(path).keys() == tensors.keys()
