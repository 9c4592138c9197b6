r"""Numbers and formulas in running text: the value that starts at a place, and the last one of a text.

A formula is what stands between dollar signs or LaTeX brackets, or a run of LaTeX and symbols (`**(-2, 0)**`, `\frac12.`). All searches are
linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cropi_tools.rewards.normalization import normalize, without_calculation
from cropi_tools.rewards.quantities import read_quantity, same_quantity

NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+\u2212])?(?:\\?[$\u20ac\u00a3\u00a5][-+\u2212]?)?(?<![A-Za-z\d])(?<![A-Za-z\d\\)}]_)"
    r"(?P<body>\\[dtc]?frac\s*(?:\d|\{-?\d+\})\s*(?:\d|\{-?\d+\})|\\[A-Za-z]{1,20}\d+"
    r"|\d{1,9} \d{1,9}/\d{1,9}|\d*[\u00bd\u2153\u2154\u00bc\u00be]"
    r"|\d+:\d+|(?:\d{1,3}(?:(?:,|\{,\}|,?\\[!,;] ?)\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    r"(?:/\d+|[eE][-+]?\d{1,4}(?![A-Za-z\d])|\s?(?:\\times|\\cdot|[\u00d7*xX])\s?10\s?\^\s?(?:\{[-+\u2212]?\d{1,4}\}|[-+\u2212]?\d{1,4}))?"
    r"|\.\d+)"
    r"(?:[ ]?\\?%|[ ]?[aApP]\.?[mM]\b|[ ](?:percent|dozen|hundred|thousand|million|billion|trillion)\b)?"
)
_DELIMITERS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_DELIMITED = re.compile(
    r"\$\$((?:[^$\\]|\\.){1,1000})\$\$|\$((?:[^$\\\n]|\\.){1,1000})\$|\\\(((?:(?!\\\)).){1,1000})\\\)|\\\[((?:(?!\\\]).){1,1000})\\\]",
    re.DOTALL,
)
_MONEY = re.compile(r"\d[\d,.]*\s+[A-Za-z]{2}")
LIST_OF_FORMULAS = re.compile(r"\$[^$]+\$(?:\s*(?:,|;|or|and|,\s*(?:or|and))\s*\$[^$]+\$)+")

_NUMBER_IN_LIST = r"[-\u2212]?\d[\d.]*(?:/\d+)?"
LIST_OF_NUMBERS = re.compile(_NUMBER_IN_LIST + r"(?:(?:,|;|,? (?:and|or))\s*" + _NUMBER_IN_LIST + r")+")

_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}[ ,]+[A-Za-z]{2,}|\n\s*\n")
_FUNCTIONS = r"(?<![A-Za-z\\])(?:pi|sqrt|sin|cos|tan|log|ln|exp)(?![A-Za-z])"
_RUN = re.compile(
    r"(?:\\(?:text|mathrm|mbox|operatorname|mathbb|begin|end)\s?\{[^{}]{0,40}\}|\\[A-Za-z]+(?:\{[^{}]{0,60}\})*|\\[^A-Za-z]|"
    + _FUNCTIONS
    + "|"
    r"(?<![A-Za-z])[A-Za-z](?![A-Za-z'\u2019])"
    r"|[\d .,;:!|'%&+*/^_=<>(){}\[\]\u2212\u2264\u2265\u221e\u03c0\u221a\u222a\u00d7\u00b7\u00b2\u00b3-])+"
)
_STRUCTURE = re.compile(
    r"\\[A-Za-z{]|[\^\u221a\u222a\u03c0\u00b2\u00b3]|[([{][^()\[\]{}]*,|\d[a-z](?![a-z])\s*[-+=]|[-+]\s*\d*[a-z](?![a-z])"
    r"|(?<![A-Za-z])[A-Za-z]\)?\s*[-+]\s*[\d(]|\d\s?[xyzni](?![A-Za-z])|[\dA-Z]_\{?\d|" + _FUNCTIONS
)
_ARITHMETIC = re.compile(
    r"\d\s*[-+*/\u00d7\u2212]\s*\d|[<>\u2264\u2265]\s*[-\u2212]?[\dA-Za-z]|(?<![A-Za-z])[A-Za-z](?:\([a-z]\))?\s*=\s*\S"
)
_STRAY = re.compile(r"^(?:[ .,;:!*=]+|[aAI] (?![-+*/^=<>] ))+|[ .,;:!*]+$")
_LOOSE_END = re.compile(r"(?:[ .,;:*=<>/+\u2212-]|(?<=\s)[aAI])+$")
_RESULT = re.compile(r"=\s*[-+\u2212]?\\?[$\u20ac\u00a3\u00a5]?$")
_NOTHING_MORE = re.compile(r"[A-Za-z]?[ .,;:!|*]*(?:\n|$|[A-Za-z]{2})")
_SET_TO_ZERO = re.compile(r"[A-Za-z][^=\n]*[-+][^=\n]*=\s*0$")
_ASIDE = re.compile(r"(?<=[\d%])\s+\(|\s+\($")
_SIGN_APART = re.compile(r"[-\u2212]\s(?=[\d.\\])")
_STOP = re.compile(r"[.,;!](?:\s|$)|(?<! ):(?:\s|$)")
_LINE_NUMBER = re.compile(r"[ \t>*#-]*$")
_NUMBERED = re.compile(r"\d{1,2}[.)]\**[ \t]+\S*[A-Za-z]")
_LABEL = re.compile(
    r"^[\s>*#-]*(?:step|part|problem|question|case|example|exercise|equation|method|note)s?\s*#?\(?$", re.IGNORECASE
)
_LABELLED = re.compile(r"\)?\s*(?:[:.)*\u2013\u2014-]|$)")
_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never)|n['\u2019]t)\s+(?:be\s+|equal\s+to\s+|just\s+)?[*\\($]*$"
    r"|(?<!\bno )\b(?:more|less|fewer|greater|larger|smaller)\s+than\s+[*\\($]*$",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[*_\"'`)]*[.!?]*[*_\"'`)]*(?:\s*(?:\n|$)|(?<=[.!?*])\s)")
_UNIT_BEFORE = re.compile(r"[A-Za-z]{2}\^\{?$")
_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and|or)\b|[,;]|and\b|or\b)\s*")


def value_at(text: str, at: int) -> tuple[str, int] | None:
    r"""The number or formula that starts at a place, and where it ends; None where there is no such thing.

    Of a calculation (`5 + 3 = 8`) the result. Single letters are formulas only between delimiters.
    """
    apart = _SIGN_APART.match(text, at)
    if apart is not None:
        found = value_at(text, apart.end())
        return None if found is None else (f"-{found[0]}", found[1])
    delimited = _DELIMITED.match(text, at)
    if delimited is not None:
        inner = next(group for group in delimited.groups() if group is not None).strip()
        if inner and not (text[at] == "$" and _MONEY.match(inner)):
            return without_calculation(inner), delimited.end()
    run = _RUN.match(text, at)
    if run is not None:
        formula = _first_clause(run.group())
        if (_STRUCTURE.search(formula) or _ARITHMETIC.search(formula)) and _balanced(formula):
            return without_calculation(formula), at + len(formula)
    number = NUMBER.match(text, at)
    return None if number is None else (number.group(), number.end())


def values_at(text: str, at: int) -> tuple[str, int] | None:
    """The same, or a list of values ("3, 5 and 7", "$x = 2$ or $x = -2$") where it ends a sentence."""
    first = found = value_at(text, at)
    while found is not None:
        separator = _SEPARATOR.match(text, found[1])
        if separator is None:
            break
        found = value_at(text, separator.end())
        if first is not None and found is not None and SENTENCE_END.match(text, found[1]):
            restated = (
                "or" in separator.group() and at + len(first[0]) <= separator.start() and _equal(first[0], found[0])
            )
            return (first[0] if restated else text[at : found[1]]), found[1]
    return first


def is_list(line: str) -> bool:
    """Whether a line is a list of values and nothing else: `x = 2 or x = -2`."""
    found, one = values_at(line, 0), value_at(line, 0)
    return found is not None and one is not None and one[1] < found[1] and not line[found[1] :].strip("*_` .")


def _equal(first: str, second: str) -> bool:
    one, other = read_quantity(normalize(first)), read_quantity(normalize(second))
    return one is not None and other is not None and same_quantity(one, other)


def last_value(text: str) -> str | None:
    """The last number with the formula it stands in: between dollar signs (which may also be money) or brackets, or bare.

    Left out are numbers of lines, of steps ("Step 5:"), powers of units (`cm^2`), and what is denied ("not 6").
    """
    for found in _backwards(text):
        start, end = found.span("body")
        before = max(0, found.start() - 30), found.start()
        if _is_label(text, found.start(), end) or _DENIED.search(text, *before) or _UNIT_BEFORE.search(text, *before):
            continue
        for opening, closing in _DELIMITERS:
            left, right = text.rfind(opening, 0, start), text.find(closing, end)
            if left < 0 or right < 0:
                continue
            formula = text[left + len(opening) : right]
            if closing not in text[left + len(opening) : start] and not _PROSE.search(formula):
                return formula.strip()
        return _bare_formula(text, start, end) or found.group()
    return None


def has_prose(text: str) -> bool:
    """Whether a text holds two words in a row, or several paragraphs."""
    return _PROSE.search(text) is not None


def numbered_line(text: str, at: int) -> bool:
    """Whether a place holds the number of a list's line ("1. First, ..."), not a value."""
    return _NUMBERED.match(text, at) is not None


def _backwards(text: str) -> Iterator[re.Match[str]]:
    return reversed(list(NUMBER.finditer(text)))


def _is_label(text: str, start: int, end: int) -> bool:
    first = text.rfind("\n", 0, start) + 1
    before = text[max(first, start - 40) : start]
    if _LINE_NUMBER.fullmatch(before) and numbered_line(text, start):
        return True
    return _LABEL.match(before) is not None and _LABELLED.match(text, end) is not None


def _first_clause(run: str) -> str:
    """A run up to the first punctuation mark outside brackets, or a bracket that opens an aside: `18 (9 * 2)` is 18."""
    depth = 0
    for place, character in enumerate(run):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 or run.startswith(("\\)", "\\]"), place) or (depth == 0 and _STOP.match(run, place)):
            run = run[:place]
            break
    aside = _ASIDE.search(run)
    run = run[: aside.start()] if aside and "=" not in run[: aside.start()] else run
    return _LOOSE_END.sub("", run)


def _bare_formula(text: str, start: int, end: int) -> str | None:
    """The run of LaTeX and symbols around a number, if it has the structure of a formula and its brackets are balanced.

    Not for a number that ends a calculation: `5g - 2g = 3g` is about 3; but `x + y - 9 = 0` is no calculation.
    """
    first = text.rfind("\n", 0, start) + 1
    ends_calculation = _RESULT.search(text, max(first, start - 10), start) and _NOTHING_MORE.match(text, end)
    if ends_calculation and not _SET_TO_ZERO.search(text, first, end):
        return None
    stop = text.find("\n", end)
    for run in _RUN.finditer(text, first, len(text) if stop < 0 else stop):
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
