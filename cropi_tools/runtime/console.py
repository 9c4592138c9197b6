"""Whatever reaches a terminal or a log: the one place that writes to standard output and standard error.

Ids, sources, names of sets and arms, and messages of libraries come from others. Here they lose what is no visible character, so that none
can move the cursor, change a color or a title, or pass for a line of ours. Streams that cannot express a character (an environment
without UTF-8) get it in Python's spelling; data on standard output is UTF-8 always.
"""

from __future__ import annotations

import io
import json
import re
import sys
from typing import IO

from cropi_tools.runtime.errors import printable

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_LINE = 2**16  # bytes of another program's line that are held back until it ends


def prepare_streams() -> None:
    """Let no character that a stream cannot encode be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def data_stream() -> IO[str]:
    """Standard output for data: UTF-8, whatever the environment says; what UTF-8 cannot express is an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdout


def say(message: str) -> None:
    """One line on standard error."""
    print(printable(message), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A result for people on standard output. Its line breaks are ours: names in it have been through `printable`."""
    print("\n".join(printable(line) for line in text.split("\n")))


def show_json(text: str) -> None:
    """A result as JSON on standard output: the same values, with escapes for what is not visible or cannot be encoded there."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print("".join(one if _plain(one, ascii_only) else json.dumps(one)[1:-1] for one in text))


def _plain(one: str, ascii_only: bool) -> bool:
    return one.isprintable() and (one.isascii() or not ascii_only)


class Relay:
    """Passes another program's output on to standard error, line by line as it ends; a bar that is drawn again becomes lines."""

    def __init__(self) -> None:
        self._rest = b""

    def write(self, text: bytes) -> None:
        """Pass on what has come."""
        *lines, self._rest = re.split(rb"[\r\n]+", self._rest + text)
        if len(self._rest) > _LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            if line:
                shown = _COLOUR.sub("", line.decode("utf-8", "replace")).expandtabs()
                say(shown)

    def close(self) -> None:
        """Pass on a last line without an end."""
        self.write(b"\n")
