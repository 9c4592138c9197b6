"""Fixtures shared by all tests: a tiny policy on disk, prompts, and a way to run the commands as a shell does."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cropi_tools import runtime

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def not_quiet() -> Iterator[None]:
    """What a command called in this process left: others count on messages."""
    yield
    runtime.set_quiet(False)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 policy with tied embeddings."""
    import tiny_policy

    return tiny_policy.save(tmp_path_factory.mktemp("policies") / "P0")


# the shape of Qwen's template; the tiny vocabulary has no line breaks
TEMPLATE = (
    "{% for m in messages %}<|pad|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant {% endif %}"
)


@pytest.fixture(scope="session")
def chat_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with a chat template."""
    import tiny_policy

    folder = tiny_policy.save(tmp_path_factory.mktemp("policies") / "chat")
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_policy() -> Path:
    """A real chat model, SmolLM2-135M-Instruct; for slow tests. Without it they fail: nothing else here is like it."""
    import smollm2

    return smollm2.folder()


@pytest.fixture(scope="session")
def trainer_class() -> Any:
    """TRL's GRPOTrainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL's own imports
        from trl import GRPOTrainer
    return GRPOTrainer


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line in the test's folder; fails the test unless the exit code is `code`."""

    def call(*words: object, code: int = 0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / str(words[0])
        done = subprocess.run(
            [str(program), *map(str, words[1:])], cwd=tmp_path, input=stdin, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call
