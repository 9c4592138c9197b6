"""From a record of options to a console command: the command line, its help under headings, and the record made of what was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from cropi_tools import runtime
from cropi_tools.cli.common import Version, console_script
from cropi_tools.options import GROUPS, CommandOptions, Option, default_of, described, types_of
from cropi_tools.runtime.errors import UsageError

Record = TypeVar("Record", bound=CommandOptions)


def entry(record: type[Record], work: Callable[[Record], object], *, name: str, example: str) -> Callable[[], NoReturn]:
    """The console entry point of a command: `work` with the record of its options; its docstring is the help, `example` stands at the end."""

    def callback(**given: Any) -> None:
        asked = _made(record, {field: value for field, value in given.items() if value not in (None, [], ())})
        runtime.set_quiet(asked.quiet)
        work(asked)

    callback.__doc__ = work.__doc__
    options, kinds = described(record), types_of(record)
    hints = {
        field.name: _hint(options[field.name], kinds[field.name], default_of(field) is MISSING)
        for field in fields(record)
    }
    callback.__annotations__ = {**hints, "version": Version}
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=inspect.Parameter.empty if default_of(field) is MISSING else None,
        )
        for field in fields(record)
    ]
    parameters.append(inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, annotation=Version, default=False))
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    main = console_script(
        callback,
        name=name,
        example=example,
        cls=type("Command", (_Grouped,), {"record": record}),
        renamed=record.renamed,
        moved=record.moved,
    )
    main.record = record  # type: ignore[attr-defined]  # for those who walk the options of all commands
    return main


def _made(record: type[Record], given: Mapping[str, Any]) -> Record:
    values = {}
    for name, value in given.items():
        option = described(record).get(name)
        if option is None:
            continue  # --version
        if isinstance(value, list):
            values[name] = tuple(value if option.read is None else (_read(option, text) for text in value))
        else:
            values[name] = _read(option, value) if option.read is not None else value
    return record.asked(values)


def _read(option: Option, text: str) -> Any:
    assert option.read is not None
    try:
        return option.read(text)
    except UsageError as error:
        raise UsageError(f"{option.flag} {text}: {error}" if text.strip() else f"{option.flag} {error}") from None


def _hint(option: Option, kind: Any, required: bool) -> Any:
    """The annotation that typer reads: without a default of its own, so that what was not given can be told from what was."""
    kind = _without_none(kind)
    if (get_origin(kind) is tuple and option.read is None) or get_args(kind)[1:] == (...,):
        kind = list[str]
    elif option.read is not None:
        kind = str
    if option.is_argument:
        info: Any = typer.Argument(help=option.help, metavar=option.names, show_default=False)
    else:
        info = typer.Option(*option.names.split(), help=option.help, metavar=option.metavar, show_default=False)
    return Annotated[kind if required else Union[kind, None], info]  # noqa: UP007


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    return kind


class _Grouped(TyperCommand):
    """Help with the options under headings."""

    record: type[CommandOptions]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        options, kinds = described(self.record), types_of(self.record)
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in ("Arguments", *GROUPS)}
        for field in fields(self.record):
            option = options[field.name]
            rows["Arguments" if option.is_argument else option.group].append(
                (_spelled(option, kinds[field.name]), _words(option, default_of(field)))
            )
        rows["This run"] += [("--version", "Print the version and exit."), ("-h, --help", "Print this and exit.")]
        for group, lines in rows.items():
            if lines:
                with formatter.section(group):
                    formatter.write_dl(lines)


def _spelled(option: Option, kind: Any) -> str:
    """Names and value as the help shows them."""
    kind = _without_none(kind)
    if option.is_argument:
        return f"{option.names}..." if get_origin(kind) is tuple else option.names
    names = ", ".join(option.names.replace("/", " / ").split(" ")) if "/" not in option.names else option.names
    if kind is bool:
        return names
    if get_origin(kind) is Literal:
        return f"{names} {'|'.join(get_args(kind))}"
    return f"{names} {option.metavar or {int: 'N', float: 'X'}.get(kind, 'TEXT')}"


def _words(option: Option, default: Any) -> str:
    """What the option is for, its default and its range."""
    facts = []
    if default is MISSING:
        facts.append("required")
    elif (shown := option.shown or _shown(default)) is not None:
        facts.append(f"default: {shown}")
    if option.range is not None and abs(option.range.low) < 1e9:
        facts.append(str(option.range))
    return f"{option.help}  [{'; '.join(facts)}]" if facts else option.help


def _shown(default: Any) -> str | None:
    if default is None or default is False or default == () or default == "":
        return None
    if isinstance(default, tuple):
        return ",".join(f"{one:g}" for one in default)
    return f"{default:g}" if isinstance(default, float) else str(default)
