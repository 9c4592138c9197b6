"""reasoning-gym's families: their settings from text or JSON, their entries as JSON values, and the templates that turn
an entry into a short question and answer. `sources` makes prompts of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import enum
import re
import string
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cropi_tools.rewards.generated import NO_ANSWER
from cropi_tools.runtime.clock import importing
from cropi_tools.runtime.errors import UsageError

_EMPTY_BRACES = re.compile(r"(?<!\{)\{\}(?!\})")
_CONVERSIONS: dict[str, Callable[[str], str]] = {
    "nospace": lambda text: "".join(text.split()),
    "lower": str.lower,
    "upper": str.upper,
}


def family_maker(family: str, settings: Mapping[str, Any], start: int) -> Callable[[int], Any]:
    """A function from a size to the family's dataset; checks family and settings."""
    with importing():
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise UsageError(f"reasoning-gym has no family {family!r}{near(family, DATASETS)}")
    config = DATASETS[family][1]
    hints = {name: hint for name, hint in typing.get_type_hints(config).items() if name not in ("seed", "size")}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    values = {}
    for key, value in settings.items():
        if key not in hints:
            instead = "; give it as --" + key if key in ("seed", "size") else near(key, hints)
            raise UsageError(f"{family} has no setting {key!r}{instead}")
        try:
            values[key] = _typed(value, hints[key], defaults[key])
        except (ValueError, TypeError, KeyError, ArithmeticError, LookupError, AttributeError):
            raise UsageError(f"{family}: {key}={value} is not {_kind(hints[key])}") from None

    def make(size: int) -> Any:
        try:
            return reasoning_gym.create_dataset(family, size=size, seed=start, **values)
        except (AssertionError, ValueError, TypeError) as error:
            raise UsageError(f"reasoning-gym refuses these settings of {family}: {error}") from None

    return make


def _typed(value: Any, hint: Any, default: Any = None) -> Any:
    """A setting, given as text or JSON value, as the type its configuration field asks for. ValueError or TypeError if
    it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value in ("", "none", "None"):
            return None
        return _typed(value, next(argument for argument in arguments if argument is not type(None)), default)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(value)
        return value
    kind = origin or hint
    if isinstance(kind, type) and kind is not str and issubclass(kind, Sequence):
        element = arguments[0] if arguments else type(default[0]) if isinstance(default, Sequence) and default else str
        parts = value.split(",") if isinstance(value, str) else value
        items = (_typed(part.strip() if isinstance(part, str) else part, element) for part in parts)
        return tuple(items) if issubclass(kind, tuple) else list(items)
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
    if kind is int:
        return int(str(value))
    if kind in (float, str):
        return kind(value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        found = next((member for member in kind if value in (member.value, member.name)), None)
        if found is None:
            raise ValueError(value)
        return found
    if kind in (datetime.date, datetime.time):
        return kind.fromisoformat(value)
    raise TypeError(hint)


def _kind(hint: Any) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    optional = [argument for argument in typing.get_args(hint) if argument in kinds]
    return kinds.get(hint) or (kinds[optional[0]] if optional else f"a value of {getattr(hint, '__name__', hint)}")


def check_scorable(family: str, dataset: Any, entry: Mapping[str, Any]) -> None:
    """A few scorers need Python objects that JSON does not keep, found by scoring the family's own answer both ways; one gives full credit to
    any text. UsageError for those."""
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        if dataset.score_answer(NO_ANSWER, entry) >= 1:
            raise UsageError(
                f"{family} cannot be scored (its scorer gives full credit to any text); use --template, which compares exactly"
            )
    if entry["answer"] is None:
        return
    if dataset.score_answer(entry["answer"], plain(entry)) != dataset.score_answer(entry["answer"], entry):
        raise UsageError(f"{family} cannot be scored from a file (JSON does not keep its entries); use --template")


def plain(value: Any) -> Any:
    """The value as JSON would give it back: tuples as lists, sets sorted, dates and bytes as text, enumerations and arrays by
    their values."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, bytes):
        return _text_of(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _text_of(value: bytes) -> str:
    """Bytes as the text they are (parquet files of many programs call no column text), or as Python writes them."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return str(value)


class _Shaper(string.Formatter):
    """Formats plain field names; a specification is a comma separated list of conversions. Lists are joined by
    commas."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        if field_name not in kwargs:
            raise UsageError(f"template: no field {field_name!r}; there are {', '.join(sorted(kwargs))}")
        return kwargs[field_name], field_name

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            raise UsageError(f"template: '!{conversion}' is not supported; use {', '.join(_CONVERSIONS)} after a colon")
        return value

    def format_field(self, value: Any, format_spec: str) -> str:
        text = ",".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
        for conversion in filter(None, format_spec.split(",")):
            if conversion not in _CONVERSIONS:
                raise UsageError(f"template: no conversion {conversion!r}; there are {', '.join(_CONVERSIONS)}")
            text = _CONVERSIONS[conversion](text)
        return text


def shape(template: str, fields: Mapping[str, Any]) -> str:
    """Fill a template such as `G{numbers}=` or `{question:nospace,lower}`; `{}` stays as it is, for `\\boxed{}`. UsageError:
    unknown field or conversion, open brace."""
    try:
        return _Shaper().vformat(_EMPTY_BRACES.sub("{{}}", template), (), fields)
    except ValueError as error:
        raise UsageError(f"template {template!r}: {error}") from None


def template_fields(template: str) -> set[str]:
    """The fields that a template names; none where it is malformed, which `shape` says."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(_EMPTY_BRACES.sub("{{}}", template)) if name}
    except ValueError:
        return set()


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or what there is when nothing is near."""
    options = sorted(known)
    found = difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    if found:
        return f"; did you mean {', '.join(found)}?"
    return f"; there are {', '.join(options[:12])}" + (", ..." if len(options) > 12 else "")
