"""Chat templates come from others and are programs: here they get bounds of time, memory and length.

The library compiles and renders them in Jinja's sandbox, which keeps a template from reaching anything, but not from going on for ever or
making a text of any length. `BoundedEnvironment` is that sandbox with bounds, and stands in the library for it. What it makes of an
ordinary template is the same, letter by letter.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, TypeVar

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from cropi_tools.runtime.limits import bounded_memory

SECONDS = 10.0
"""How long a template may take for one prompt."""

MEMORY = 2**30
"""Bytes that a template may use for one prompt."""

LONGEST = 2**24
"""Most characters of what a template writes: about four million tokens."""

_MOST_BITS = 2**16  # of a whole number: to compute with longer ones takes any time at all, and no signal ends it

_Made = TypeVar("_Made")


class TooMuch(Exception):
    """A template went beyond a bound; the message goes on from "the chat template of POLICY"."""


class _TimeIsUp(BaseException):
    """Raised in the middle of a template, where nothing but `_bounded` may catch it."""


class _BoundedTemplate(Template):
    """A template whose rendering has bounds."""

    def render(self, *arguments: Any, **options: Any) -> str:
        return _bounded(super().render, *arguments, **options)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds. TooMuch: a template goes beyond one, while it is compiled (constants are computed then) or rendered."""

    template_class = _BoundedTemplate
    intercepted_binops = frozenset({"*", "**", "/", "//", "%"})

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.filters["round"] = _checked(self.filters["round"])
        self.filters["int"] = _checked(self.filters["int"])

    def from_string(self, *arguments: Any, **options: Any) -> Template:
        return _bounded(super().from_string, *arguments, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise TooMuch(f"computes with whole numbers of more than {_MOST_BITS} bits")
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The pieces as one text; templates join all that they write by this."""
        kept, length = [], 0
        for piece in pieces:
            kept.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise TooMuch(f"writes more than {LONGEST} characters")
        return "".join(kept)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes whole numbers, with bounds on what decides how long they get: digits and places."""

    def checked(value: Any, *arguments: Any, **options: Any) -> Any:
        places = [one for one in (*arguments, *options.values()) if isinstance(one, int)]
        if (isinstance(value, str) and len(value) > _MOST_BITS // 4) or any(
            abs(one) > _MOST_BITS // 4 for one in places
        ):
            raise TooMuch(f"computes with whole numbers of more than {_MOST_BITS} bits")
        return function(value, *arguments, **options)

    return checked


def _bounded(make: Callable[..., _Made], *arguments: Any, **options: Any) -> _Made:
    """What make(...) returns. TooMuch: it takes more time than SECONDS, or more memory than MEMORY.

    Time is bounded in the main thread only, where Python runs the handlers of signals; the commands make all prompts there. Compiled
    code that takes long is ended when it returns: memory bounds how much it has to do.
    """
    timed = threading.current_thread() is threading.main_thread()
    running = True

    def ring(number: int, frame: FrameType | None) -> None:
        if running:
            raise _TimeIsUp

    if timed:
        handler = signal.signal(signal.SIGALRM, ring)
        # again and again: what is raised inside a destructor, say, is lost
        timer = signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)
    try:
        with bounded_memory(MEMORY):
            return make(*arguments, **options)
    except _TimeIsUp:
        raise TooMuch(f"did not end within {SECONDS:g} seconds") from None
    except MemoryError:
        raise TooMuch(f"needs more than {MEMORY / 2**30:g} GiB of memory") from None
    finally:
        running = False
        if timed:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


def _install() -> None:
    library: Any = chat_template_utils
    library.ImmutableSandboxedEnvironment = BoundedEnvironment


_install()
