"""Running commands: quickly through the forking server, or as a shell does where a real process matters."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

SILENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""What a command's own start puts into the environment before libraries read it; the server imports them earlier."""

PATIENCE = 120.0  # seconds until a command counts as hung


@dataclass(frozen=True)
class Done:
    """How a command ended.

    code: exit code, or minus the signal. changes: how many file changes it made in its folder, None when it was killed.
    """

    code: int
    stdout: str
    stderr: str
    changes: int | None

    @property
    def errors(self) -> list[str]:
        return self.stderr.splitlines()


class Shell:
    """Runs one command at a time in processes forked from the server."""

    def __init__(self, scratch: Path, **environment: str) -> None:
        self._scratch = scratch
        self._numbers = itertools.count()
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("command_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **SILENT, **environment},
        )

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cast(IO[str], self._server.stdin).close()
        self._server.wait(timeout=30)
        cast(IO[str], self._server.stdout).close()

    def __call__(
        self,
        words: list[str],
        cwd: Path,
        *,
        code: int | None = 0,
        stdin: str | Path = "",
        stdout: Path | None = None,
        kill_at: int | None = None,
        meanwhile: Callable[[int], None] | None = None,
    ) -> Done:
        """Run `words`; fail unless it exits with `code` (None: any).

        stdin: text, or a file. stdout: a pipe with a name, read by `meanwhile`, which is called with the process id.
        """
        place = self._scratch / str(next(self._numbers))
        place.mkdir()
        if isinstance(stdin, str):
            (place / "stdin").write_text(stdin)
            stdin = place / "stdin"
        for name in ("stdout", "stderr"):  # a kill may come before the process opens them
            (place / name).touch()
        request = {
            "module": f"cropi_tools.cli.{words[0].removeprefix('cropi-')}",
            "argv": words,
            "cwd": str(cwd),
            "stdin": str(stdin),
            "stdout": str(stdout or place / "stdout"),
            "stderr": str(place / "stderr"),
            "events": str(place / "events"),
            "kill_at": kill_at,
        }
        server_in, server_out = cast(IO[str], self._server.stdin), cast(IO[str], self._server.stdout)
        server_in.write(json.dumps(request) + "\n")
        server_in.flush()
        pid = json.loads(server_out.readline())["pid"]
        if meanwhile is not None:
            meanwhile(pid)
        ended: dict[str, Any] = json.loads(server_out.readline())
        events = place / "events"
        counted = events.read_text() if events.exists() else ""  # a kill may come before it is written
        changes = int(counted) if counted else None
        said = "" if stdout else (place / "stdout").read_text(errors="replace")
        done = Done(ended["code"], said, (place / "stderr").read_text(errors="replace"), changes)
        assert code is None or done.code == code, f"{' '.join(words)}: exit {done.code}\n{done.stdout}\n{done.stderr}"
        return done


def real(words: list[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command's console script."""
    program = str(Path(sys.executable).parent / words[0])
    return subprocess.run([program, *words[1:]], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, **options)


def signalled(number: signal.Signals, condition: Callable[[], bool], seconds: float = 0.0) -> Callable[[int], None]:
    """What to do meanwhile: wait until `condition` holds and some seconds more, then send the process a signal."""

    def meanwhile(pid: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition() and Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "the command never came to the point waited for"
            time.sleep(0.002)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    return meanwhile
