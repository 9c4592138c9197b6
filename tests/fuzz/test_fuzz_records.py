"""Whatever is in a record, a command ends with exit code 0, 1 or 2, and an error is one line that names the file (or the prompt).

A line, a table or a JSON file is spoilt by a generator that follows from a seed (`record_mutations.py`), and a command runs on it in this
process
(`targets.py`). Other seeds: `FUZZ_SEED=7 pytest tests/fuzz`.
"""

from __future__ import annotations

import os
import random
import sys
from functools import cache
from pathlib import Path

import in_process
import pytest
import targets
import typer
from readers import READERS, Reader
from targets import METADATA, TARGETS, Target

from cropi_tools.prompts import recipes
from cropi_tools.runtime.errors import CropiError

sys.path.append(str(Path(__file__).parents[1] / "report"))  # runs made in code

SEED = int(os.environ.get("FUZZ_SEED", "0"))
# what a command that fails has open is closed by the end of its process
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
FEW, MANY, MANY_HEAVY = 4, 260, 60


@pytest.fixture(scope="module")
def place(policy_folder: Path, chat_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    targets.lay_out(folder, policy_folder, chat_policy)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What says nothing of records takes no time: the disk's, and typer's, which reads a command's options anew at every call.

    A recipe that was read and checked may ask for any number of items, each of any size: here none is made.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(typer.main, "get_command", cache(typer.main.get_command))
    monkeypatch.setattr(
        recipes, "_items", lambda make, size: [(make(1), {"question": "q", "answer": "4", "metadata": {}})]
    )


def harmed(path: Path, spoil: targets.Spoil, draw: random.Random) -> tuple[bytes | None, bytes]:
    """Spoil a file; what it was, and what it is."""
    good = path.read_bytes() if path.exists() else None
    spoil(path, draw)
    return good, path.read_bytes()


def restore(path: Path, good: bytes | None) -> None:
    path.unlink()
    if good is not None:
        path.write_bytes(good)


def runs(target: Target, place: Path, count: int, seed: int) -> list[str]:
    """Spoil the target's file `count` times; what was wrong with how the command ended, of each run that ended wrong."""
    path, found = place / target.file, []
    words = [*target.words.split(), "--quiet", *(["-o", target.output] if target.output else [])]
    for number in range(count):
        good, held = harmed(path, target.spoil, random.Random(f"{seed} {target.name} {number}"))
        try:
            ended = in_process.call(words, place)
        finally:
            restore(path, good)
            targets.remove_output(place, target.output)
        wrong = in_process.complaint(ended, words, (path.name, path.parent.name))
        if wrong:
            found.append(f"{target.name}, seed {seed}, run {number}: {held[:3000]!r}\n{wrong}")
    return found


def readings(reader: Reader, place: Path, count: int, seed: int) -> None:
    """Spoil the reader's file `count` times; it may raise nothing but one line that names the file or the prompt."""
    path = place / reader.file
    for number in range(count):
        good, held = harmed(path, targets.spoil_line, random.Random(f"{seed} {reader.name} {number}"))
        try:
            reader.read(place)
            said = None
        except CropiError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{reader.name}, seed {seed}, run {number}: {held[:3000]!r}") from error
        finally:
            restore(path, good)
        assert said is None or path.name in said or "prompt '" in said, (said, held[:3000])


@pytest.mark.parametrize("target", [target for target in TARGETS if not target.heavy], ids=lambda target: target.name)
def test_a_few(target: Target, place: Path) -> None:
    assert not runs(target, place, FEW, SEED)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_few_for_readers(reader: Reader, place: Path) -> None:
    readings(reader, place, FEW, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many(target: Target, place: Path) -> None:
    assert not runs(target, place, MANY_HEAVY if target.heavy else MANY, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_many_for_readers(reader: Reader, place: Path) -> None:
    readings(reader, place, MANY, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("target", METADATA, ids=lambda target: target.name)
def test_metadata(target: Target, place: Path) -> None:
    assert not runs(target, place, MANY_HEAVY, SEED)


def test_good_files_are_taken(place: Path) -> None:
    """What is spoilt is good before: else a run would say nothing."""
    for target in (*TARGETS, *METADATA):
        if (place / target.file).exists() and not target.heavy:
            words = [*target.words.split(), "--quiet", *(["-o", target.output] if target.output else [])]
            ended = in_process.call(words, place)
            targets.remove_output(place, target.output)
            assert (ended.code, ended.trace) == (0, ""), (target.name, ended)
