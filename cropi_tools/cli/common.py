"""What all commands share: the error boundary, exit codes, signals.

Exit codes: 0 done (or up to date), 1 a failure of input or environment, 2 usage, 130 Ctrl-C, 143 stopped by TERM or USR2.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from cropi_tools import __version__
from cropi_tools.cli import _interrupted
from cropi_tools.runtime.clock import command_begins
from cropi_tools.runtime.console import prepare_streams, say, show
from cropi_tools.runtime.errors import CropiError, Interrupted, UsageError
from cropi_tools.runtime.signals import keeps, outcome

if TYPE_CHECKING:
    from cropi_tools.data.jsonl import Record


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"cropi-tools {__version__}")
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
]


# typer's own copy of click raises it, and names it nowhere
_CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Cancelled(Interrupted):
    """Ctrl-C."""

    exit_code = 130


def console_script(
    function: Callable[..., Any],
    *,
    name: str,
    example: str,
    cls: type[TyperCommand],
    renamed: Mapping[str, str],
    moved: Mapping[str, str],
) -> Callable[[], NoReturn]:
    """What a console script calls: `function` behind the error boundary.

    renamed: former options, and what they are called now. moved: former options that are commands now, and how these are called.
    """
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    @functools.wraps(function)
    def cancellable(*arguments: Any, **options: Any) -> None:
        # said here, since typer ends the process on a KeyboardInterrupt without a word
        try:
            if signal.getsignal(signal.SIGINT) is _interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            function(*arguments, **options)
        except KeyboardInterrupt:
            # what libraries say about being in the middle of something
            warnings.simplefilter("ignore")
            sys.unraisablehook = lambda _: None
            raise _Cancelled(f"interrupted; {outcome()}") from None

    # \b keeps the example's lines as they are
    app.command(
        name=name, cls=cls, epilog="\b\nExample:\n" + "\n".join("  " + line for line in example.strip().splitlines())
    )(cancellable)

    def main() -> NoReturn:
        sys.exit(_flushed(_run(app, name, renamed, moved), name))

    return main


def _leave_garbage() -> None:
    """Spare the end of the process Python's search for garbage among all objects of all modules.

    It takes longer than a second with torch and transformers, and what is left goes with the process. Extensions made with nanobind, though,
    Triton's and vLLM's, complain on stderr of types that nobody collected, those too that were put aside while they were imported.
    """
    if {"triton", "vllm"} & sys.modules.keys():
        gc.unfreeze()
    else:
        gc.freeze()


def _set_variables(environment: MutableMapping[str, str]) -> None:
    """What libraries read when they are imported, as far as nobody has set it."""
    # Threads that spin while they wait make torch many times slower as soon as another process wants the cores; threads that sleep at
    # once must be woken, which takes long on virtual machines. So they spin a little (benchmarks/waiting.py).
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # for libraries other than GNU's, which does as the count says
    # libraries announce themselves on stderr; the commands speak for themselves
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _run(app: typer.Typer, name: str, renamed: Mapping[str, str], moved: Mapping[str, str]) -> int:
    from cropi_tools import runtime

    command_begins()
    atexit.register(_leave_garbage)
    keeps(None)
    _hold_descriptors()
    prepare_streams()
    _set_variables(os.environ)
    runtime.install_signal_handlers()
    if f"_{name.upper().replace('-', '_')}_COMPLETE" in os.environ:
        # a shell asks what a word may go on with, or for the lines that let it ask; typer answers once its shells are known
        from typer.completion import completion_init

        completion_init()
    try:
        return app(prog_name=name, standalone_mode=False) or 0
    except _CommandLineError as error:
        option = getattr(error, "option_name", "")
        if option in moved:
            say(f"{name}: {option} is now a command: {moved[option]}")
            return error.exit_code
        now = renamed.get(option)
        say(f"{name}: {error.format_message()}{f'; it is now {now}' if now else ''}")
        say(f"try '{name} --help'")
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except UsageError as error:
        say(f"{name}: {error}")
        say(f"try '{name} --help'")
        return error.exit_code
    except CropiError as error:
        say(f"{name}: {error}")
        return error.exit_code
    except BrokenPipeError:
        return 1  # the reader went away (`| head`)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        say(f"{name}: {error.filename or 'system'}: {error.strerror}")
        return 1
    return 0


def _flushed(code: int, name: str) -> int:
    """The exit code, once all data is written: a full disk or a closed standard output shows itself here at the latest."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # point stdout nowhere, so that Python's exit does not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0 and not isinstance(error, BrokenPipeError):
            say(f"{name}: standard output: {error.strerror}")
        return code or 1
    return code


def _hold_descriptors() -> None:
    """Put something at standard descriptors that are closed (`2>&-`): else the next file that is opened takes the number, and messages go there.

    Input reads as empty, messages go nowhere, and data written to a closed standard output is an error.
    """
    for number, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))):
        try:
            os.fstat(number)
        except OSError:
            held = os.open(os.devnull, flags)
            if held != number:
                os.dup2(held, number)
                os.close(held)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))


def warn_of_other_dates(paths: Sequence[str], date: str) -> None:
    """Say which inputs (a trained policy, rollouts) had prompts with another date than --date."""
    from cropi_tools import runtime
    from cropi_tools.data.dates import other_dates

    for path, other in other_dates(paths, date).items():
        runtime.warn(
            f"{path}: its prompts had the date {other}, here they have {date}; give --date {other} for the same prompts"
        )


def stoppable(records: Iterable[Record]) -> Iterator[Record]:
    """The records, as long as no signal asks to stop; for commands that make their result in one go."""
    from cropi_tools import runtime

    for record in records:
        runtime.stop_if_requested()
        yield record
