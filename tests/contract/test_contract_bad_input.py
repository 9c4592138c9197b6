"""Bad input: one line that says what is wrong, where, and what to do; exit 1, and nothing that looks like a result."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_inputs import BROKEN, Broken, line, row
from command_table import leftovers, looks_whole
from shell import Shell


@pytest.fixture(scope="module")
def strangers(chain: Path, shell: Shell) -> Path:
    """Stores that do not go with those of the chain: of a smaller dimension, and of another policy."""
    shell(["cropi-project", "raw.zarr", "--dim", "128", "-o", "small.zarr"], chain)
    words = row("grad-raw").replace("P0", "other").replace("--sketch none", "--dim 1048576 --limit 4")
    shell([*words.split(), "-o", "stranger.zarr"], chain)
    return chain


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_bad_input(broken: Broken, strangers: Path, place: Path, shell: Shell) -> None:
    broken.harm(place)
    words = [
        *broken.words.split(),
        "--quiet",
        "-o",
        "result.jsonl.gz" if broken.words.startswith("cropi-rollout") else "result",
    ]
    done = shell(words, place, code=None)
    assert (done.code, "Traceback" in done.stderr) == (broken.code, False), done.stderr
    assert done.stdout == ""
    if broken.code == 2:
        assert done.errors.pop().startswith("try 'cropi-") or "Usage" in done.stderr
        assert "\n".join(done.errors).count("Error") <= 1
    else:
        assert len(done.errors) == 1, done.stderr
        assert done.errors[0].startswith(f"{words[0]}: ")
    for part in broken.says:
        assert part in done.stderr
    output = place / words[-1]
    assert looks_whole(output) == []
    assert leftovers(output) == [], "a command that failed before its first commit leaves nothing"


def test_a_repaired_input_is_taken(place: Path, shell: Shell) -> None:
    """A failure must not stand in the way of the next try with the mended file."""
    prompts = place / "prompts.jsonl"
    good = prompts.resolve()
    line("prompts.jsonl", 3, "{")(place)
    words = [*row("rollout").split(), "-o", "mine.jsonl"]
    shell(words, place, code=1)
    prompts.unlink()
    prompts.symlink_to(good)
    shell(words, place)
    assert (place / "mine.jsonl").read_bytes() == (place / "rollouts.jsonl").read_bytes()
