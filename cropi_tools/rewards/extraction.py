r"""Finding the answer in a response.

In this order, and of each kind the last: a pair of answer tags (`<answer>5</answer>`, for all verifiers alike), a box (`\boxed{5}`), a
sentence that names an answer (naming.py), a last line that is a list, the last number with the formula it stands in (values.py), the last line.
What follows in the voice of a user ("Human: ...") is not the response.

Only the end of the response is looked at outside tags and boxes, every search is linear, and an answer longer than MAX_ANSWER
characters counts as none, so that no response can make this slow.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from cropi_tools.rewards.answer_sentences import MAX_NAMED_WORDS, Kind, last_words, named_answer, named_rests
from cropi_tools.rewards.normalization import normalize, without_macros
from cropi_tools.rewards.text_values import LIST_OF_FORMULAS, LIST_OF_NUMBERS, has_prose, is_list, last_value, value_at

MAX_ANSWER = 1000
"""Longest answer that is compared, in characters (the longest reference of MATH and OlympiadBench has about 200)."""

TAIL = 2000
"""How many characters at the end of a response are searched for an answer that is neither tagged nor boxed."""

MAX_EMPTY = 10
"""How many boxes and tags without an answer (as in "put it in \\boxed{}") are passed over, from the end."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])|(?<![A-Za-z\\])boxed(?=\{)")
_BARE_BOX = re.compile(r"\s*((?:\\[A-Za-z]+|\{[^{}]{0,100}\}|[^\s{}$\\]){1,100})")
_BARE_ANSWER = re.compile(r"[-+\u2212.\\(\[]{0,3}(?:\d|[A-Za-z](?![A-Za-z]))|\\[A-Za-z]")
_OPEN_TAG = re.compile(r"<\s?(?:final[ _-]?)?answer(?:\s[^<>]{0,200})?>", re.IGNORECASE)
_CLOSE_TAG = re.compile(r"<\s?/\s?(?:final[ _-]?)?answer\s?>", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"(?:\\(?:text|mathrm|textbf)\s*\{)?\s*(?:\.{2,}|\u2026|\\[lc]?dots|(?:your |the |my |final |numerical |correct )*"
    r"(?:answer|result)(?: here)?)\s*\}?",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"\n[ \t*#]*(?:Human|User)[ *]*:|<\|im_(?:start|end)\|>|<\|(?:endoftext|eot_id|end_of_text|start_header_id|user|end)\|>|</s>|\[INST\]"
    r"|<(?:start|end)_of_turn>"
)
_NEXT_QUESTION = re.compile(
    r"\n[ \t*#]*(?:Q|Question|Problem|Exercise|Instruction)(?: ?\d+)?[ *]*:|\n#+[ *]*(?:Question|Problem|Exercise)\b"
)
_CHECK = re.compile(r"(?:^|\n|[.!?]\s)[ \t*#_]*(?:Check|Verification|Proof check)[ *_]*:", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|wait|instead|correct(?:ed|ion)?|but|however|actually|finally|answer|total)\b",
    re.IGNORECASE,
)
_SET_TEXT = re.compile(r"\\text(?:bf|it)?\s?\{([^{}]{0,200}\b(?:[Aa]nswer|[Rr]esult)\b[^{}]{0,200})\}")
_NEGATIVE = re.compile(r"\b[Nn]egative (?=[\d\\$])")
_MACRO = re.compile(r"\\(?:text|mbox|textrm|mathrm|operatorname)\s*\{[^{}]*\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]+")
_LETTER = re.compile(r"\(?([A-J])\)?")


class Tagged(NamedTuple):
    """What stands in answer tags, stripped; closed: between both of them."""

    content: str
    closed: bool


def extract_answer(response: str, reference: str | None = None) -> str | None:
    """The answer a response ends with, as written there, or None where there is none.

    reference: tells whether words are to be read as an answer. A last box that was never closed (a response cut short), or that holds
    more than MAX_ANSWER characters, is no answer.
    """
    kind = "words" if reference is None else kind_of(reference)
    response = own_turn(response)
    tagged = last_tagged(response)
    if tagged is not None and tagged.closed:
        answer = _of_content(tagged.content, kind)
        return answer if answer and len(answer) <= MAX_ANSWER else None
    box = last_box(response)
    if box is not None:
        return box or None
    if tagged is not None and len(tagged.content) <= MAX_ANSWER and not has_prose(tagged.content):
        return tagged.content
    tail = _before_next_question(plain_tail(response), kind)
    whole = named_rests(tail)[-2:-1] if reference is not None and _is_sentence(reference) else None
    answer = (whole and whole[0].strip('*_`" ')) or named_answer(tail, kind)
    if not answer and kind == "words":
        answer = last_words(_last_line(tail))
    if not answer and kind == "letter" and _LETTER.fullmatch(_last_line(tail).rstrip(".")):
        answer = _last_line(tail)
    answer = answer or plain_answer(tail) or _last_line(tail)
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def plain_tail(response: str) -> str:
    """The end of a response, with sentences that LaTeX sets as text, and "negative 3", as plain writing."""
    tail = response[-TAIL:].replace("\0", " ").rstrip()
    return _NEGATIVE.sub("-", _SET_TEXT.sub(r"\1", tail))


def plain_answer(tail: str) -> str | None:
    """The answer of a text in which nothing is tagged, boxed or named: a last line that is a list, else the last number with its formula."""
    return _of_last_line(tail) or last_value(_before_check(tail))


@lru_cache(maxsize=1 << 12)
def kind_of(reference: str) -> Kind:
    """Whether a reference is a letter of a choice, words, or a number or formula."""
    text = without_macros(normalize(reference))
    if _LETTER.fullmatch(text):
        return "letter"
    return "words" if _WORDS.fullmatch(text) else "value"


@lru_cache(maxsize=1 << 12)
def _is_sentence(reference: str) -> bool:
    """Whether a reference is longer text, which is compared as it is, and not a formula with a unit."""
    return len(without_macros(reference).split()) > MAX_NAMED_WORDS and (
        kind_of(reference) == "words" or has_prose(_MACRO.sub("", reference))
    )


def own_turn(response: str) -> str:
    """The response up to where it goes on in the voice of a user, or past the end of its turn."""
    first = len(response) - len(response.lstrip())
    for turn in _TURN.finditer(response):
        if turn.start() > first:
            return response[: turn.start()]
        first = max(first, turn.end())  # markup at the beginning of a response is not its end
    return response


def last_box(text: str) -> str | None:
    """Content of the last box that holds something; "" if that box is unclosed or too long; None if no box has content."""
    for box in reversed(list(_BOX.finditer(text))[-MAX_EMPTY:]):
        content = _box_content(text, box.end())
        if content is None:
            return ""
        if content.strip() and not _PLACEHOLDER.fullmatch(content.strip()):
            return _unwrapped(content.strip())
    return None


def last_tagged(text: str) -> Tagged | None:
    """What stands in the last pair of answer tags that holds something; without a pair, what follows a tag that was not closed, or
    goes before one that was not opened. None where there are no tags."""
    opened = [match.span() for match in _OPEN_TAG.finditer(text)]
    closed = [match.span() for match in _CLOSE_TAG.finditer(text)]
    starts = [start for start, _ in opened]
    ends = [start for start, _ in closed]
    before = len(closed)
    for _ in range(MAX_EMPTY):
        place = bisect_left(starts, ends[before - 1]) - 1 if before else -1
        if place < 0:
            break
        begin = opened[place][1]
        before = bisect_left(ends, begin)
        content = text[begin : ends[before]].strip()
        if content and not _PLACEHOLDER.fullmatch(content):
            return Tagged(content, True)
    if opened and (not closed or closed[-1][0] < opened[-1][0]):
        rest = text[opened[-1][1] :].strip()
        return Tagged(rest, False) if rest else None
    if closed and not opened:
        return Tagged(text[: closed[-1][0]].strip(), False)
    return None


def _of_content(content: str, kind: Kind) -> str | None:
    """The answer in a pair of tags: a box, the content itself, or what its sentences come to."""
    box = last_box(content)
    if box is not None:
        return box or None
    named = named_answer(content[-TAIL:], kind)
    if kind != "value" or not has_prose(content):
        return named or content
    content = content[-TAIL:]
    if "\n" not in content and len(content.split()) <= 6 and value_at(content, 0):
        return content
    return named or last_value(content) or content


def _of_last_line(tail: str) -> str | None:
    """A last line that is a list of numbers or formulas and nothing else."""
    line = _last_line(tail).rstrip(".")
    return line if LIST_OF_FORMULAS.fullmatch(line) or LIST_OF_NUMBERS.fullmatch(line) or is_list(line) else None


def _last_line(tail: str) -> str:
    return tail.rsplit("\n", 1)[-1].strip("#* \t\r")


def _before_next_question(tail: str, kind: Kind) -> str:
    """The text up to where another question begins after an answer was named, as a policy runs on with more examples."""
    for question in islice(_NEXT_QUESTION.finditer(tail), MAX_EMPTY):
        if named_answer(tail[: question.start()], kind) is not None:
            return tail[: question.start()]
    return tail


def _before_check(tail: str) -> str:
    """The text without a check at its end that comes to nothing new ("Check: 3 + 2 = 5.")."""
    check = None
    for check in _CHECK.finditer(tail):  # noqa: B007
        pass
    if check is None or _CONCLUDES.search(tail, check.end()) or last_value(tail[: check.start()]) is None:
        return tail
    return tail[: check.start()]


def _unwrapped(content: str) -> str:
    """A box in a box."""
    inner = _BOX.match(content)
    held = _box_content(content, inner.end()) if inner else None
    return held.strip() if held and held.strip() else content


def _box_content(text: str, at: int) -> str | None:
    r"""What stands in the braces that open at `at`; escaped ones do not count: `\left\{ ... \right.` is unbalanced.

    Without braces what follows, if it looks like an answer: `\boxed5`, `\boxed \frac12`.
    """
    at = re.compile(r"\s*(?=\{)").match(text, at).end() if re.compile(r"\s*\{").match(text, at) else at  # type: ignore[union-attr]
    if not text.startswith("{", at):
        bare = _BARE_BOX.match(text, at)
        content = bare.group(1).rstrip(".,;:!?)*") if bare else ""
        return content if _BARE_ANSWER.match(content) else ""
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
