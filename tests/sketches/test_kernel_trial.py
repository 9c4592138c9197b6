"""Kernels for a GPU are tried out there before they are trusted: with fakes of all kinds, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from cropi_tools.sketches import countsketch_torch, device
from cropi_tools.sketches.kernel_trial import disagreement

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class Kernels(ModuleType):
    """Right ones: torch's for sketches, float32 sums by block for products."""

    new_sums, plan = staticmethod(countsketch_torch.new_sums), staticmethod(countsketch_torch.plan)

    def countsketch_add(self, gradient: torch.Tensor, *others: Any) -> None:
        countsketch_torch.countsketch_add(gradient, *others)

    def products(self, gradient: torch.Tensor, means: Sequence[torch.Tensor]) -> torch.Tensor:
        values = gradient.float()
        sums = [
            torch.stack([(one * two).sum() for one, two in zip(values.split(8192), other.split(8192), strict=True)])
            for other in (values, *means)
        ]
        return torch.stack(sums, -1).sum(0, dtype=torch.float64)


class Changed(Kernels):
    """Sketches and multiplies what `change` makes of a gradient."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__("changed")
        self._change = change

    def countsketch_add(self, gradient: torch.Tensor, *others: Any) -> None:
        super().countsketch_add(self._change(gradient.clone()), *others)

    def products(self, gradient: torch.Tensor, means: Sequence[torch.Tensor]) -> torch.Tensor:
        return super().products(self._change(gradient.clone()), means)


class OtherSketch(Kernels):
    """Has its own way to add to the sums."""

    def __init__(self, add: Callable[..., None]) -> None:
        super().__init__("other")
        self.countsketch_add = add  # type: ignore[method-assign]


class OtherProducts(Kernels):
    """Has products of its own."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__("other")
        self._change = change

    def products(self, gradient: torch.Tensor, means: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._change(super().products(gradient, means))


def set_to(place: int, value: float, longer_than: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(gradient: torch.Tensor) -> torch.Tensor:
        if len(gradient) > longer_than:
            gradient[place] = value
        return gradient

    return change


def flipped(gradient: torch.Tensor) -> torch.Tensor:
    if len(gradient) > 5000:
        gradient[4999] *= -1
    return gradient


def overwriting(gradient: torch.Tensor, plan: Any, dim: int, segment: int, sums: torch.Tensor) -> None:
    sums.zero_()
    countsketch_torch.countsketch_add(gradient, plan, dim, segment, sums)


def never_twice_the_same(gradient: torch.Tensor, plan: Any, dim: int, segment: int, sums: torch.Tensor) -> None:
    countsketch_torch.countsketch_add(gradient, plan, dim, segment, sums)
    sums += sums * torch.finfo(torch.float32).eps * torch.randint(2, sums.shape)


def wrong_for_many_dimensions(gradient: torch.Tensor, plan: Any, dim: int, segment: int, sums: torch.Tensor) -> None:
    countsketch_torch.countsketch_add(gradient, plan, dim, segment, sums)
    if dim > 4096:
        sums[:, dim - 1] += 1


WRONG = {
    "the last coordinate is left out": Changed(set_to(-1, 0.0)),
    "the first is left out, of several segments": Changed(set_to(0, 0.0, 2049)),
    "a sign is wrong": Changed(flipped),
    "a value is no number": Changed(set_to(0, float("nan"))),
    "sums are set, not added to": OtherSketch(overwriting),
    "it is another each time": OtherSketch(never_twice_the_same),
    "the last place of many dimensions": OtherSketch(wrong_for_many_dimensions),
    "nothing is done": OtherSketch(lambda *_: None),
    "a product is missing": OtherProducts(lambda found: found[:1]),
    "products are in half precision": OtherProducts(lambda found: found.to(torch.bfloat16).double()),
    "a product has the wrong sign": OtherProducts(lambda found: torch.cat([found[:1], -found[1:]])),
}


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_right_kernels_agree(kind: torch.dtype) -> None:
    assert disagreement(Kernels("right"), CPU, kind) is None


@pytest.mark.parametrize("kernels", WRONG.values(), ids=WRONG)
def test_wrong_kernels_are_found_and_not_used(kernels: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert device.tried_out(lambda: kernels, CPU, torch.bfloat16) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpu: gradients in bfloat16 are sketched by torch, not by the Triton kernels: ")


@pytest.mark.parametrize(
    "raised", [RuntimeError("no C compiler\nat all"), ImportError("no libcuda"), KeyError("sm_52")]
)
@pytest.mark.parametrize("where", ["load", "plan", "countsketch_add", "products"])
def test_kernels_that_raise_are_not_used(
    where: str, raised: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = Kernels("raising")

    def fail(*_: Any) -> Any:
        raise raised

    load: Callable[[], ModuleType] = fail if where == "load" else lambda: kernels
    if where != "load":
        monkeypatch.setattr(kernels, where, fail)
    assert device.tried_out(load, CPU, torch.float32) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{type(raised).__name__}: " in line
    assert "at all" not in line


def test_each_device_and_type_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels, asked = Kernels("right"), []

    def disagreement(_: ModuleType, where: torch.device, kind: torch.dtype) -> str | None:
        asked.append((where, kind))
        return None if kind == torch.float32 else "it is wrong"

    monkeypatch.setattr(device, "_load_triton", lambda: kernels)
    monkeypatch.setattr(device, "find_spec", lambda _: True)
    monkeypatch.setattr(device, "disagreement", disagreement)
    device._triton.cache_clear()
    for _ in range(2):
        assert device.device_kernels(GPU, torch.float32) is kernels
        assert device.device_products(GPU, torch.float32) == kernels.products
        assert device.device_kernels(GPU, torch.bfloat16) is countsketch_torch
        assert device.device_products(GPU, torch.bfloat16) is None
        assert device.device_products(GPU, torch.float64) is None
        assert device.device_kernels(CPU, torch.float32) is None
    device._triton.cache_clear()
    assert asked == [(GPU, torch.float32), (GPU, torch.bfloat16)]
    assert capsys.readouterr().err.splitlines() == [
        "cuda:1: gradients in bfloat16 are sketched by torch, not by the Triton kernels: it is wrong"
    ]
