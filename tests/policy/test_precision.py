"""Weights of 16 bits that lost what a stage of training changed are noticed wherever a policy is loaded; float32 and large steps are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import manifests
import pytest
import tiny_policy
import torch
from safetensors.torch import load_file, save_file

from cropi_tools.policy import precision
from cropi_tools.policy.loading import load_policy
from cropi_tools.policy.precision import lost_updates


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A policy as they come: its weights are bfloat16 numbers."""
    folder = tiny_policy.save(tmp_path / "P0", scale=0.02)
    rewrite(folder, lambda value: value.to(torch.bfloat16))
    return folder


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "model.safetensors"
    save_file({name: change(value) for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def trained(parent: Path, folder: Path, step: float, steps: int = 10) -> Path:
    """What AdamW leaves of `steps` updates of size `step`: a policy in float32 with a manifest that names its parent."""
    shutil.copytree(parent, folder)
    generator = torch.Generator().manual_seed(0)

    def moved(value: torch.Tensor) -> torch.Tensor:
        signs = torch.randn(value.shape, generator=generator).sign()
        return value.float() + step * steps * signs * torch.rand(value.shape, generator=generator)

    rewrite(folder, moved)
    inputs = {"policy": {"path": str(parent), "sha256": "0"}}
    (folder / "manifest.json").write_text(json.dumps(manifests.manifest("cropi-train", inputs=inputs)))
    return folder


def warnings_of(folder: Path, capsys: pytest.CaptureFixture[str], dtype: str = "auto") -> list[str]:
    precision._looked_at.clear()
    capsys.readouterr()
    load_policy(str(folder), "cpu", dtype)
    load_policy(str(folder), "cpu", dtype)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_small_updates_are_lost_in_bfloat16_and_kept_in_float32(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = trained(parent, tmp_path / "P1", 1e-6)
    assert warnings_of(parent, capsys) == warnings_of(parent, capsys, "bfloat16") == []
    assert warnings_of(small, capsys) == []
    (loaded,) = warnings_of(small, capsys, "bfloat16")  # once, though it was loaded twice
    assert "P1: 9" in loaded
    assert "bfloat16 cannot hold such small updates; give --dtype float32" in loaded
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        half = shutil.copytree(small, tmp_path / name)
        rewrite(half, lambda value, dtype=dtype: value.to(dtype))
        found = lost_updates(half, parent, torch.float32)
        assert found is not None
        assert (found.share > precision.LIMIT) == bool(warnings_of(half, capsys))
    (stored,) = warnings_of(tmp_path / "bfloat16", capsys)
    assert "keep it in float32 between stages" in stored


def test_the_share_is_what_rounding_took_back(parent: Path, tmp_path: Path) -> None:
    small = trained(parent, tmp_path / "P1", 1e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (parent, small))
    names = [name for name in after if "layers" in name and after[name].ndim > 1]
    same = [(after[name].bfloat16() == before[name].bfloat16()).float().mean() for name in names]
    found = lost_updates(small, parent, torch.bfloat16)
    assert found is not None
    assert found.share == pytest.approx(float(torch.stack(same).mean()), abs=0.02)
    assert lost_updates(small, parent, torch.float32) is None


def test_large_updates_are_kept_in_either(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = trained(parent, tmp_path / "P1", 1e-3)
    assert warnings_of(large, capsys, "bfloat16") == []
    rewrite(large, lambda value: value.to(torch.bfloat16))
    assert warnings_of(large, capsys) == []


def test_without_its_parent_the_learning_rate_tells(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for rate in (1e-6, 1e-3):
        policy = trained(parent, tmp_path / f"P{rate}", rate)
        manifest = json.loads((policy / "manifest.json").read_text())
        (policy / "manifest.json").write_text(json.dumps({**manifest, "options": {"learning_rate": rate, "steps": 10}}))
        found[rate] = lost_updates(policy, parent, torch.bfloat16)
    shutil.rmtree(parent)
    for rate, measured in found.items():
        assert measured is not None
        policy = tmp_path / f"P{rate}"
        assert bool(warnings_of(policy, capsys, "bfloat16")) == (rate == 1e-6)
        assert warnings_of(policy, capsys) == []
        estimated = lost_updates(policy, parent, torch.bfloat16, 10 * rate)
        assert estimated is not None
        assert estimated.share <= measured.share + 0.02, "no more is told than is sure"
    (policy / "manifest.json").write_text(json.dumps(manifests.manifest("cropi-rollout")))
    assert warnings_of(policy, capsys, "bfloat16") == []
