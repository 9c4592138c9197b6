r"""Comparing two answers to a mathematics problem.

Most answers are plain numbers, perhaps with a unit, lists of such numbers, or literally the reference; those are decided here with exact
fractions, in microseconds and without a worker. The rest (expressions, intervals, sets, matrices) is compared by algebra (formulas.py),
which may run for ever: call `compare_formulas` in a process that can be killed.

What counts as equal, where people could disagree: units are ignored (quantities.py); lists and sets have no order, tuples have one, and
a tuple may lack its parentheses; brackets of intervals must agree, and an inequality is its interval; a numeral may lack its
base, which the question names; numbers are equal exactly, or to six decimals and a thousandth where one is written as a decimal; lists
continued by dots agree in what is written; the case of symbols is ignored; `x = 5`, `f(x) = 5` and `a + b = 5` answer 5, but an equation
that its only unknown does not stand alone in (`2x = 5`, `x^2 = 5`) does not. Of a time of day with a.m. or p.m. that must be there.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from cropi_tools.rewards.algebra import equal_formulas
from cropi_tools.rewards.normalization import ELLIPSIS, normalize, without_calculation, without_macros
from cropi_tools.rewards.quantities import Quantity, read_quantity, same_quantity, without_unit

MAX_DEPTH = 40
"""Deepest nesting of brackets that is given to the parser."""

Comparison = Literal["correct", "wrong", "unparsed"]

_NAME = r"(?:\\?[A-Za-z]{1,10}|\\text\s?\{[^{}]*\})(?:_(?:\w|\{\w{1,10}\}))?'?(?:\([a-zA-Z]\))?"
_ASSIGNMENT = re.compile(_NAME + r"\s*=\s*([^=]*)")
_REVERSED = re.compile(r"([^=]*?)\s*=\s*" + _NAME)
_LETTER = re.compile(r"\(?([A-J])\)?")
_CHOICE = re.compile(r"\(?([A-Ja-j])(?:\)?|[.:)].*)", re.DOTALL)
_IN_BASE = re.compile(r"(\w+)_\{?(\w+)\}?")
_DIGIT_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASES = {name: str(base) for base, name in enumerate(_DIGIT_NAMES, 2)} | {"sixteen": "16"}
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?:\s*([ap])\.?\s?m\.?)?", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_NAMED_WORD = re.compile(
    r"[A-Z][a-z]+(?: [A-Za-z]+)*|[A-Za-z]+(?: [A-Za-z]+)+|[A-Za-z]{5,}|[Yy]es|no|true|none|even|odd|YES|NO"
)
_ARTICLE = re.compile(r"(?:an?|the) (?=[A-Za-z]{3})", re.IGNORECASE)
_IDLE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_CHAIN = re.compile(r"([^<>\\a-zA-Z]+)(<|\\le) ?([A-Za-z]) ?(<|\\le)(?![A-Za-z])([^<>\\a-zA-Z]+)")
_MEMBER = re.compile(r"^[A-Za-z] ?\\in(?![A-Za-z]) ?")
_LOOSE_ELLIPSIS = re.compile(r"(?<=\d)\s*" + re.escape(ELLIPSIS) + r"\s*$")
_INTERVALS = ("()", "[]", "[)", "(]")


def compare_plainly(reference: str, answer: str) -> Comparison | None:
    """Decide two answers that need no algebra; None where algebra is needed. Takes microseconds, whatever the answer.

    Both are answers as written (at most a thousand characters or so); the reference comes first.
    """
    gold, candidate = (without_calculation(normalize(text)) for text in (reference, answer))
    if not candidate or _depth(candidate) > MAX_DEPTH:
        return "unparsed"
    if _folded(gold) == _folded(candidate):
        return "correct"
    quantity = read_quantity(gold)
    if quantity is not None:
        assignment = _ASSIGNMENT.fullmatch(candidate) or _REVERSED.fullmatch(candidate)
        number = read_quantity(assignment.group(1).strip() if assignment else candidate)
        if number is not None:
            return _verdict(same_quantity(quantity, number))
    for compare in (
        _compare_ellipses,
        _compare_collections,
        _compare_letters,
        _compare_times,
        _compare_numerals,
        _compare_words,
    ):
        found = compare(gold, candidate)
        if found is not None:
            return found
    return None


@lru_cache(maxsize=1 << 15)
def compare_formulas(reference: str, answer: str) -> Comparison:
    """Decide two answers by algebra. May never end, or exhaust memory: only for processes that can be killed.

    Kept per pair of texts, since the responses to one prompt repeat each other and LaTeX takes milliseconds to parse.
    """
    gold, candidate = (without_unit(without_calculation(normalize(text))) for text in (reference, answer))
    if ELLIPSIS in gold and ELLIPSIS in candidate:
        return _compare_item_by_item(gold, candidate)
    equal = equal_formulas(gold, _LOOSE_ELLIPSIS.sub("", candidate))
    return "unparsed" if equal is None else _verdict(equal)


def _verdict(equal: bool) -> Literal["correct", "wrong"]:
    return "correct" if equal else "wrong"


def _compare_ellipses(gold: str, candidate: str) -> Comparison | None:
    """Lists that are continued by dots: both must be, at the same place. What a decimal leaves out is no list."""
    (brackets, items), (other_brackets, other_items) = (
        _collection(_LOOSE_ELLIPSIS.sub("", text)) for text in (gold, candidate)
    )
    dotted, other_dotted = ([ELLIPSIS in item for item in found] for found in (items, other_items))
    if not any(dotted) and not any(other_dotted):
        return None
    brackets_agree = brackets == other_brackets or "" in (brackets, other_brackets)
    return None if dotted == other_dotted and len(items) > 1 and brackets_agree else "wrong"


def _compare_item_by_item(gold: str, candidate: str) -> Comparison:
    """Lists that are continued by dots, of the same length: what is written must agree one by one."""
    for first, second in zip(_collection(gold)[1], _collection(candidate)[1], strict=True):
        found = compare_plainly(first, second)
        if (compare_formulas(first, second) if found is None else found) != "correct":
            return "wrong"
    return "correct"


def _compare_collections(gold: str, candidate: str) -> Comparison | None:
    """Lists, sets, tuples and intervals of plain numbers; and of any content where the brackets alone decide."""
    chains = _CHAIN.fullmatch(gold), _CHAIN.fullmatch(candidate)
    if chains[0] and chains[1] and chains[0][3] != chains[1][3]:
        return None  # about another unknown
    (brackets, items), (other_brackets, other_items) = _collection(gold), _collection(candidate)
    kinds = {brackets, other_brackets}
    if len(items) > 1 and len(other_items) > 1:
        if "{}" in kinds and kinds & {*_INTERVALS}:
            return "wrong"
        if len(items) == len(other_items) == 2 and kinds <= {*_INTERVALS} and len(kinds) == 2:
            return "wrong"
    elif len(items) == len(other_items) == 1:
        return None
    numbers, others = [read_quantity(item) for item in items], [read_quantity(item) for item in other_items]
    if None in numbers or None in others:
        return None
    if min(len(items), len(other_items)) > 1 and "" in kinds and kinds & {"[]", "[)", "(]"}:
        return None
    return _verdict(_same_numbers(numbers, others, ordered=not kinds <= {"", "{}"}, repeated="{}" not in kinds))


def _same_numbers(first: list[Any], second: list[Any], ordered: bool, repeated: bool) -> bool:
    """Whether two lists of quantities agree; repeated: how often a number comes counts."""
    if not ordered:
        first, second = (sorted(numbers, key=_value) for numbers in (first, second))
    if not repeated:
        first, second = (list({_value(number): number for number in numbers}.values()) for numbers in (first, second))
    return len(first) == len(second) and all(map(same_quantity, first, second))


def _value(number: Quantity) -> Any:
    return number.value * number.scale


def _collection(text: str) -> tuple[str, list[str]]:
    r"""The brackets around a normalized answer ("" for none; "{}" for `\{ \}` as well), and what its commas separate."""
    chain = _CHAIN.fullmatch(text)
    if chain is not None:  # 1 \le x < 2 is [1, 2)
        low, left, _, right, high = chain.groups()
        return ("(" if left == "<" else "[") + (")" if right == "<" else "]"), [low.strip(), high.strip()]
    inner = _MEMBER.sub("", text).replace("\\{", "{").replace("\\}", "}")
    brackets = inner[:1] + inner[-1:]
    if brackets not in (*_INTERVALS, "{}") or not _closes_at_end(inner):
        return "", _items(inner)
    items = _items(inner[1:-1])
    if len(items) > 2 and brackets == "[]":
        brackets = "()"  # a list as programs write it
    return brackets, items


def _items(text: str) -> list[str]:
    """The parts between commas or semicolons outside brackets; a comma of thousands separates only where others do not."""
    if read_quantity(text) is not None:
        return [text.strip()]
    depth, start, parts = 0, 0, []
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ",;":
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    spaced = text.split(", ") if ", " in text and not any(character in text for character in "([{;") else []
    if len(spaced) > 1 and len(spaced) < len(parts) and all(read_quantity(part) is not None for part in spaced):
        parts = spaced
    return [part.strip() for part in parts]


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens a text is closed by its last character."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _compare_letters(gold: str, candidate: str) -> Comparison | None:
    """The letter of a multiple choice, in brackets or with the text of the option."""
    mine, theirs = _LETTER.fullmatch(without_macros(gold)), _CHOICE.fullmatch(without_macros(candidate))
    return _verdict(mine.group(1) == theirs.group(1).upper()) if mine and theirs else None


def _compare_times(gold: str, candidate: str) -> Comparison | None:
    """Times of day. The reference's a.m. or p.m. must be there; a time without it may be given one."""
    mine, theirs = _read_time(gold), _read_time(candidate)
    if mine is None:
        return None
    if theirs is None:
        return "wrong" if mine[2] else None
    return _verdict(mine[:2] == theirs[:2] and mine[2] in ("", theirs[2]))


def _read_time(text: str) -> tuple[int, int, str] | None:
    """Hour, minute, and "a", "p" or "": "3:30 p.m.", "3:30", "10 am"."""
    match = _TIME.fullmatch(without_macros(text).strip())
    if match is None or (match[2] is None and match[3] is None):
        return None
    return int(match[1]), int(match[2] or 0), (match[3] or "").lower()


def _compare_numerals(gold: str, candidate: str) -> Comparison | None:
    """Numerals of another base, which math-verify would compare without their bases; the answer's may be left out."""
    mine, theirs = _IN_BASE.fullmatch(without_macros(gold)), _IN_BASE.fullmatch(without_macros(candidate))
    if mine is None or not mine[1][0].isdigit():
        return None
    if theirs is None:
        return _verdict(candidate == mine[1]) if candidate.isalnum() else None
    return _verdict(mine[1] == theirs[1] and _BASES.get(mine[2], mine[2]) == _BASES.get(theirs[2], theirs[2]))


def _compare_words(gold: str, candidate: str) -> Comparison | None:
    """Words that are not what the reference says; math-verify would take them for products of letters."""
    word, other = without_macros(gold), without_macros(candidate)
    named = word != gold or _NAMED_WORD.fullmatch(word)
    return "wrong" if named and _WORDS.fullmatch(word) and _WORDS.fullmatch(other) else None


def _folded(text: str) -> str:
    """The text without spaces, macros and a leading article; words of two letters or more in lower case: symbols have a case."""
    compact = _ARTICLE.sub("", without_macros(text), count=1)
    compact = _IDLE_SPACE.sub("", compact)
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
