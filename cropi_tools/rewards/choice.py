r"""The letter of a multiple choice, A to J.

References are "B", "(B)", "B. Paris", "b", `\text{(B)}`. In a response these decide, the last of the first kind that occurs:
a pair of answer tags; a box (`\boxed{\text{C}}`); a last line that is a letter, perhaps with its text ("**D**", "D. Paris",
"answer: d"); a phrase that names the answer ("The answer is (C)", "I choose C", "C is correct"); a capital in parentheses.

A box or tag without a single letter leaves the response unparsed, and hedging ("A or B") names nothing: a choice is one
letter. A small letter counts only where it stands by itself in a box, in tags, or as the rest of the last line: "a" and
"i" are words. The text of an option is not compared, since the record does not hold the options.
"""

from __future__ import annotations

import re

from cropi_tools.rewards.extraction import TAIL, last_box, last_tagged, own_turn
from cropi_tools.rewards.grades import Grade, scored

_DRESS = re.compile(
    r"\\(?:text|math)?(?:text|bf|rm|it|sf|tt)(?![A-Za-z])|\\(?:left|right)(?![A-Za-z])|\\[ ,;:!()\[\]]|[{}$*_`~]"
)
_ALONE = re.compile(r"(?:(?:option|choice|answer)\b\W*)?[(\[]?\s*([A-J])\s*[)\]]?\s*[.:]?", re.IGNORECASE)
_WITH_TEXT = re.compile(
    r"(?:(?i:option|choice|answer)\b\W*)?(?:[(\[]([A-J])[)\]][.:]?|([A-J])\s*[).:])\s*(?!(?:or|and)\b)\S.*", re.DOTALL
)
_LEAD = re.compile(r".*\b(?:answer|choice|option|\u7b54\u6848)\s*(?:is|\u662f|\u4e3a)?\s*[:=\uff1a]?\s*", re.IGNORECASE)

_BETWEEN = r"(?:\s+|[:=\uff1a]\s*)(?:(?:is|be|was|option|choice|letter|answer|definitely|clearly|therefore|thus|the|correct)\b[\s:]*){0,6}"
_PHRASE = re.compile(
    r"(?:"
    rf"\b(?i:answer|choice|option|choose|pick|select|go with)(?i:{_BETWEEN})[(\[]?(?P<after>[A-J])[)\]]?(?![\w'\u2019+\-=/])"
    r"|(?<![\w'\u2019])[(\[]?(?P<before>[A-J])[)\]]?\s+is\s+(?:\w+\s+){0,2}(?:correct|right|best|answer)\b"
    r"|(?:\u7b54\u6848|\u6545\u9009)\s*(?:\u662f|\u4e3a|\uff1a|:)?\s*[(\uff08]?(?P<chinese>[A-J])(?![A-Za-z])"
    r")(?!\s*(?:,|/|&|or\b|and\b)\s*(?:option |choice )?[(\[]?[A-J](?![\w'\u2019]))"
)
_ARTICLE = re.compile(r"[ ]+(?!because\b|since\b|as\b|is\b|for\b|by\b|with\b|due\b)[a-z]")
_PARENTHESES = re.compile(r"\(\s*([A-J])\s*\)")


def read_reference(answer: str) -> str | None:
    """The letter of a reference answer, upper case; None if it is not one letter."""
    return _single(answer)


def grade_choice(reference: str, response: str) -> Grade:
    """Whether the response chooses the letter `reference`. Looks at the end of the response, in linear time."""
    chosen = read_choice(response)
    return Grade(0.0, "unparsed") if chosen is None else scored(float(chosen == reference))


def read_choice(response: str) -> str | None:
    """The letter a response ends with, upper case; None if there is none, or not one."""
    response = own_turn(response)
    tagged = last_tagged(response)
    if tagged is not None:
        letter = _single(last_box(tagged.content) or tagged.content)
        if tagged.closed or letter:
            return letter
    held = last_box(response)
    if held is not None:
        return _single(held)
    plain = _DRESS.sub("", response[-TAIL:]).strip()
    last = plain.rsplit("\n", 1)[-1].strip("# \t\r")
    lead = _LEAD.match(last)
    return _single(last) or _single(last[lead.end() :] if lead else "") or _named(plain) or _in_parentheses(plain)


def _single(text: str) -> str | None:
    """The letter of a text that is nothing else, but for brackets, macros and the text of the option."""
    text = _DRESS.sub("", text).strip()
    match = _ALONE.fullmatch(text) or _WITH_TEXT.fullmatch(text)
    return next(group for group in match.groups() if group).upper() if match else None


def _named(plain: str) -> str | None:
    """The letter of the last phrase that names it."""
    letter = None
    for match in _PHRASE.finditer(plain):
        found = next(group for group in match.groups() if group)
        if found not in "AI" or not _ARTICLE.match(plain, match.end()):
            letter = found
    return letter


def _in_parentheses(plain: str) -> str | None:
    found = _PARENTHESES.findall(plain)
    return found[-1] if found else None
