r"""Finding the answer in a response to a mathematics problem.

The last non-empty `\boxed{...}` decides; without one, GSM8K's `#### x`; else the last number, with the formula it stands
in; else the last line. A formula is what stands between dollar signs or LaTeX brackets, or a run of LaTeX and symbols in the
last line of text (`**(-2, 0)**`, `The answer is \frac12.`). A last line that names an answer without a number ("The answer is
$p - q$.", "Answer: Tuesday") goes before earlier numbers.

Only the end of the response is looked at outside boxes, every search is linear, and an answer longer than MAX_ANSWER
characters counts as none, so that no response can make this slow.
"""

from __future__ import annotations

import re

MAX_ANSWER = 1000
"""Longest answer that is compared, in characters (the longest reference of MATH and OlympiadBench has about 200)."""

TAIL = 2000
"""How many characters at the end of a response are searched for an answer that is not boxed."""

MAX_EMPTY_BOXES = 10
"""How many empty boxes (as in "put it in \\boxed{}") are passed over, from the end."""

MAX_NAMED_WORDS = 3
"""Most words of an answer that is named without a number."""

_BARE_BOX = re.compile(r"\s+([^\s{}$]{1,100})")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_START = re.compile(r"[-+\u2212$\u20ac\u00a3\\(\[{.]{0,4}[\d\\(\[{]")
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+\u2212])?(?:\\?[$\u20ac\u00a3\u00a5][-+\u2212]?)?(?<![A-Za-z\d_])"
    r"(?P<body>\\[dtc]?frac\s*(?:\d|\{-?\d+\})\s*(?:\d|\{-?\d+\})|\\[A-Za-z]{1,20}\d+"
    r"|\d+:\d+|(?:\d{1,3}(?:(?:,|\{,\}|,?\\[!,;] ?)\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?:[ ]?\\?%|[ ]?[aApP]\.?[mM]\b)?"
)
_DELIMITERS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}[ ,]+[A-Za-z]{2,}|\n\s*\n")
_LIST_OF_FORMULAS = re.compile(r"\$[^$]+\$(?:\s*(?:,|;|or|and|,\s*(?:or|and))\s*\$[^$]+\$)+")
_NAMES_ANSWER = re.compile(r".*\banswer\b(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)
_RUN = re.compile(
    r"(?:\\(?:text|mathrm|mbox|operatorname|mathbb|begin|end)\s?\{[^{}]{0,40}\}|\\[A-Za-z]+|\\[^A-Za-z]"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z'\u2019])|[\d .,;:!|'%&+*/^_=<>(){}\[\]\u2212\u2264\u2265\u221e\u03c0\u221a\u222a-])+"
)
_STRUCTURE = re.compile(
    r"\\[A-Za-z{]|[\^\u221a\u222a\u03c0]|[([][^()\[\]]*,|\d[a-z](?![a-z])\s*[-+=]|[-+]\s*\d*[a-z](?![a-z])"
    r"|(?<![A-Za-z])[A-Za-z]\)?\s*[-+]\s*[\d(]|\d\s?[xyzni](?![A-Za-z])|[\dA-Z]_\{?\d"
)
_STRAY = re.compile(r"^(?:[ .,;:!*=]+|[aAI] (?![-+*/^=<>] ))+|[ .,;:!*]+$")
_RESULT = re.compile(r"=\s*[-+\u2212]?\\?[$\u20ac\u00a3\u00a5]?$")
_NOTHING_MORE = re.compile(r"[A-Za-z]?[ .,;:!|*]*(?:\n|$|[A-Za-z]{2})")
_SET_TO_ZERO = re.compile(r"[A-Za-z][^=\n]*[-+][^=\n]*=\s*0$")
_NUMBER_IN_LIST = r"[-\u2212]?\d[\d.]*(?:/\d+)?"
_LIST_OF_NUMBERS = re.compile(_NUMBER_IN_LIST + r"(?:(?:,|;|,? (?:and|or))\s*" + _NUMBER_IN_LIST + r")+")


def extract_answer(response: str) -> str | None:
    """The answer a response ends with, as written there, or None where there is none.

    A last box that was never closed (a response cut short), or that holds more than MAX_ANSWER characters, is no
    answer.
    """
    box = last_box(response)
    if box is not None:
        return box or None
    tail = response[-TAIL:].replace("\0", " ").rstrip()
    line = tail.rsplit("\n", 1)[-1].strip("#* \t\r")
    answer = _after_hashes(tail) or _named(line) or _last_number(tail) or line
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def last_box(text: str) -> str | None:
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


def last_tagged(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, stripped; None where there is no such pair."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    return None if start < 0 else text[start + len("<answer>") : text.find("</answer>", start)].strip()


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


def _named(line: str) -> str | None:
    """What the last line says the answer is, where that is a list, or has no number: a formula or a word or two."""
    lead = _NAMES_ANSWER.match(line)
    rest = line[lead.end() if lead else 0 :].strip("* \t").rstrip(".")
    if _LIST_OF_FORMULAS.fullmatch(rest) or _LIST_OF_NUMBERS.fullmatch(rest):
        return rest
    if lead is None or not rest or any(character.isdigit() for character in rest):
        return None
    for opening, closing in _DELIMITERS:
        if len(rest) > 2 and rest.startswith(opening) and rest.endswith(closing):
            return rest[len(opening) : -len(closing)].strip()
    if _RUN.fullmatch(rest) and not rest.isalpha():
        return rest
    return rest if len(rest.split()) <= MAX_NAMED_WORDS else None


def _last_number(tail: str) -> str | None:
    """The last number, or the formula that holds it: between dollar signs (which may also be money) or brackets, or bare."""
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
    return _bare_formula(tail, start, end) or last.group()


def _bare_formula(tail: str, start: int, end: int) -> str | None:
    """The run of LaTeX and symbols around a number, if it has the structure of a formula and its brackets are balanced.

    Not for a number that ends a calculation: `5g - 2g = 3g` is about 3; but `x + y - 9 = 0` is no calculation.
    """
    first = tail.rfind("\n", 0, start) + 1
    ends_calculation = _RESULT.search(tail, max(first, start - 10), start) and _NOTHING_MORE.match(tail, end)
    if ends_calculation and not _SET_TO_ZERO.search(tail, first, end):
        return None
    stop = tail.find("\n", end)
    for run in _RUN.finditer(tail, first, len(tail) if stop < 0 else stop):
        if run.start() <= start and end <= run.end():
            formula = _STRAY.sub("", run.group())
            return formula if _STRUCTURE.search(formula) and _balanced(formula) else None
    return None


def _balanced(formula: str) -> bool:
    depth = 0
    for character in formula:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0
