"""The reward that verl's processes compute with our verifiers: from many threads, for every kind of record, and when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
from training_runs import options

from cropi_tools.prompts.exports import to_verl
from cropi_tools.rewards import allow_files
from cropi_tools.runtime.errors import InputError
from cropi_tools.verl_backend.config import REWARD_FILE
from cropi_tools.verl_backend.data import copy_package, prepare
from cropi_tools.verl_backend.reward import Scorer

OWN = """
import time

def reward(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "hang":
        time.sleep(60)
    if solution_str == "break":
        raise ValueError("no such thing")
    time.sleep(0.01)
    return float(solution_str) / 100
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:reward"


def asked(score: Scorer, text: str, **changed: Any) -> dict[str, float]:
    """The score of a response, asked for as verl asks."""
    row = to_verl({"id": "a", "prompt": "?", "answer": "7", "source": "s"})
    row["extra_info"] |= changed
    return score(
        data_source=row["data_source"],
        solution_str=text,
        ground_truth=row["reward_model"]["ground_truth"],
        extra_info=row["extra_info"],
    )


def test_many_threads_get_their_own_rewards(own: str, tmp_path: Path) -> None:
    """As verl's executor calls it. One that hangs costs its own time; the others go on beside it."""
    texts = ["hang", *map(str, range(60))]
    with closing(Scorer(own, 1.0, str(tmp_path / "failed"))) as score, ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda text: asked(score, text), texts))
    assert found[0] == {"score": 0.0, "acc": 0.0}
    assert [one["score"] for one in found[1:]] == [number / 100 for number in range(60)]
    assert not (tmp_path / "failed").exists()


def test_the_records_verifier_and_open_reasoning_count(tmp_path: Path) -> None:
    thinking = "perhaps \\boxed{7}"
    with closing(Scorer(None, 5.0, str(tmp_path / "failed"))) as score:
        assert asked(score, "so \\boxed{7}") == {"score": 1.0, "acc": 1.0}
        assert asked(score, "so \\boxed{7}", verifier="exact") == {"score": 0.0, "acc": 0.0}
        assert asked(score, "7", verifier="exact") == {"score": 1.0, "acc": 1.0}
        # the prompt opened the reasoning, and nothing closed it
        assert asked(score, thinking, reasoning_open=True)["score"] == 0.0
        assert asked(score, f"{thinking}</think>\\boxed{{7}}", reasoning_open=True)["score"] == 1.0
    with closing(Scorer("maths", 5.0, str(tmp_path / "failed"))) as score:
        assert asked(score, "so \\boxed{7}", verifier="exact") == {"score": 1.0, "acc": 1.0}


@pytest.mark.parametrize("chosen", [None, "exact"])
def test_programs_of_records_are_allowed_where_none_is_chosen(own: str, tmp_path: Path, chosen: str | None) -> None:
    record = {"id": "a", "prompt": "?", "answer": "7", "source": "s", "verifier": own}
    allow_files([own.rpartition(":")[0]])
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prepare(tmp_path / "work", options(verifier=chosen, verify_seconds=5.0), [record], {}, tokenizer)
    text = (tmp_path / "work" / REWARD_FILE).read_text()
    assert f"Scorer({chosen!r}, " in text
    assert f"programs={[] if chosen else [own.rpartition(':')[0]]}" in text


def test_partial_credit_is_told_to_verl(tmp_path: Path) -> None:
    source = {"dataset": "spell_backward", "entry": {"question": "?", "answer": "abcde", "metadata": {}}}
    extra = json.dumps({"reasoning_gym": source})
    rewards = []
    for partial in (False, True):
        scorer = Scorer(None, 5.0, str(tmp_path / "failed"), partial_credit=partial)
        with closing(scorer) as score:
            rewards.append(
                [asked(score, text, verifier="reasoning-gym", extra=extra)["score"] for text in ("abcdz", "abcde")]
            )
    assert rewards == [[0.0, 1.0], [pytest.approx(0.8), 1.0]]
    prepare(tmp_path / "work", options(verifier="reasoning-gym", partial_credit=True), [], {}, None)
    assert "partial_credit=True" in (tmp_path / "work" / REWARD_FILE).read_text()


def test_a_failure_is_told(own: str, tmp_path: Path) -> None:
    with (
        closing(Scorer(own, 5.0, str(tmp_path / "failed"))) as score,
        pytest.raises(InputError, match="no such thing"),
    ):
        asked(score, "break")
    told = (tmp_path / "failed").read_text()
    assert "own.py:reward, prompt 'a'" in told
    assert "no such thing" in told


def test_the_copied_package_needs_nothing_else(own: str, tmp_path: Path) -> None:
    """An environment without any package of ours grades by it, workers too."""
    copy_package(tmp_path / "packages")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "packages")!r})
from cropi_tools.verl_backend.reward import Scorer
score = Scorer({own!r}, 5.0, {str(tmp_path / "failed")!r})
print(score("s", "50", "7", {{"index": "a"}}), sys.modules["cropi_tools"].__file__)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, env={}, cwd=tmp_path, timeout=60
    )
    assert done.stdout.split("} ")[0] == "{'score': 0.5, 'acc': 0.0", done.stderr
    assert str(tmp_path / "packages") in done.stdout
