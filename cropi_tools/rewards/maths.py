r"""Comparing two answers to a mathematics problem.

Most answers are plain numbers, perhaps with a unit, or literally the reference; those are decided here with exact
fractions, in microseconds and without a worker. The rest (expressions, intervals, sets, matrices) goes to math-verify,
whose simplification may run for ever: call `compare_formulas` in a process that can be killed. Its own time limits are
switched off, because they use SIGALRM (which fails off the main thread) and do not interrupt compiled code.

Units are ignored, as in every public verifier. A percent sign or a scale word ("million") may be read or left out when
only one of the two answers has it, since questions ask for "how many per cent" and "in millions".
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

DECIMALS = 6
"""Decimal places to which two numbers must agree when one is written as a decimal (math-verify's rule as well)."""

MAX_DEPTH = 40
"""Deepest nesting of brackets that is given to the parser."""

# Minus signs and dashes become "-", odd spaces and control characters become a space.
_CHARACTERS = {code: " " for code in (*range(32), 127, 0xA0, 0x2009, 0x202F, 0x200B, 0xFEFF)}
_CHARACTERS |= {0x2212: "-", 0x2013: "-", 0xFE63: "-", 0xFF0D: "-"}

_WRAPPERS = re.compile(r"\$\$?([^$]*)\$?\$|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*", re.DOTALL)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\!", ""),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;: ]|(?<!\\)~|\\q?quad(?![A-Za-z])", " "),
        (r"(?<=\d) (?=\d{3}(?!\d))(?<!\d{4} )", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle|bf|rm)(?![A-Za-z])", ""),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\u00b0", " "),
        (r"\\?[$\u20ac\u00a3\u00a5]", ""),
        (r"\\?%", r"\\%"),
        (r"\\text\{\s*,?\s*(?:or|and)\s*\}|(?<![\\A-Za-z{])(?:or|and)(?![A-Za-z}])", ","),
        (r",(?:\s*,)+", ","),
        (r"\s+", " "),
    )
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_ASSIGNMENT = re.compile(r"\\?[A-Za-z]{1,10}(?:_\{?\w{1,10}\}?)?(?:\([a-zA-Z]\))?\s*=\s*([^=]*)")
_LETTER = re.compile(r"\(?([A-H])\)?")
_CHOICE = re.compile(r"\(?([A-H])(?:[.:)].*)?", re.DOTALL)
_IN_BASE = re.compile(r"(\w+)_\{?(\d+)\}?")
_QUANTITY = re.compile(
    r"(?P<sign>[-+]?)\s*(?:"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:\s*/\s*(?P<over>\d+))?"
    r"|\\frac\s*\{\s*(?P<top>[-+]?\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|\\frac\s*(?P<top_digit>\d)\s*(?P<bottom_digit>\d)"
    r")(?P<rest>.*)",
    re.DOTALL,
)
_EXPONENT = re.compile(r"\^\s*\{?\s*[23]\s*\}?\s*$")
_UNIT_WORDS = re.compile(r"[A-Za-z]+(?:[ ./][A-Za-z]*)*")
_SHORT_UNIT = re.compile(r"cm|mm|km|kg|mg|ml|hr|hrs|min|mins|sec|secs|ft|in|lb|lbs|oz|mi|mph|kph|usd|eur")
_NOT_UNIT = re.compile(
    r"pi|sqrt|sin|cos|tan|cot|csc|log|exp|over|infty|mod|plus|minus|times|divided|more|"
    r"less|than|choose|half|squared|cubed|factorial|to|from|a|p|am|pm|i|e"
)
_SCALES = {
    "%": Fraction(1, 100),
    "percent": Fraction(1, 100),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}

Comparison = Literal["correct", "wrong", "unparsed"]


class Quantity(NamedTuple):
    """A number as written: its value, the factor of a percent sign or scale word (else 1), whether it is a decimal."""

    value: Fraction
    scale: Fraction
    decimal: bool


def normalise(answer: str) -> str:
    r"""One spelling for what people write in several: minus signs, spacing, `\dfrac`, `\left`, dollars, degrees."""
    text = answer.translate(_CHARACTERS).strip().rstrip(".,;")
    for _ in range(3):
        wrapper = _WRAPPERS.fullmatch(text)
        if wrapper is None:
            break
        text = next(group for group in wrapper.groups() if group is not None).strip().rstrip(".,;")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip(" ,;")


def compare_plainly(reference: str, answer: str) -> Comparison | None:
    """Decide two answers that need no algebra; None where algebra is needed. Takes microseconds, whatever the answer.

    Both are answers as written (at most a thousand characters or so); the reference comes first.
    """
    gold, candidate = normalise(reference), normalise(answer)
    if not candidate or _depth(candidate) > MAX_DEPTH:
        return "unparsed"
    if _folded(gold) == _folded(candidate):
        return "correct"
    gold_number = read_quantity(gold)
    if gold_number is not None:
        assignment = _ASSIGNMENT.fullmatch(candidate)
        number = read_quantity(assignment.group(1).strip() if assignment else candidate)
        if number is not None:
            return "correct" if same_quantity(gold_number, number) else "wrong"
    # The letter of a multiple choice, and a numeral of another base, which math-verify would compare without its base.
    for gold_form, form in ((_LETTER, _CHOICE), (_IN_BASE, _IN_BASE)):
        mine, theirs = gold_form.fullmatch(_unwrapped(gold)), form.fullmatch(_unwrapped(candidate))
        if mine and theirs:
            return "correct" if mine.groups() == theirs.groups() else "wrong"
    return None


@lru_cache(maxsize=1 << 15)
def compare_formulas(reference: str, answer: str) -> Comparison:
    """Decide two answers with math-verify. May never end, or exhaust memory: only for processes that can be killed.

    Kept per pair of texts, since the responses to one prompt repeat each other and LaTeX takes milliseconds to parse.
    """
    from math_verify import verify

    gold, candidate = _parse(normalise(reference)), _parse(normalise(answer))
    if all(isinstance(value, str) for value in candidate):
        return "unparsed"
    # math-verify is asymmetric (it simplifies assignments of the second only): the reference goes first. Relations and
    # sets may be compared, so that `2 \le x < 5` answers `[2,5)`.
    equal = verify(gold, candidate, float_rounding=DECIMALS, allow_set_relation_comp=True, timeout_seconds=None)
    return "correct" if equal else "wrong"


def read_quantity(text: str) -> Quantity | None:
    r"""A normalised answer as a number with an optional unit: "1,200", "-\frac{3}{4}", "5 \text{ cm}^2", "12 feet"."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, rest = match["number"], match["rest"]
    scale = _read_unit(rest)
    if scale is None:
        return None
    if number is not None:
        top, bottom = Fraction(number.replace(",", "").rstrip(".")), int(match["over"] or 1)
    else:
        top, bottom = Fraction(match["top"] or match["top_digit"]), int(match["bottom"] or match["bottom_digit"])
    if bottom == 0:
        return None
    value = top / bottom
    return Quantity(-value if match["sign"] == "-" else value, scale, number is not None and "." in number)


def same_quantity(first: Quantity, second: Quantity) -> bool:
    """Whether two numbers are equal: exactly, or to DECIMALS places where one of them is written as a decimal."""
    if first.scale == second.scale:
        pairs = [(first.value, second.value)]
    else:
        pairs = [(first.value * first.scale, second.value * second.scale)]
        if 1 in (first.scale, second.scale):
            pairs.append((first.value, second.value))
    if first.decimal or second.decimal:
        return any(round(a, DECIMALS) == round(b, DECIMALS) for a, b in pairs)
    return any(a == b for a, b in pairs)


def _read_unit(rest: str) -> Fraction | None:
    """The factor that a unit stands for (1 for centimetres or dollars), or None if `rest` is no unit but algebra."""
    spaced, in_text = rest[:1] == " ", "\\" in rest and _TEXT.search(rest) is not None
    text = _EXPONENT.sub("", _TEXT.sub(r" \1 ", rest)).strip(" .")
    if not text:
        return Fraction(1)
    if text == "\\%":
        return _SCALES["%"]
    if not _UNIT_WORDS.fullmatch(text):
        return None
    words = text.lower().replace(".", " ").replace("/", " ").split()
    if any(_NOT_UNIT.fullmatch(word) for word in words):
        return None
    scale = _SCALES.get(words[0], Fraction(1))
    known = scale != 1 or in_text or _SHORT_UNIT.fullmatch(words[0]) is not None
    return scale if known or (spaced and len(words[0]) >= 3) else None


def _unwrapped(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip()


def _folded(text: str) -> str:
    """The text without spaces and text macros; words of two letters or more in lower case: only symbols have a case."""
    text = _unwrapped(text)
    compact = text.replace(" ", "")
    return compact.lower() if len(compact) > 1 and compact.isalpha() else compact


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "({[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")}]":
            depth -= 1
    return deepest


@lru_cache(maxsize=1 << 12)
def _parse(text: str) -> list[Any]:
    """What math-verify reads in an answer: sympy objects, and the text itself where it found none."""
    from math_verify import parse

    # It warns once that its time limits are off; they are off on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return list(parse(f"\\boxed{{{text}}}", parsing_timeout=None))
