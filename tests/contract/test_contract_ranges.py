"""Every numeric option of every command with values outside its range, and what is no number: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import ast
import importlib
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from command_table import COMMANDS

import cropi_tools
from cropi_tools import runtime
from cropi_tools.cli.entry import entry
from cropi_tools.options import LARGEST, CommandOptions, Option, Range, default_of, described, types_of


class Said:
    """What a command said in this process, and its exit code."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._name, self._patch, self._capsys = name, monkeypatch, capsys
        monkeypatch.setattr("cropi_tools.runtime.install_signal_handlers", lambda: None)

    def __call__(self, arguments: list[str], code: int) -> list[str]:
        """The lines on both streams."""
        self._patch.setattr(sys, "argv", [f"cropi-{self._name}", *arguments])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"cropi_tools.cli.{self._name}").main()
        said = self._capsys.readouterr()
        assert ended.value.code == code, (arguments, said.err)
        return [*said.out.splitlines(), *said.err.splitlines()]


@pytest.fixture
def said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Said]:
    monkeypatch.chdir(tmp_path)
    yield Said(name, monkeypatch, capsys)
    assert os.listdir(tmp_path) == []


ENOUGH = {"rollout": ["absent"], "project": ["--dim", "64", "-o", "out"]}
"""What a line needs that no single option must have."""


def record_of(name: str) -> type[CommandOptions]:
    found: type[CommandOptions] = importlib.import_module(f"cropi_tools.cli.{name}").main.record
    return found


def numeric(kind: Any) -> type | None:
    """int or float where a field holds one, several, or none of it."""
    if get_origin(kind) is None:
        return kind if kind in (int, float) else None
    found = {numeric(one) for one in get_args(kind) if one is not Ellipsis} - {None}
    return found.pop() if len(found) == 1 else None


def outside(option: Option, kind: type) -> list[str]:
    """Texts of values that the option must refuse."""
    numbers: Range = option.range  # type: ignore[assignment]
    step = 1 if kind is int else 1e-6
    low, high = numbers.low, numbers.high
    texts = ["nan", "inf", "-inf", "", "x", "1e400", "9" * 400]
    texts.append(
        f"{low if numbers.open_low else low - step:.10g}" if kind is float else str(int(low) - (not numbers.open_low))
    )
    if math.isfinite(high):
        texts.append(f"{high if numbers.open_high else high + step:.10g}" if kind is float else str(int(high) + 1))
    if kind is int:
        texts += ["1.5", str(LARGEST + 1)]
    if option.read is not None:
        texts += [f"{text},{text}" for text in texts] + ["1,2,3", "1,", ",1"]
    return texts


def words(name: str) -> list[str]:
    """What the command cannot do without."""
    record = record_of(name)
    found: list[str] = []
    for field in fields(record):
        option = described(record)[field.name]
        if default_of(field) is MISSING:
            value = "1" if numeric(types_of(record)[field.name]) else "absent"
            found += [value] if option.is_argument else [option.flag, value]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_outside_their_range(name: str, said: Said) -> None:
    record = record_of(name)
    for field, kind in types_of(record).items():
        option, number = described(record)[field], numeric(kind)
        if number is None or (option.read is not None and option.range is None):
            continue
        assert option.range is not None, f"{option.flag} takes any number"
        for text in outside(option, number):
            lines = said([*words(name), f"{option.flag}={text}"], 2)
            assert len(lines) == 2, lines
            assert option.flag in lines[0] or field in lines[0], f"{option.flag}={text}: {lines}"


@pytest.mark.parametrize("name", COMMANDS)
def test_choices_and_forms(name: str, said: Said) -> None:
    """What is none of an option's choices, and what is no part of a job array."""
    record = record_of(name)
    for field, kind in types_of(record).items():
        option = described(record)[field]
        wrong: tuple[str, ...] = ()
        if "Literal" in str(kind):
            wrong = ("no-such-choice", "", "NONE")
        elif option.flag == "--shard":
            wrong = ("0/1", "2/1", "1/0", "a/b", "1", "1/1/1", "-1/2", "9" * 500 + "/1")
        for text in wrong:
            lines = said([*words(name), f"{option.flag}={text}"], 2)
            assert len(lines) == 2, lines
            assert option.flag in lines[0], lines


@pytest.mark.parametrize("name", COMMANDS)
def test_former_names_are_told(name: str, said: Said) -> None:
    record = record_of(name)
    for before, now in record.renamed.items():
        lines = said([*words(name), before, "1"], 2)
        assert before in lines[0]
        assert f"it is now {now}" in lines[0]
    for before, now in record.moved.items():
        # whatever else was asked in the former way
        assert said([before, *words(name), "1"], 2) == [f"cropi-{name}: {before} is now a command: {now}"]
        assert said(["1", before], 2) == [f"cropi-{name}: {before} is now a command: {now}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_is_heard_before_the_work_begins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bool] = []
    main = entry(record_of(name), lambda options: heard.append(runtime.is_quiet()), name=name, example="none")
    for more in ([], ["--quiet"]):
        monkeypatch.setattr(sys, "argv", [name, *words(name), *ENOUGH.get(name, ()), *more])
        monkeypatch.setattr("cropi_tools.runtime.install_signal_handlers", lambda: None)
        with pytest.raises(SystemExit):
            main()
    assert heard == [False, True]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_once_under_its_heading(name: str, said: Said) -> None:
    record = record_of(name)
    lines = "\n".join(said(["--help"], 0)).partition("Example:")[0].splitlines()
    for option in described(record).values():
        if not option.is_argument:
            first = option.names.split()[0]
            # two spaces before the words, or the line goes on with those of another option
            own = [line for line in lines if re.match(rf"  {first}(,|/| \S*$| \S+  | \S+$|  |$)", line)]
            assert len(own) == 1, option.names


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_without_a_reader(name: str) -> None:
    """Each field of a record is read somewhere, by the name `options` or by the record itself."""
    package = Path(cropi_tools.__file__).parent
    read = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("options", "self")
            ):
                read.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "given.get":  # before the record is made
                read.add(ast.literal_eval(node.args[0]))
    assert sorted(set(described(record_of(name))) - read) == []
