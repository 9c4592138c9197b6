"""What the command line does for every command that is made of a record of options."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from cropi_tools import runtime
from cropi_tools.cli.entry import entry
from cropi_tools.options import CommandOptions


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_silences_messages(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(options: CommandOptions) -> None:
        """Say something."""
        assert options.quiet is quiet
        runtime.notify("a message")

    monkeypatch.setattr(runtime, "install_signal_handlers", lambda: None)
    monkeypatch.setattr("sys.argv", ["cropi-some", *(["--quiet"] if quiet else [])])
    with pytest.raises(SystemExit) as ended:
        entry(CommandOptions, work, name="cropi-some", example="cropi-some")()
    assert not ended.value.code
    assert capsys.readouterr().err == ("" if quiet else "a message\n")


def test_the_end_of_a_command_is_not_searched_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch that takes longer than a second. It is the first that is registered, so the last that is done."""
    registered: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(runtime, "install_signal_handlers", lambda: None)
    monkeypatch.setattr("sys.argv", ["cropi-some"])

    def work(options: CommandOptions) -> None:
        """Have something to do at the end."""
        atexit.register(print)

    with pytest.raises(SystemExit):
        entry(CommandOptions, work, name="cropi-some", example="cropi-some")()
    at_the_end, *others = registered
    assert others == [print]
    done: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: done.append("spared"))
    monkeypatch.setattr(gc, "unfreeze", lambda: done.append("searched, and what was put aside too"))
    complaining = ("triton", "vllm")
    for name in complaining:
        monkeypatch.delitem(sys.modules, name, raising=False)
    at_the_end()
    for name in complaining:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        at_the_end()
        monkeypatch.delitem(sys.modules, name)
    assert done == ["spared", *["searched, and what was put aside too"] * 2]
