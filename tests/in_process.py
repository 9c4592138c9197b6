"""A command in this process, behind its own error boundary, as its console script runs it."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Ended(NamedTuple):
    """How a command ended. trace: of an exception that nobody caught; empty where there was none."""

    code: int
    stderr: str
    trace: str


def call(words: list[str], place: Path) -> Ended:
    """Run a command line in a folder."""
    module = importlib.import_module(f"cropi_tools.cli.{words[0].removeprefix('cropi-')}")
    before, argv, handlers = os.getcwd(), sys.argv, [signal.getsignal(one) for one in SIGNALS]
    said, data, code, trace = io.StringIO(), io.StringIO(), 0, ""
    os.chdir(place)
    sys.argv = words
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(data):
            module.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        trace = traceback.format_exc()
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise
    finally:
        os.chdir(before)
        sys.argv = argv
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    return Ended(code, said.getvalue(), trace)


def complaint(ended: Ended, words: list[str], names: tuple[str, ...]) -> str | None:
    """What is wrong with how a command ended; None when nothing is. names: one of which the error must hold, if not a prompt or
    the output, whose name comes last."""
    if ended.trace:
        return ended.trace
    if ended.code not in (0, 1, 2):
        return f"exit {ended.code}: {ended.stderr}"
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    wanted = {0: 0, 1: 1, 2: 2}[ended.code]  # of usage, what is wrong and where to read
    if len(lines) != wanted:
        return f"exit {ended.code} with {len(lines)} lines: {ended.stderr}"
    if lines and not lines[0].startswith(f"{words[0]}: "):
        return f"not the command's own words: {ended.stderr}"
    if lines and not any(name in lines[0] for name in (*names, words[-1], "prompt '", "prompts '")):
        return f"names no file and no prompt: {ended.stderr}"
    return None
