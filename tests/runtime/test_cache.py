"""What is kept between commands: read as it was written or not at all, and never an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cropi_tools.runtime import cache
from cropi_tools.runtime.cache import cache_folder, keep, kept


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cropi-tools"


def test_what_is_kept_is_found(folder: Path) -> None:
    assert kept("one") is None
    for content in (b"", b"first", b"second" * 1000):
        keep("one", content)
        assert kept("one") == content
    assert [path.name for path in folder.iterdir()] == ["one"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "one").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("harm", ["", "cut", "short", "flip first", "flip last", "more"])
def test_what_is_damaged_is_not_read(folder: Path, harm: str) -> None:
    keep("one", b"content")
    path = folder / "one"
    found = path.read_bytes()
    changed = {
        "": b"",
        "cut": found[:-1],
        "short": found[:20],
        "flip first": bytes([found[0] ^ 1]) + found[1:],
        "flip last": found[:-1] + bytes([found[-1] ^ 1]),
        "more": found + b"\0",
    }[harm]
    path.write_bytes(changed)
    assert kept("one") is None
    keep("one", b"content")
    assert kept("one") == b"content"


def test_what_others_can_write_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep("one", b"content")
    (folder / "one").chmod(0o620)
    assert kept("one") is None
    keep("one", b"content")
    monkeypatch.setattr(os, "geteuid", lambda: (folder / "one").stat().st_uid + 1)
    assert kept("one") is None


def test_without_a_folder_nothing_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, one in the place of its parent, a folder in the place of the file; no home at all."""
    folder.parent.mkdir()
    folder.write_text("")
    keep("one", b"content")
    assert kept("one") is None
    folder.unlink()
    (folder / "one").mkdir(parents=True)
    keep("one", b"content")
    assert kept("one") is None
    assert [path.name for path in folder.iterdir()] == ["one"]  # and nothing unfinished
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    keep("one", b"content")
    assert kept("one") is None
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for base in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert cache_folder() is None
        keep("one", b"content")
        assert kept("one") is None


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    keep("one", b"content")
    assert list(folder.iterdir()) == []


def test_the_oldest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 3)
    for number in range(5):
        keep(str(number), b"content")
        os.utime(folder / str(number), (number, number))
    keep("new", b"content")
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4", "new"]


def test_a_kill_leaves_what_was_there_before(folder: Path) -> None:
    """A process writes the same name again and again, in turn one content and another, and is killed at any moment."""
    program = """
import sys
from cropi_tools.runtime.cache import keep
for number in range(10**9):
    keep("one", bytes([number % 2]) * 1_000_000)
    if number == 1:
        print("ready", flush=True)
"""
    for wait in (0.0, 0.003, 0.011):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = kept("one")
        assert found is not None
        assert found in (b"\0" * 1_000_000, b"\1" * 1_000_000)
