"""Counts what numba takes to compile kernels as start, whenever a kernel is first called; importing this module is enough."""

from __future__ import annotations

from contextlib import AbstractContextManager

from numba.core import event

from cropi_tools.runtime.clock import starting


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
