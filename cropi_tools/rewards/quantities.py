r"""Numbers as people write them, exactly: "1,200", "-\frac{3}{4}", "1 1/2", "1.5 \times 10^3", "0.1\overline{6}", "5 \text{ cm}^2".

Units are ignored, as in every public verifier: 5 m is 5 cm. A percent sign or a scale word ("million") may be read or left out when
only one of the two answers has it, since questions ask for "how many per cent" and "in millions". A letter by itself ("5 m")
is algebra, not a unit, except for "5 m^2".
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from typing import NamedTuple

from cropi_tools.rewards.normalization import spaced_macros

DECIMALS = 6
"""Decimal places to which two numbers must agree when one is written as a decimal (math-verify's rule as well)."""

SMALL = Fraction(1, 1000)
"""Largest relative difference of two such numbers, where six decimals would leave no digit to compare."""

MAX_CONTINUED = 60
"""Most decimals that are searched for the block that "..." repeats."""

_NUMBER = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+"
_FRACTION = (
    r"\\frac\s*(?:\{{\s*(?P<top{0}>[-+]?\d+)\s*\}}|(?P<top_digit{0}>\d))"
    r"\s*(?:\{{\s*(?P<bottom{0}>[-+]?\d+)\s*\}}|(?P<bottom_digit{0}>\d))"
)
_QUANTITY = re.compile(
    r"(?P<sign>[-+]?)\s*(?:"
    r"(?P<whole>\d+)(?:\s+(?P<over_whole>\d+)\s*/\s*(?P<under_whole>\d+)|\s*" + _FRACTION.format("_whole") + r")"
    r"|(?P<fixed>\d*\.\d*)(?:\\(?:overline|bar|dot)\s*(?:\{\s*(?P<repeat>\d+)\s*\}|(?P<repeat_digit>\d))|\s*\\(?:ldots|dots|cdots))"
    r"|(?P<number>" + _NUMBER + r")"
    r"(?:\s*(?:\\times|\\cdot|\*|[xX])\s*10\s*\^\s*(?:\{\s*(?P<power>[-+]?\d{1,3})\s*\}|(?P<power_bare>-?\d{1,3}))|[eE](?P<power_e>[-+]?\d{1,3})"
    r"|\s*/\s*(?P<over>\d+))?"
    r"|" + _FRACTION.format("") + r")(?P<rest>.*)",
    re.DOTALL,
)
_PLAIN = re.compile(r"\(\s*([^(),\[\]]*)\)")
_EXPONENT = re.compile(r"\^\s*\{?\s*[23]\s*\}?\s*$")
_UNIT_WORDS = re.compile(r"[A-Za-z]+(?:[ ./][A-Za-z]*)*")
_SHORT_UNIT = re.compile(r"cm|mm|km|kg|mg|ml|hr|hrs|min|mins|sec|secs|ft|in|lb|lbs|oz|mi|mph|kph|usd|eur")
_RATE = re.compile(
    r"(?:m|km|cm|ft|mi|g|kg|l|miles?|meters?|metres?) ?/ ?(?:s|h|hr|hour|min|minute|sec|second|day|l|kg|m|cm)"
)
_NOT_UNIT = re.compile(
    r"pi|sqrt|sin|cos|tan|cot|csc|log|exp|over|infty|mod|plus|minus|times|divided|more|"
    r"less|than|choose|half|squared|cubed|factorial|to|from|a|p|am|pm|i|e"
)
_UNIT_AFTER_FORMULA = re.compile(
    r"(?:\s*\\(?:text|mbox|textrm|mathrm)\s*\{[^{}]*\}"
    r"|(?<=[\d)}\]i])(?: (?:square|cubic|sq|cu|units?|cm|mm|km|in|ft|inch(?:es)?|feet|foot|yards?|miles?|(?:kilo|centi|milli)?met(?:er|re)s?"
    r"|degrees?|radians?|seconds?|minutes?|hours?|days?|dollars?|cents?))+)(?:\s*\^\s*\{?\s*[23]\s*\}?)?$"
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


class Quantity(NamedTuple):
    """A number as written: its value, the factor of a percent sign or scale word (else 1), whether it is a decimal."""

    value: Fraction
    scale: Fraction = Fraction(1)
    decimal: bool = False


def read_quantity(text: str) -> Quantity | None:
    """A normalized answer as a number with an optional unit; None if it is anything else."""
    plain = _PLAIN.fullmatch(text)
    match = _QUANTITY.fullmatch(plain.group(1) if plain else text)
    if match is None:
        return None
    scale = _read_unit(match["rest"])
    value = None if scale is None else _value(match)
    if scale is None or value is None:
        return None
    decimal = match["number"] is not None and "." in match["number"]
    return Quantity(-value if match["sign"] == "-" else value, scale, decimal)


def same_quantity(first: Quantity, second: Quantity) -> bool:
    """Whether two numbers are equal: exactly, or to DECIMALS places where one of them is written as a decimal."""
    if first.scale == second.scale:
        pairs = [(first.value, second.value)]
    else:
        pairs = [(first.value * first.scale, second.value * second.scale)]
        if 1 in (first.scale, second.scale):
            pairs.append((first.value, second.value))
    if first.decimal or second.decimal:
        return any(same_decimals(a, b) for a, b in pairs)
    return any(a == b for a, b in pairs)


def same_decimals(first: Fraction, second: Fraction) -> bool:
    """Whether two numbers agree to DECIMALS places, and relative to their size, so that nothing small is taken for zero."""
    close = abs(first - second) <= SMALL * max(abs(first), abs(second))
    return close and round(first, DECIMALS) == round(second, DECIMALS)


def without_unit(text: str) -> str:
    r"""A normalized formula without the unit at its end: `8\sqrt{3} \text{ square inches}` becomes `8\sqrt{3}`."""
    match = _UNIT_AFTER_FORMULA.search(text)
    if match is None or match.start() == 0 or _read_unit(match.group()) != 1:
        return text
    return text[: match.start()]


def _value(match: re.Match[str]) -> Fraction | None:
    """The number without sign and unit; None if it has a zero below a fraction bar, or is no number after all."""
    if match["whole"] is not None:
        part = _fraction(*_parts(match, "_whole", "over_whole", "under_whole"))
        return int(match["whole"]) + part if part is not None and 0 < part < 1 else None
    if match["fixed"] is not None:
        block = match["repeat"] or match["repeat_digit"]
        return _repeating(match["fixed"], block) if block else _continued(match["fixed"])
    if match["number"] is not None:
        number = Fraction(match["number"].replace(",", "").rstrip("."))
        power = match["power"] or match["power_bare"] or match["power_e"]
        if power is not None:
            return number * Fraction(10) ** int(power)
        over = int(match["over"] or 1)
        return number / over if over else None
    return _fraction(*_parts(match, "", None, None))


def _parts(match: re.Match[str], name: str, over: str | None, under: str | None) -> tuple[int, int]:
    """Numerator and denominator, of the group names of either way to write a fraction."""
    if over is not None and under is not None and match[over] is not None:
        return int(match[over]), int(match[under])
    return int(match[f"top{name}"] or match[f"top_digit{name}"]), int(
        match[f"bottom{name}"] or match[f"bottom_digit{name}"]
    )


def _fraction(top: int, bottom: int) -> Fraction | None:
    return Fraction(top, bottom) if bottom else None


def _repeating(fixed: str, block: str) -> Fraction:
    """fixed, such as "0.1", with the digits of `block` repeated for ever after it."""
    digits = len(fixed.partition(".")[2])
    return Fraction(f"0{fixed}0") + Fraction(int(block), (10 ** len(block) - 1) * 10**digits)


def _continued(fixed: str) -> Fraction | None:
    """A decimal that goes on as it ends ("0.1666...", "0.142857142857..."), by the block whose repetitions reach furthest back.

    None if no block comes twice (one digit: three times), or there are more than MAX_CONTINUED digits.
    """
    digits = fixed.partition(".")[2][::-1]
    reach = {}
    for length in range(1, len(digits) // 2 + 1 if len(digits) <= MAX_CONTINUED else 1):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(digits, digits[length:], strict=False))
        reach[length] = length + sum(1 for _ in same)
    length = max(reach, key=lambda length: reach[length], default=0)
    return _repeating(fixed, digits[:length][::-1]) if length and reach[length] >= max(3, 2 * length) else None


def _read_unit(rest: str) -> Fraction | None:
    """The factor that a unit stands for (1 for centimetres or dollars), or None if `rest` is no unit but algebra."""
    spaced, in_text = rest[:1] == " ", "\\" in rest and spaced_macros(rest) != rest
    text = spaced_macros(rest).strip(" .")
    if not text:
        return Fraction(1)
    if text == "\\%":
        return _SCALES["%"]
    bare = _EXPONENT.sub("", text).strip(" .")
    if spaced and bare == "m" != text:  # square or cubic meters, apart from their number, are no algebra
        return Fraction(1)
    text = bare
    if not _UNIT_WORDS.fullmatch(text):
        return None
    if _RATE.fullmatch(text.lower()):
        return Fraction(1)
    words = text.lower().replace(".", " ").replace("/", " ").split()
    if any(_NOT_UNIT.fullmatch(word) for word in words):
        return None
    scale = _SCALES.get(words[0], Fraction(1))
    known = scale != 1 or in_text or _SHORT_UNIT.fullmatch(words[0]) is not None
    return scale if known or (spaced and len(words[0]) >= 3) else None
