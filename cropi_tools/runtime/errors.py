"""The errors that a user can fix.

Everything a user can put right (a missing file, a broken line, files that do not belong together) is raised as one of these;
the command line prints its message as one line and exits with its code. Anything else is a defect of ours and shows a traceback.
"""

from __future__ import annotations


class CropiError(Exception):
    """A failure with a message for the user: what is wrong, where, and what to do about it. Exit code 1."""

    exit_code = 1


class InputError(CropiError):
    """An input is missing, malformed, or does not belong with another input. Exit code 1."""


class UsageError(CropiError):
    """The options contradict each other or lie outside their range. Exit code 2."""

    exit_code = 2


class Interrupted(CropiError):
    """A signal asked the command to stop; what was finished is on disk. Exit code 143 (TERM and USR2)."""

    exit_code = 143


def printable(text: str) -> str:
    """Text for a terminal or a log: one line, with what is no visible character (escapes of terminals, line breaks, marks that turn the
    direction of writing) as Python writes it. Ids, sources and responses come from others.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, for use in ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # a heading says nothing without what it heads
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
