r"""One spelling for what people write in several: minus signs, spaces, `\dfrac`, `\left`, dollars, degrees, `√`, "or".

Every answer to a mathematics problem passes through `normalize` before it is compared. All of it is linear in the text.
"""

from __future__ import annotations

import re
from functools import lru_cache

_SPACES = (*range(32), 127, 0xA0, 0x2009, 0x202F, 0x200B, 0xFEFF)
_MARKS = (
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2060, 0x206A),
)  # directions of writing, joiners: not to be seen
_MINUSES = (0x2212, 0x2013, 0xFE63, 0xFF0D)
_CHARACTERS: dict[int, str] = dict.fromkeys(_SPACES, " ") | dict.fromkeys(_MARKS, "") | dict.fromkeys(_MINUSES, "-")
_CHARACTERS |= {
    ord(character): text
    for character, text in (
        ("×", r"\times "), ("·", r"\cdot "), ("÷", "/"), ("±", r"\pm "), ("≤", r"\le "), ("≥", r"\ge "), ("≠", r"\ne "),
        ("∞", r"\infty "), ("π", r"\pi "), ("∪", r"\cup "), ("∩", r"\cap "), ("∈", r"\in "), ("∅", r"\emptyset "),
        ("½", r"\frac{1}{2}"), ("⅓", r"\frac{1}{3}"), ("⅔", r"\frac{2}{3}"),
        ("¼", r"\frac{1}{4}"), ("¾", r"\frac{3}{4}"),
    )
}  # fmt: skip

ELLIPSIS = r"\ldots"
"""Dots that continue a list, however they were written."""

_WRAPPERS = re.compile(
    r"\$\$?([^$]*)\$?\$|\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{([^{}]*\d[^{}]*)\}|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*",
    re.DOTALL,
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\!", ""),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;: ]|(?<!\\)~|\\q?quad(?![A-Za-z])", " "),
        (r"(?<=\d) (?=\d{3}(?!\d))(?<!\d{4} )", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle|bf|rm|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\u00b0", " "),
        (r"\\?[$\u20ac\u00a3\u00a5]", ""),
        (r"\\?%", r"\\%"),
        (r"\\text\s*\{\s*\}", ""),
        (r"\\text\s*\{\s*([-+])\s*\}", r"\1"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\leq(?:slant)?(?![A-Za-z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}|^\{\s*\}$", r"\\emptyset"),
        (r"(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty"),
        (r"\u221a\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\u221a\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\text\s*\{\s*,?\s*or\s*\}|(?<![\\A-Za-z{])or(?![A-Za-z}])", r" \\lor "),
        (r"\\text\s*\{\s*,?\s*and\s*\}|(?<![\\A-Za-z{])and(?![A-Za-z}])", ","),
        (r",(?:\s*,)+", ","),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])sqrt ?(\d+(?:\.\d+)?|[A-Za-z])(?![\w(.])", r"\\sqrt{\1}"),
        (
            r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log)(?=\s*[(^_\\]|\s+[A-Za-z\d](?![A-Za-z])|\d)",
            r"\\\1 ",
        ),
        (r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\-])", "^"),
        (r"(?<=\d)[eE]([-+]?\d{1,4})(?![\w.])", r" \\times 10^{\1}"),
        (r"\^\s*(-\s*[\w.]+|\+?\d[\d.]+)(?![\w.])", r"^{\1}"),
        (r"(?<=\S)\s*\+\s+-\s*(?=[\w.\\(])", " - "),
        (r"(?<=\S)\s*-\s+-\s*(?=[\w.\\(])", " + "),
        (r"\s+", " "),
    )
)
_ELLIPSIS = re.compile(r"\.{3,}|\\(?:dots[cbm]?|cdots)(?![A-Za-z])|\u2026")
_PLAIN_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")
_SUPERSCRIPT = re.compile("[\u207b\u207a]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_DIGITS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+")
_CALLS = (("sqrt", "\\sqrt"), ("exp", "e^"), ("^", "^"))
_CALCULATION = re.compile(r"(?:\\[A-Za-z]+|[^A-Za-z=\\<>])*\d(?:\\[A-Za-z]+|[^A-Za-z=\\<>])*=(?=\s*[^A-Za-z\s])")
_OR = re.compile(r",?\s*\\lor\s*,?")
_RELATION = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])|\\neq?(?![A-Za-z])")
_SET_BUILDER = re.compile(
    r"\\?\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{\s*R\s*\}\s*)?(?:\||:|\\mid|\\vert)(?![A-Za-z])\s*([^|:{},]*?)\\?\}"
)
_REVERSED_BRACKETS = re.compile(r"([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])")
_MACRO = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


@lru_cache(maxsize=1 << 12)
def normalize(answer: str) -> str:
    r"""The one spelling of an answer. Alternatives ("or") become a list, and of relations `\lor`; `\{x | x > 1\}` becomes `x > 1`."""
    text = answer.translate(_CHARACTERS).strip()
    if _PLAIN_NUMBER.fullmatch(text):  # most answers, and nothing below would change one
        return text
    text = _ELLIPSIS.sub(r"\\ldots ", text).rstrip(".,; ")
    text = _SUPERSCRIPT.sub(lambda power: f"^{{{power.group().translate(_DIGITS)}}}", text)
    for _ in range(3):
        wrapper = _WRAPPERS.fullmatch(text)
        if wrapper is None:
            break
        text = next(group for group in wrapper.groups() if group is not None).strip().rstrip(".,;")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for name, macro in _CALLS:
        text = _braced(text, name, macro)
    related = _RELATION.search(text) is not None
    if not related:
        text = _OR.sub(",", text)
    text = text.strip(" ,;")
    built = _SET_BUILDER.fullmatch(text) if related else None
    if built is not None and built.group(1) in built.group(2):
        return built.group(2).strip()
    reversed_brackets = _REVERSED_BRACKETS.fullmatch(text)
    if reversed_brackets is not None:  # ]0, 1] as some countries write (0, 1]
        opening, inside, closing = reversed_brackets.groups()
        text = f"{'(' if opening == ']' else '['}{inside}{')' if closing == '[' else ']'}"
    return text


def without_calculation(formula: str) -> str:
    """What a chain of equations between numbers comes to: `5 + 3 = 8` to 8; `x = 5` and all else as it is."""
    while match := _CALCULATION.match(formula):
        formula = formula[match.end() :].strip()
    return formula


def _braced(text: str, name: str, macro: str) -> str:
    r"""A function as programs write it as LaTeX does: `sqrt(2(x+1))` becomes `\sqrt{2(x+1)}`."""
    at = len(text)
    while (at := text.rfind(f"{name}(", 0, at)) >= 0:
        if at and (text[at - 1].isalpha() or text[at - 1] == "\\"):
            continue
        depth, start = 0, at + len(name)
        for place in range(start, len(text)):
            depth += (text[place] == "(") - (text[place] == ")")
            if depth == 0:
                text = f"{text[:at]}{macro}{{{text[start + 1 : place]}}}{text[place + 1 :]}"
                break
    return text


def without_macros(text: str) -> str:
    r"""The text with what stands in `\text{...}` and the like as it is."""
    return _MACRO.sub(r"\1", text).strip()


def spaced_macros(text: str) -> str:
    r"""The same with spaces around it: `5\text{cm}` becomes `5 cm`."""
    return _MACRO.sub(r" \1 ", text)
