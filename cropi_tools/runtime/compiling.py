"""Kernels: numba's compiling counted as start, whenever a kernel is first called, and what it compiled kept for the next process.

numba has a cache of its own. Of one function it confuses serial and parallel code; it sees no change in a file that a kernel has
constants or functions from; two processes that compile at once can leave an index that names one's code as the other's; a damaged
file, or no folder that it can write to, ends in a traceback. Here every compiled signature is a file of the user's cache folder, named by
all that decides the code (`runtime/cache.py`).
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import config, event
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

from cropi_tools.runtime.cache import cache_folder, keep, kept
from cropi_tools.runtime.clock import starting

# what reading code may raise that another build of the same version of numba has left
_UNREADABLE = (
    *(pickle.PickleError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


class _Compiling(event.Listener):  # type: ignore[misc,unused-ignore]
    """Every compilation, those inside another too, is inside a `starting` of its own."""

    def __init__(self) -> None:
        self._open: list[AbstractContextManager[None]] = []

    def on_start(self, event: event.Event) -> None:
        self._open.append(starting())
        self._open[-1].__enter__()

    def on_end(self, event: event.Event) -> None:
        self._open.pop().__exit__(None, None, None)


event.register("numba:compile", _Compiling())


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit` whose code is kept on disk; without a function a decorator, as there.

    A kernel takes functions and constants from files of its own folder only: these decide under which name its code is kept. Without
    them, as in an installation of compiled files alone, it is not.
    """
    if function is None:
        return lambda found: kernel(found, **options)
    made = numba.njit(**options)(function)
    # under NUMBA_DISABLE_JIT=1 it is the function itself
    if isinstance(made, Dispatcher) and Path(function.__code__.co_filename).is_file():
        made._cache = _Kept(made)  # type: ignore[attr-defined,unused-ignore]
    return made


class _Kept:
    """The code of one kernel on disk: what a dispatcher asks of its cache."""

    def __init__(self, kernel: Dispatcher) -> None:
        function = kernel.py_func
        options = sorted((name, _ordered(value)) for name, value in kernel.targetoptions.items())
        self._label = f"kernel-{function.__name__.strip('_')}"
        # read now: later the files may be others than those that were imported
        sources, code = _sources(Path(function.__code__.co_filename).parent), function.__code__
        self._decisive = (function.__qualname__, options, sources, code.co_code, code.co_names, _versions())

    @property
    def cache_path(self) -> str | None:
        folder = cache_folder()
        return None if folder is None else str(folder)

    @starting()
    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled code, ready to be called; None where it has to be compiled."""
        target_context.refresh()
        found = kept(self._name(signature, target_context.codegen()))
        try:
            return None if found is None else CompileResult._rebuild(target_context, *pickle.loads(found))
        except _UNREADABLE:
            return None

    @starting()
    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled, unless it holds addresses of this process."""
        if not result.library.has_dynamic_globals:
            keep(self._name(signature, result.codegen), dumps(result._reduce()))

    def _name(self, signature: Any, codegen: Any) -> str:
        decisive = repr((*self._decisive, signature, codegen.magic_tuple(), _settings()))
        return f"{self._label}-{hashlib.sha256(decisive.encode()).hexdigest()}"


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


@cache
def _sources(folder: Path) -> str:
    """A hash of the folder's files, and of this one."""
    found = hashlib.sha256()
    for path in [Path(__file__), *sorted(folder.glob("*.py"))]:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _versions() -> tuple[str, ...]:
    return sys.version, numba.__version__, llvmlite.__version__, np.__version__


def _settings() -> list[tuple[str, Any]]:
    """numba's settings, of the environment and of its file, but how many threads there are, which decides no code."""
    names = [name for name in dir(config) if name.isupper() and "THREADS" not in name and "CACHE" not in name]
    values = ((name, getattr(config, name)) for name in names)
    return [(name, value) for name, value in values if isinstance(value, (bool, int, float, str, tuple, type(None)))]
