"""Comparing two formulas: math-verify parses them and knows sets, intervals and relations; whether two values are equal is decided here.

math-verify takes values for equal whose difference is small, whatever they are: 1/2004! for 1/2006!. Here numbers without decimals are
equal if they are exactly so (rational numbers by arithmetic, others if their difference has no digit among the first WORKING_DIGITS), and
where a decimal occurs, as written numbers are (`quantities.same_decimals`). Its own time limits are switched off, because they use SIGALRM
(which fails off the main thread) and do not interrupt compiled code.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from cropi_tools.rewards.quantities import DECIMALS, same_decimals

WORKING_DIGITS = 400
"""Most digits to which a difference is computed to learn whether it is zero: what is smaller than its terms by so many digits is."""

DECIMAL_DIGITS = 50
"""Digits to which numbers are computed that are compared as decimals, beside those before the point."""

POINT_DIGITS = 30
"""Digits to which two expressions are computed at a point."""


def equal_formulas(reference: str, answer: str) -> bool | None:
    """Whether two normalized answers are equal; None if nothing can be read in the answer. May never end, or exhaust memory."""
    from math_verify import verify

    gold, candidate = _parse(reference), _parse(answer)
    if all(isinstance(value, str) for value in candidate):
        return None
    if not any(_is_equation(value) for value in gold):
        candidate = tuple(_solved(value) for value in candidate)
    # math-verify is asymmetric (it simplifies assignments of the second only): the reference goes first. Relations and
    # sets may be compared, so that `2 \\le x < 5` answers `[2,5)`.
    with _our_equality():
        return verify(
            list(gold), list(candidate), float_rounding=DECIMALS, allow_set_relation_comp=True, timeout_seconds=None
        )


def same_value(first: Any, second: Any) -> bool:
    """Whether two sympy expressions, or matrices of them, have the same value.

    A percent sign may be left out, as in plain numbers.
    """
    from sympy import MatrixBase, MatrixExpr

    if isinstance(first, MatrixBase | MatrixExpr) or isinstance(second, MatrixBase | MatrixExpr):
        first, second = _evaluated(first), _evaluated(second)
        if not (isinstance(first, MatrixBase) and isinstance(second, MatrixBase)):
            return bool(first == second)
        return first.shape == second.shape and all(map(same_value, first.flat(), second.flat()))
    (one, one_percent), (other, other_percent) = _without_percent(first), _without_percent(second)
    if one_percent == other_percent:
        return _same(one, other)
    return _same(one, other) or _same(first, second)


@contextmanager
def _our_equality() -> Iterator[None]:
    """math-verify with `same_value` in place of its own two comparisons, for as long as this lasts: a user's function that calls it in the
    same process has it as it is."""
    from math_verify import grader

    kept = grader.sympy_numeric_eq, grader.sympy_symbolic_eq
    grader.sympy_numeric_eq = lambda first, second, *_: same_value(first, second)
    grader.sympy_symbolic_eq = lambda *_: False
    try:
        yield
    finally:
        grader.sympy_numeric_eq, grader.sympy_symbolic_eq = kept


def _same(first: Any, second: Any) -> bool:
    from sympy import Expr, Float, nsimplify

    if not (isinstance(first, Expr) and isinstance(second, Expr)):
        return bool(_evaluated(first) == _evaluated(second))
    decimal = bool(first.has(Float) or second.has(Float))
    if decimal:  # decimals are exact as they are written: no rounding error comes of computing with them
        first, second = (nsimplify(value, rational=True) for value in (first, second))
    first, second = _evaluated(first), _evaluated(second)
    if first == second:
        return True
    symbols = first.free_symbols | second.free_symbols
    if symbols:
        return _same_functions(first, second) or (decimal and _same_coefficients(first, second))
    return _near(first, second) if decimal else _same_numbers(first, second)


def _same_numbers(first: Any, second: Any) -> bool:
    """Whether two numbers without decimals are equal."""
    difference = first - second
    if difference.is_Rational:
        return bool(difference == 0)
    parts = difference.evalf(20, maxn=WORKING_DIGITS).as_real_imag()
    # sympy gives a number of which no digit is certain the precision 1
    return all(part.is_zero or (part.is_Float and part._prec == 1) for part in parts)


def _near(first: Any, second: Any) -> bool:
    """Whether two numbers agree as decimals do, in their real and imaginary parts."""
    if first.is_Rational and second.is_Rational:
        return same_decimals(_fraction(first), _fraction(second))
    size = abs(first.evalf(5))
    digits = DECIMAL_DIGITS + (int(size).bit_length() if size.is_comparable and size.is_finite else 0)
    pairs = zip(first.evalf(digits).as_real_imag(), second.evalf(digits).as_real_imag(), strict=True)
    return all(
        _finite(one) and _finite(other) and same_decimals(_fraction(one), _fraction(other)) for one, other in pairs
    )


def _same_functions(first: Any, second: Any) -> bool:
    """Whether two expressions without decimals are equal whatever their unknowns are: at one point first, then by algebra."""
    from sympy import Rational, expand, simplify

    difference = expand(first - second)
    if difference == 0:
        return True
    symbols = sorted(difference.free_symbols | first.free_symbols | second.free_symbols, key=str)
    point = {symbol: Rational(13 + 7 * number, 11 + 3 * number) for number, symbol in enumerate(symbols)}
    try:
        one, other = (value.subs(point).evalf(POINT_DIGITS) for value in (first, second))
        apart, scale = abs(one - other), max(abs(one), abs(other))
        if apart.is_comparable and apart > scale * 10 ** -(POINT_DIGITS // 2):
            return False
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        pass  # not to be computed at a point: integrals, undefined functions
    return bool(simplify(difference) == 0)


def _same_coefficients(first: Any, second: Any) -> bool:
    """Whether two sums have the same terms with coefficients that agree as decimals do."""
    from sympy import expand

    one, other = (expand(value).as_coefficients_dict() for value in (first, second))
    return one.keys() == other.keys() and all(_near(one[term], other[term]) for term in one)


def _finite(number: Any) -> bool:
    return bool(number.is_comparable and number.is_finite)


def _fraction(number: Any) -> Any:
    from fractions import Fraction

    from sympy import Rational

    exact = Rational(number)
    return Fraction(int(exact.p), int(exact.q))


def _evaluated(value: Any) -> Any:
    """A value with the sums and products carried out that the parser leaves as they were written."""
    try:
        return value.doit()
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return value


def _without_percent(value: Any) -> tuple[Any, bool]:
    """A value without the factor that the parser makes of a percent sign, and whether it had one."""
    from sympy import Mul, Rational, UnevaluatedExpr

    percent = UnevaluatedExpr(Rational(1, 100))
    if isinstance(value, Mul) and percent in value.args:
        return Mul(*(part for part in value.args if part != percent)), True
    return value, False


@lru_cache(maxsize=1 << 12)
def _parse(text: str) -> tuple[Any, ...]:
    r"""What math-verify reads in a normalized answer: sympy objects, and the text itself where it found none.

    Relations joined by `\lor` become the union of their solutions.
    """
    from math_verify import parse

    # It warns once that its time limits are off; they are off on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if "\\lor" in text:
        from sympy import Union

        parts = [_parse(part.strip(" ,"))[:1] for part in text.split("\\lor")]
        if all(part and not isinstance(part[0], str) and hasattr(part[0], "as_set") for part in parts):
            return (Union(*(part[0].as_set() for part in parts)),)
        text = text.replace("\\lor", ",")
    return tuple(_carried_out(value) for value in parse(f"\\boxed{{{text}}}", parsing_timeout=None))


def _carried_out(value: Any) -> Any:
    """A product as it is after multiplication by 1, and `i` as the imaginary unit where no other unknown occurs."""
    from sympy import Expr, I, Mul

    if isinstance(value, Mul) and 1 in value.args:
        value = Mul(*(part for part in value.args if part != 1))
    if isinstance(value, Expr) and {symbol.name for symbol in value.free_symbols} == {"i"}:
        value = value.subs(dict.fromkeys(value.free_symbols, I))
    return value


def _is_equation(value: Any) -> bool:
    from sympy import Eq

    return isinstance(value, Eq) or any(isinstance(part, Eq) for part in getattr(value, "args", ()))


def _solved(value: Any) -> Any:
    """What an equation answers: itself, where something that has a name equals something; its value, where it is written
    the other way round (`5 = x`); nothing (a text that equals no formula), where its only unknown does not stand alone."""
    from sympy import E, Eq, Function, Mul, Symbol

    if not isinstance(value, Eq):
        return value
    left, right = value.args
    if isinstance(right, Symbol) and not left.free_symbols:
        return left
    named = isinstance(left, Symbol | Function) or (
        isinstance(left, Mul) and all(part == E or isinstance(part, Symbol) for part in left.args)
    )
    return value if named or len(left.free_symbols) != 1 else "an equation that is not solved"
