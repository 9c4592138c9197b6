"""A policy that vLLM can run, with a generation_config.json that would change everything, and one engine a test module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

ENDS = [1, 40]


def save_policy(folder: Path, **settings: Any) -> Path:
    """Heads of 32, which vLLM's kernels need; moderate logits, so that rounding is that of an ordinary model."""
    tiny_policy.save(folder, width=128, scale=0.1, **settings)
    silent = {"top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0, "min_p": 0.9, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS, "pad_token_id": 0, **silent}))
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("vllm") / "tied")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("vllm") / "untied", tie=False, seed=1)


@pytest.fixture(scope="module")
def engine_on() -> Iterator[Any]:
    """Opens engines, one at a time in a process, and closes the last with the module."""
    from cropi_tools.engines.vllm_engine import VllmEngine
    from cropi_tools.policy.tokens import load_tokens

    opened: list[VllmEngine] = []

    def open_on(folder: Path) -> VllmEngine:
        opened.append(VllmEngine(str(folder), load_tokens(str(folder))))
        return opened[-1]

    yield open_on
    for engine in opened:
        engine.close()
