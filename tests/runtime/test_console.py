"""What others wrote reaches terminals and logs through one place, without control characters."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest

import cropi_tools
from cropi_tools import runtime
from cropi_tools.runtime import console

HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\n[bold]x[/]\u202e\u2028\x9b1m\ud800"
PACKAGE = Path(cropi_tools.__file__).parent

# where else something is written to a terminal: the bar and the tables of rich, whose texts are literal and printable
ALLOWED = {
    "runtime/console.py": {"print", "stdout"},
    "runtime/__init__.py": {"Console"},
    "report/tables.py": {"Console"},
}
WRITERS = {"print", "Console", "echo", "secho", "pprint"}


def writers(path: Path) -> set[str]:
    """What a file calls or names that writes to a terminal."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of = getattr(node.func, "value", None)
            if name == "print" and getattr(of, "id", "") == "console":  # rich's, made by an allowed Console
                continue
            if name in WRITERS:
                found.add(name)
            if name in ("write", "writelines") and isinstance(of, ast.Attribute):
                # sys.stdout.write, sys.stderr.buffer.write
                while isinstance(of, ast.Attribute) and of.attr == "buffer":
                    of = of.value
                if isinstance(of, ast.Attribute) and of.attr in ("stdout", "stderr"):
                    found.add(of.attr)
    return found


def test_nothing_else_writes_to_a_terminal() -> None:
    found = {str(path.relative_to(PACKAGE)): writers(path) for path in sorted(PACKAGE.rglob("*.py"))}
    others = {name: used - ALLOWED.get(name, set()) for name, used in found.items()}
    assert {name: used for name, used in others.items() if used} == {}
    assert found["runtime/console.py"] == {"print"}


def harmless(text: str) -> bool:
    return all(one.isprintable() for one in text.replace("\n", ""))


def test_messages_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    runtime.notify(HOSTILE)
    runtime.warn(HOSTILE)
    console.say(HOSTILE)
    with runtime.progress(HOSTILE, 3) as shown:
        shown._next_line -= 100
        shown.advance(note=HOSTILE)
    console.show("first\n" + HOSTILE)
    console.show_json(json.dumps({"a": HOSTILE, "b": "é–😀"}, ensure_ascii=False))
    told = capsys.readouterr()
    assert harmless(told.out)
    assert harmless(told.err)
    assert told.err.count("\n") == 4
    assert told.err.count("[bold]x[/]") == 5
    assert json.loads(told.out.splitlines()[-1]) == {"a": HOSTILE, "b": "é–😀"}
    assert "é–😀" in told.out


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252"])
def test_streams_that_cannot_express_a_character(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding=encoding))
    console.prepare_streams()
    console.say("é–😀")
    console.show("é–😀")
    console.show_json(json.dumps(["é–😀"], ensure_ascii=False))
    sys.stdout.flush()
    assert json.loads(out.getvalue().splitlines()[-1]) == ["é–😀"]
    stream = console.data_stream()
    stream.write("é–😀\n")
    stream.flush()
    assert out.getvalue().endswith("é–😀\n".encode())
    assert err.getvalue().count(b"\n") == 1


def test_output_of_another_program_is_passed_on_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    relay = console.Relay()
    whole = ("\x1b[36m(worker)\x1b[0m é\tone\r 10%\r 20%\n\x1b]0;title\x07two\n\n\x9bthree".encode()) + b"\xff"
    for at in range(0, len(whole), 3):
        relay.write(whole[at : at + 3])
    relay.write(b"x" * 100_000)
    relay.close()
    told = capsys.readouterr().err
    assert harmless(told)
    lines = told.splitlines()
    assert lines[:4] == ["(worker) é      one", " 10%", " 20%", "\\x1b]0;title\\x07two"]
    assert lines[4].startswith("\\x9bthree")
    assert told.count("x" * 1000) > 0
