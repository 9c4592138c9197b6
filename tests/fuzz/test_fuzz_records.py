"""Whatever is in a record, a command ends with exit code 0, 1 or 2, and an error is one line that names the file (or the prompt)."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import in_process
import pytest
import targets
from targets import TARGETS, Target

sys.path += [str(Path(__file__).parents[1] / name) for name in ("influence", "report")]  # stores and runs made in code


@pytest.fixture(scope="module")
def place(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    targets.lay_out(folder, policy_folder)
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is the same for every record (loading the policy, its hash, manifests' versions) is done once."""
    yield


def runs(target: Target, place: Path, count: int, seed: int) -> list[str]:
    """Spoil the target's file `count` times; what was wrong with how the command ended, of each run that ended wrong."""
    path, found = place / target.file, []
    good = path.read_bytes() if path.exists() else None
    words = [*target.words.split(), "--quiet", *(["-o", target.output] if target.output else [])]
    for number in range(count):
        draw = random.Random(f"{seed} {target.name} {number}")
        try:
            (target.spoil or targets.spoil_line)(path, draw)
            held = path.read_bytes()
            ended = in_process.call(words, place)
        finally:
            path.unlink(missing_ok=True)
            if good is not None:
                path.write_bytes(good)
            targets.remove_output(place, target.output)
        wrong = in_process.complaint(ended, words, (path.name, path.parent.name))
        if wrong:
            found.append(f"{target.name}, seed {seed}, run {number}: {held[:3000]!r}\n{wrong}")
    return found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_few(target: Target, place: Path) -> None:
    assert not runs(target, place, 3, 0)
