r"""Finding the answer in a response to a mathematics problem.

The last non-empty `\boxed{...}` decides; without one, GSM8K's `#### x`; else the last number, with the whole formula it
stands in; else the last line. Only the end of the response is looked at outside boxes, every search is linear, and an
answer longer than MAX_ANSWER characters counts as none, so that no response can make this slow.
"""

from __future__ import annotations

import re

MAX_ANSWER = 1000
"""Longest answer that is compared, in characters (the longest reference of MATH and OlympiadBench has about 200)."""

TAIL = 2000
"""How many characters at the end of a response are searched for an answer that is not boxed."""

MAX_EMPTY_BOXES = 10
"""How many empty boxes (as in "put it in \\boxed{}") are passed over, from the end."""

_BARE_BOX = re.compile(r"\s+([^\s{}$]{1,100})")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_START = re.compile(r"[-+\u2212$\u20ac\u00a3\\(\[{.]{0,4}[\d\\(\[{]")
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+\u2212])?(?:\\?[$\u20ac\u00a3\u00a5][-+\u2212]?)?(?<![A-Za-z\d_])"
    r"(?P<body>\\[dt]?frac\{-?\d+\}\{-?\d+\}|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?:[ ]?\\?%)?"
)
_DELIMITERS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}[ ,]+[A-Za-z]{2,}|\n\s*\n")


def extract_answer(response: str) -> str | None:
    """The answer a response ends with, as written there, or None where there is none.

    A last box that was never closed (a response cut short), or that holds more than MAX_ANSWER characters, is no
    answer.
    """
    box = _last_box(response)
    if box is not None:
        return box or None
    tail = response[-TAIL:].replace("\0", " ").rstrip()
    answer = _after_hashes(tail) or _last_number(tail) or tail.rsplit("\n", 1)[-1].strip("#* \t\r")
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def _last_box(text: str) -> str | None:
    """Content of the last non-empty box; "" if that box is unclosed or too long; None if no box has content."""
    end = len(text)
    for _ in range(MAX_EMPTY_BOXES):
        start = text.rfind("\\boxed", 0, end)
        if start < 0:
            return None
        content = _box_content(text, start + len("\\boxed"))
        if content is None:
            return ""
        if content.strip():
            return content.strip()
        end = start
    return None


def _box_content(text: str, at: int) -> str | None:
    r"""What stands in the braces that open at `at`; escaped ones do not count: `\left\{ ... \right.` is unbalanced."""
    if not text.startswith("{", at):
        bare = _BARE_BOX.match(text, at)
        return bare.group(1).rstrip(".,;") if bare else ""
    depth, position = 0, at
    limit = min(len(text), at + MAX_ANSWER + 2)
    while position < limit:
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[at + 1 : position]
        position += 1
    return None


def _after_hashes(tail: str) -> str | None:
    """The rest of the last `####` line that starts like a value: the same mark opens headings in Markdown."""
    for match in reversed(list(_HASHES.finditer(tail))):
        if _ANSWER_START.match(match.group(1)):
            return match.group(1).strip("*# \t\r")
    return None


def _last_number(tail: str) -> str | None:
    """The last number, or the formula between dollar signs or LaTeX brackets that holds it (`$` may also be money)."""
    last = None
    for last in _NUMBER.finditer(tail):  # noqa: B007
        pass
    if last is None:
        return None
    start, end = last.span("body")
    for opening, closing in _DELIMITERS:
        left, right = tail.rfind(opening, 0, start), tail.find(closing, end)
        if left < 0 or right < 0:
            continue
        formula = tail[left + len(opening) : right]
        if closing not in tail[left + len(opening) : start] and not _PROSE.search(formula):
            return formula.strip()
    return last.group()
