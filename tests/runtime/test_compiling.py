"""Kernels keep what numba compiled: the same code, under a name that all that decides it makes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import prange

from cropi_tools.runtime import clock, compiling
from cropi_tools.runtime.compiling import kernel

PACKAGE = Path(compiling.__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cropi-tools"


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The functions that numba compiles meanwhile."""
    found: list[str] = []

    class Listener(numba.core.event.Listener):  # type: ignore[misc,unused-ignore]
        def on_start(self, event: Any) -> None:
            found.append(event.data["dispatcher"].py_func.__name__)

        def on_end(self, event: Any) -> None: ...

    with numba.core.event.install_listener("numba:compile", Listener()):
        yield found


def inner(x: Any) -> Any:
    return x + 1


made = kernel(inner)


def outer(values: Any) -> Any:
    total = 0.0
    for value in values:
        total += made(value)
    return total


def spread(values: Any) -> None:
    for place in prange(len(values)):
        values[place] = place


def test_the_second_process_compiles_nothing(folder: Path, compiled: list[str]) -> None:
    """A kernel made of the same function again stands for that of another process."""
    assert kernel(outer)(np.ones(3)) == 6
    assert compiled.pop(0) == "outer"  # and with it what it calls
    before = len(compiled)
    assert kernel(outer)(np.ones(3)) == 6
    assert len(compiled) == before
    assert kernel(outer)(np.ones(3, np.float32)) == 6
    assert "outer" in compiled[before:]  # another type is other code


def test_options_and_settings_are_other_code(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of numba takes serial code for parallel code."""
    for options in ({}, {"parallel": True}, {"fastmath": {"nnan"}}, {"fastmath": {"nsz", "nnan"}}):
        kernel(spread, **options)(np.ones(3))
    for setting, value in (("OPT", 1), ("BOUNDSCHECK", 1)):
        monkeypatch.setattr(numba.core.config, setting, value)
        kernel(spread)(np.ones(3))
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    assert compiled.count("spread") == 6
    assert len([path for path in folder.iterdir() if path.name.startswith("kernel-spread-")]) == 6
    kernel(spread, parallel=True)(np.ones(3))
    assert compiled.count("spread") == 6


@pytest.mark.parametrize("what", ["sources", "numba", "numpy"])
def test_another_version_is_other_code(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kernel(spread)(np.ones(3))
    if what == "sources":
        monkeypatch.setattr(compiling, "_sources", lambda folder: "other")
    else:
        monkeypatch.setattr(sys.modules[what], "__version__", "0.0")
    kernel(spread)(np.ones(3))
    assert compiled == ["spread"] * 2


def test_sources_are_all_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("A = 1\n")
    first = compiling._sources.__wrapped__(tmp_path)
    (tmp_path / "b.py").write_text("B = 1\n")
    second = compiling._sources.__wrapped__(tmp_path)
    (tmp_path / "b.py").write_text("B = 2\n")
    assert len({first, second, compiling._sources.__wrapped__(tmp_path)}) == 3


def test_without_sources_nothing_is_kept(folder: Path, compiled: list[str]) -> None:
    """In an archive, or where only what Python compiled is installed: they could have been any."""
    names: dict[str, Any] = {}
    exec(compile("def spread(values):\n    values[0] = 1.0\n", "archive.zip/kernels.py", "exec"), names)
    for _ in range(2):
        kernel(names["spread"])(np.ones(3))
    assert compiled == ["spread"] * 2
    assert not folder.exists()


def test_kernels_take_nothing_from_other_folders() -> None:
    """Their names say nothing of files elsewhere."""
    files = [path for path in PACKAGE.rglob("*.py") if "import kernel" in path.read_text()]
    assert len(files) == 3
    for path in files:
        own = f"cropi_tools.{path.parent.name}"
        taken = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        ours = {str(name) for name in taken if str(name).startswith("cropi_tools")}
        assert {name for name in ours if not name.startswith(own)} == {"cropi_tools.runtime.compiling"}


def test_nobody_compiles_past_the_cache() -> None:
    wrong = [path for path in PACKAGE.rglob("*.py") if "njit" in path.read_text() and path.name != "compiling.py"]
    assert wrong == []


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", b"cno_such_module\nname\n.", b"N.", b"(K\x01K\x02t."])
def test_what_cannot_be_read_is_compiled_again(folder: Path, compiled: list[str], content: bytes) -> None:
    kernel(spread)(np.ones(3))
    (path,) = folder.iterdir()
    compiling.keep(path.name, content)
    kernel(spread)(np.ones(3))
    kernel(spread)(np.ones(3))
    assert compiled == ["spread"] * 2


def test_without_a_cache_kernels_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert kernel(outer)(np.ones(3)) == 6


def test_reading_code_is_start(folder: Path) -> None:
    kernel(spread)(np.ones(3))
    again = kernel(spread)
    slow = compiling.kept

    def late(name: str) -> bytes | None:
        import time

        time.sleep(0.05)
        return slow(name)

    compiling.kept = late  # type: ignore[assignment]
    try:
        before = clock._started_for()
        again(np.ones(3))
    finally:
        compiling.kept = slow
    assert clock._started_for() - before >= 0.05


SKETCH = """
import sys
import numpy as np
from cropi_tools.sketches import countsketch_numba, sparse_numba
from cropi_tools.scores import row_products_numba
bits = np.random.default_rng(0).normal(size=5000).astype(np.float32).view(np.uint32)
for size in (1 << 30, 1):
    countsketch_numba.PARALLEL_FROM = size
    for add, words in (
        (countsketch_numba.countsketch_add, (1024, 64, np.zeros((8, 1088), np.float32))),
        (sparse_numba.sparse_jl_add, (np.uint64(2**62), np.zeros((8, 1024), np.float32))),
    ):
        add(bits, np.uint64(7), *words)
        sys.stdout.buffer.write(words[-1].tobytes())
out = np.zeros((50, 4), np.float32)
row_products_numba.few_products(bits.view(np.uint16).reshape(50, 200) & 0x3FFF, bits[:800].view(np.float32).reshape(4, 200), out)
sys.stdout.buffer.write(out.tobytes())
"""


@pytest.mark.slow
def test_all_kernels_in_processes_of_their_own(tmp_path: Path) -> None:
    """Two begin at once without a cache, one is killed meanwhile; then one with it, one that cannot write: all with the same bytes."""

    def start(cache: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        return subprocess.Popen([sys.executable, "-c", SKETCH], stdout=subprocess.PIPE, env=environment)

    cache = str(tmp_path / "cache")
    finish: Callable[[subprocess.Popen[bytes]], bytes] = lambda process: process.communicate(timeout=200)[0]  # noqa: E731
    killed, first, second = start(cache), start(cache), start(cache)
    while not list(tmp_path.glob("cache/cropi-tools/kernel-*")):
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    found = [finish(process) for process in (first, second)]
    found += [finish(start(cache)), finish(start("/dev/null"))]
    assert len(found[0]) > 100_000
    assert set(found) == {found[0]}
    names = [path.name for path in tmp_path.glob("cache/cropi-tools/*") if path.suffix != ".tmp"]
    # serial and parallel code of two; the products; what these call is code of its own
    assert len(names) == 2 * 2 + 1 + 2
