r"""Sentences that name an answer: "The answer is 5", "**Final answer:** $\frac12$", "5 is the answer", "#### 5", "答案是 5".

The last sentence decides whose candidate looks like an answer: a number, a formula, a list of them, a letter or a few words. What is said
about an answer ("the answer is correct", "I hope this answer helps", "the answer we want") names none, nor do a guess ("the answer could
be 5"), a condition ("if the answer is 5") and a denial ("the answer is not 5").
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from cropi_tools.rewards.text_values import last_value, numbered_line, values_at

MAX_NAMED_WORDS = 3
"""Most words of an answer that is neither number nor formula."""

Kind = Literal["value", "words", "letter"]
"""What the reference is: a number or formula, words, or the letter of a choice."""

_REACH = 120  # characters of a sentence that are looked at between "answer" and what it is

_CUE = re.compile(
    r"####|(?<![A-Za-z])(?:answers?|ans|results?|solutions?)(?![A-Za-z])"
    r"|\u7b54\u6848|\u7b54\u3048|\uc815\ub2f5|\ub2f5\uc740|r\u00e9ponse|respuesta|resposta|risposta|antwort|\u043e\u0442\u0432\u0435\u0442",
    re.IGNORECASE,
)
_COPULA = re.compile(
    r"(?P<verb>\b(?:is|are|was|were|equals?|becomes|remains|est|es|ist|lautet|sono|s\u00e3o)\b"
    r"|(?<!could )(?<!might )(?<!may )(?<!can )(?<!cannot )(?<!not )(?<!n't )\bbe\b"
    r"|\u00e8|\u00e9|\u662f|\u4e3a|\u70ba|\u306f|\u2014)|[:\uff1a=\u2248\u2192\u21d2]|->|=>",
    re.IGNORECASE,
)
_MARKUP = r"[\s*_\"'`\u201c\u201d\u2018\u2019]*"
_FILLER = re.compile(
    _MARKUP
    + r"(?:(?:therefore|thus|then|hence|so|simply|just|indeed|also|clearly|actually|really|now|still|only|exactly|precisely|definitely|obviously"
    r"|approximately|about|around|roughly|nearly|equal to|given by|found to be|going to be|again|not [^.,\n]{1,20},? but(?: rather| instead)?"
    r"|in fact|of course|the (?:following|number|value)|option|choice)\b[\s,:*]*|```[a-z]*\s+|[:=\u2248]\s*)*"
    + _MARKUP,
    re.IGNORECASE,
)
# Words that may lead to the value ("the answer is that there are 5 apples"); after a preposition, a conjunction or a denial it is another's.
_WORDS_BEFORE = re.compile(
    r"(?:(?!(?:of|in|on|at|by|with|for|from|to|into|than|as|because|since|if|when|whether|which|while|after|before|between|among|per|or|and"
    r"|but|not|never|no|step|part|problem|question|case|equation|correct|right|wrong|more|less|fewer|both|either)\b)[A-Za-z][A-Za-z'\u2019]*[ ]+"
    r"|total of[ ]+){1,6}"
    r"(?=[*$\\\d({\[\u20ac\u00a3.\u2212-])",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\s*(?:not|n['\u2019]t|never|no longer)\b", re.IGNORECASE)
_CONDITION = re.compile(
    r"(?:\b(?:if|whether|suppose|supposing|assume|assuming|unless|not|wrong)\s+(?:that\s+)?)(?:the|my|your|our|this|that|an?|[A-Za-z]+ly)?[\s*_]*(?:final|correct|right)?[\s*_]*$",
    re.IGNORECASE,
)
_CALCULATION_GOES_ON = re.compile(
    r"[^\n.,;:!?()=]{0,40}?(?:\s[-+*/\u00d7\u00f7\u00b7]\s|[=<>\u2248])|\s+(?:times|plus|minus|more|less|fewer|divided|multiplied)\b"
)
_GUESS_GOES_ON = re.compile(r"[*_`]*\s+or\b(?!\s+(?:about|approximately|simply|equivalently))", re.IGNORECASE)
_FEW_WORDS_MORE = re.compile(
    r"[*_\"'`]*(?:\s?[A-Za-z%\u00b0][A-Za-z'\u2019/\u00b2\u00b3^-]*){0,4}[*_\"'`)]*(?:[.!?,;:](?:\s|$)|\s*(?:\n|$|[(\u2014-]|because\b|since\b|so\b|as\b|which\b|when\b|for\b))"
)
_NAMED_AFTER = re.compile(
    r"(?:\b(?:is|are|was|be)|'s|=)\s+(?:indeed\s+|therefore\s+|thus\s+|also\s+)?(?:the|our|my|your)\s+(?:[a-z]+\s+){0,2}[*_]*$",
    re.IGNORECASE,
)
_TRAILING_WORDS = re.compile(r"[\s,*_`$)}\]\\]*(?:[A-Za-z%\u00b0][A-Za-z'\u2019/^-]*[\s,*_`]*){0,4}")
_HEADING = re.compile(r"[\s#*_>-]*(?:(?:the|my|your|our|so|and)\s+)*(?:final |correct |short )?$", re.IGNORECASE)
_ANSWER_START = re.compile(r"[-+\u2212$\u20ac\u00a3\\(\[{.]{0,4}[\d\\(\[{]")
_CLAUSE_END = re.compile(
    r"[.!?;:,](?=\s|[*_\"')]|$)|\n|\s(?:because|since|as|so|for|which|where|when|if)\b|\s[\u2014-]\s|\u3002"
)
_FIRST_SENTENCE = re.compile(r"[^\n]*?(?=[.!?]['\"*_`]*\s+[A-Z]|\n|$)")
_WORD = re.compile(r"[A-Za-z][A-Za-z'\u2019-]*(?: [A-Za-z][A-Za-z'\u2019-]*)*")
_SAID = re.compile(
    r"correct|right|wrong|incorrect|verified|valid|invalid|confirmed|checked|consistent|reasonable|clear|obvious|unclear|simple|easy|hard|good|fine"
    r"|below|above|given|shown|found|complete|final|ready|done|helpful|based|determined|calculated|obtained|computed|derived|expected|required|needed"
    r"|accurate|sound|unique|known|unknown|likely|boxed|provided|described|explained|same|following"
)
"""What is said about an answer, and is none."""

_NO_ANSWER = re.compile(
    _SAID.pattern
    + r"|here|there|this|that|it|what|as|follows|yours|not|we|i|you|he|she|they|looking|also|therefore|thus|then|so"
    r"|answer|result|to|of|in|at|by|for|with"
)
_ARTICLES = ("the", "a", "an")
_LETTER = re.compile(r"[(\[]?([A-J])[)\]]?(?=[.:)\s*,!]|$)(?! [a-z])")
_LETTERS = re.compile(r"[A-Z](?:(?:,\s?|,?\s(?:and|or)\s)[A-Z](?![\w'\u2019]))+")


class Named(NamedTuple):
    """An answer that a sentence names. exact: as a number or formula, not as words or a letter."""

    text: str
    is_value: bool


def named_answer(text: str, kind: Kind = "value") -> str | None:
    """What the last sentence that names an answer says it is; None where no sentence does.

    kind: of the reference. Where it is a number or formula, words ("The answer is Tuesday.") count only if no sentence names a value.
    """
    words = None
    for cue in reversed(list(_CUE.finditer(text))):
        found = _after_hashes(text, cue) if cue.group() == "####" else _named_by(text, cue, kind)
        if found is None:
            continue
        if found.is_value or kind != "value":
            return found.text
        words = words or found.text
    return words


def mentions_answer(text: str) -> bool:
    """Whether a text speaks of an answer at all."""
    return _CUE.search(text) is not None


def named_rests(text: str) -> list[str]:
    """The rest of the line after the last "the answer is", "answer:" or "####": as it stands there, up to the end of its first sentence with and
    without the period, and all of these without markup and words that lead to it.

    For answers that have a form of their own (dates, moves, sentences, lists of words). Empty where there is no such line.
    """
    for cue in reversed(list(_CUE.finditer(text))):
        if _CONDITION.search(text, max(0, cue.start() - 60), cue.start()):
            continue
        begin = cue.end() if cue.group() == "####" else _begin(text, cue)
        if begin is None:
            continue
        filler = _FILLER.match(text, begin)
        assert filler is not None
        starts = [begin + len(text[begin:]) - len(text[begin:].lstrip(" *:\n")), filler.end()]
        sentences = [_FIRST_SENTENCE.match(text, start) for start in starts]
        words = text[starts[1] :].split(None, 1)
        if not words or _SAID.fullmatch(words[0].strip(".!").lower()):
            continue
        found = [text[start:].split("\n", 1)[0] for start in starts]
        found += [
            text[start : sentence.end() + more]
            for start, sentence in zip(starts, sentences, strict=True)
            if sentence
            for more in (0, 1)
        ]
        return [rest.strip() for rest in found if rest.strip()]
    return []


def last_words(line: str) -> str | None:
    """The few words after the last "is" of a line's last sentence: "So the function is even."."""
    line = line[-200:]
    copulas = [copula for copula in _COPULA.finditer(line) if copula["verb"]]
    found = _words(line, copulas[-1].end() + 1, "words") if copulas else None
    return None if found is None else found.text


def _begin(text: str, cue: re.Match[str]) -> int | None:
    """Where what is named after a cue begins: after a copula, a colon, or the heading that it is."""
    stop = _sentence_end(text, cue.end())
    copula = _COPULA.search(text, cue.end(), stop)
    if copula is not None:
        return None if _DENIAL.match(text, copula.end()) and not _but(text, copula.end()) else copula.end()
    return _heading_end(text, cue)


def _named_by(text: str, cue: re.Match[str], kind: Kind) -> Named | None:
    if _CONDITION.search(text, max(0, cue.start() - 60), cue.start()):
        return None
    before = _named_before(text, cue, kind)
    if before is not None:
        return before
    stop = _sentence_end(text, cue.end())
    solution = cue.group().lower().startswith("solution")
    for copula in _COPULA.finditer(text, cue.end(), stop):
        if (solution and copula["verb"] is None) or (
            _DENIAL.match(text, copula.end()) and not _but(text, copula.end())
        ):
            continue
        found = _candidate(text, copula.end(), kind)
        if found is not None:
            return found
    heading = None if solution else _heading_end(text, cue)
    return None if heading is None else _candidate(text, heading, kind)


def _but(text: str, at: int) -> bool:
    """Whether a denial goes on to what is meant: "not 5 but 7"."""
    filler = _FILLER.match(text, at)
    return filler is not None and " but" in filler.group()


def _heading_end(text: str, cue: re.Match[str]) -> int | None:
    """The end of a line that is a heading ("## Final Answer", "**Answer**"), or of "Ans." at its start; else None."""
    start = text.rfind("\n", 0, cue.start()) + 1
    if not _HEADING.fullmatch(text, start, cue.start()):
        return None
    end = re.compile(r"[*_#.: ]*\n|(?<=ns)[. ]+").match(text, cue.end())
    return None if end is None else end.end()


def _candidate(text: str, at: int, kind: Kind) -> Named | None:
    """What starts after a copula, perhaps after a few words that lead to it."""
    filler = _FILLER.match(text, at)
    assert filler is not None
    new_line = "\n" in text[max(0, at - 1) : filler.end()]
    at = filler.end()
    letters = _LETTERS.match(text, at)
    if letters is not None:
        return Named(letters.group(), True)
    if kind == "letter":
        letter = _LETTER.match(text, at)
        if letter is not None:
            return Named(letter.group(1), False)
    if new_line and numbered_line(text, at):
        return None
    found = values_at(text, at)
    if found is not None:
        if _GUESS_GOES_ON.match(text, found[1]):
            return None
        return None if _CALCULATION_GOES_ON.match(text, found[1]) else Named(found[0], True)
    before = _WORDS_BEFORE.match(text, at)
    if before is not None:
        start = re.compile(r"[*_`]*").match(text, before.end()).end()  # type: ignore[union-attr]
        found = values_at(text, start)
        fits = (
            found is not None
            and _FEW_WORDS_MORE.match(text, found[1])
            and not _CALCULATION_GOES_ON.match(text, found[1])
        )
        return Named(found[0], True) if found is not None and fits else None
    return _words(text, at, kind)


def _words(text: str, at: int, kind: Kind) -> Named | None:
    r"""A few words, or a letter, that end a clause: "Tuesday", "no solution", "x"."""
    end = _CLAUSE_END.search(text, at, at + 60)
    if end is None and len(text) - at > 60:
        return None
    words = text[at : end.start() if end else len(text)].strip("*_`\"' \u201c\u201d}")
    if not _WORD.fullmatch(words):
        return None
    each = words.lower().split()
    if len(words) == 1:
        return Named(words, True)
    if len(each) > MAX_NAMED_WORDS or not _free_of_comment(each) or (kind == "value" and each[0] in _ARTICLES):
        return None
    return Named(words, False)


def _free_of_comment(words: list[str]) -> bool:
    return not any(map(_NO_ANSWER.fullmatch, words))


def _named_before(text: str, cue: re.Match[str], kind: Kind) -> Named | None:
    """The value in "so 5 is the answer": the last of what stands before, in the same sentence, and not far from the copula."""
    first = max(0, cue.start() - _REACH)
    copula = _NAMED_AFTER.search(text, first, cue.start())
    if copula is None:
        return None
    breaks = [match.end() for match in re.compile(r"[.!?]\s|\n|: ").finditer(text, first, copula.start())]
    sentence = text[breaks[-1] if breaks else first : copula.start()]
    value = last_value(sentence)
    if value is not None:
        place = sentence.rfind(value)
        rest = _TRAILING_WORDS.fullmatch(sentence, place + len(value)) if place >= 0 else None
        return Named(value, True) if rest is not None else None
    formula = re.compile(r"\$([^$]+)\$\s*[*_]*\s*$|\\\((.+)\\\)\s*[*_]*\s*$").search(sentence)
    if formula is not None:
        return Named((formula.group(1) or formula.group(2)).strip(), True)
    if kind == "value":
        return None
    words = re.sub(
        r"^.*(?:,|\b(?:so|thus|hence|therefore|that|option|choice))\s+", "", sentence, flags=re.IGNORECASE | re.DOTALL
    ).strip(" *_`\"'()")
    each = words.lower().split()
    good = _WORD.fullmatch(words) is not None and len(each) <= MAX_NAMED_WORDS and _free_of_comment(each)
    return Named(words, False) if good else None


def _sentence_end(text: str, at: int) -> int:
    """Where the sentence that holds a place ends, at most _REACH characters on."""
    end = re.compile(r"[.!?](?=\s|$)|\n\s*\n|\n(?=[-*#\d])|\u3002").search(text, at, at + _REACH)
    return end.start() if end else min(len(text), at + _REACH)


def _after_hashes(text: str, cue: re.Match[str]) -> Named | None:
    """The rest of a `####` line that starts like a value: the same mark opens headings in Markdown."""
    line = text[cue.end() :].split("\n", 1)[0].strip(" \t\r")
    if not _ANSWER_START.match(line) or numbered_line(line, 0):
        return None
    return Named(line.strip("*# \t\r"), True)
