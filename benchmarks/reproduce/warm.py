"""The commands from a process that has imported everything: `make curriculum` with hundreds of short steps spends most of its time on imports.

`Warm(folder)` starts such a process and fills FOLDER/bin with one small program for each command. Put first on the PATH, each hands its
arguments, environment, folder and open streams to that process, which forks a child to run the command, and ends as the child ends. A
command computes and writes the same as without; only the seconds that its ledger calls starting are fewer.

Linux. The threads of torch must be one (OMP_NUM_THREADS=1): a process that has started more cannot be forked safely.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

COMMANDS = ("prompts", "rollout", "verify", "grad", "embed", "project", "score", "select", "train", "report")
LIBRARIES = (
    "numba",
    "pyarrow.parquet",
    "safetensors.torch",
    "sklearn.kernel_approximation",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sympy",
    "torch._dynamo",
    "torch.func",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "zarr",
)
PATIENCE = 120.0  # seconds until the process answers
CLOCK = "CROPI_BENCHMARK_CLOCK"
"""Where a client's environment has it as `processor`, its command counts processor time; see cropi_tools.runtime.clock."""

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
place = socket.socket(socket.AF_UNIX)
place.connect({socket!r})
asked = json.dumps({{"command": {command!r}, "words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
place.sendmsg([len(asked).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
place.sendall(asked)
lines = place.makefile()
child = int(lines.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(child, number))
sys.exit(int(lines.readline() or 1))
"""


class Warm:
    """The process, for as long as a `with` lasts; `path` is what a PATH must begin with. folder: where its commands lie for that time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # each has its own, so that several can run side by side
        self.folder = Path(tempfile.mkdtemp(prefix="warm-", dir=folder)).resolve()
        self.bin = self.folder / "bin"
        self._socket = str(Path(tempfile.mkdtemp(prefix="cropi-")) / "warm")  # the name of a socket must be short
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> str:
        return os.pathsep.join([str(self.bin), os.environ.get("PATH", "")])

    def __enter__(self) -> Warm:
        self.bin.mkdir()
        self._program("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for name in COMMANDS:
            self._program(f"cropi-{name}", CLIENT.format(python=sys.executable, socket=self._socket, command=name))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, self._socket]
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        limit = time.monotonic() + PATIENCE
        while not os.path.exists(self._socket):
            if self._process.poll() is not None or time.monotonic() > limit:
                self.close()
                raise RuntimeError("the process with everything imported did not start")
            time.sleep(0.05)
        return self

    def _program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process still takes commands."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End the process and take away what it was reached by."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(Path(self._socket).parent, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def serve(path: str) -> None:
    """Import, then run what clients ask for until the process that started this one is gone."""
    starter = os.getppid()
    for name in (*LIBRARIES, *(f"cropi_tools.cli.{command}" for command in COMMANDS), *rooms()):
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the commands
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    listener.settimeout(1.0)
    while os.getppid() == starter:
        try:
            asked, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            attend(asked)
        asked.close()


def rooms() -> list[str]:
    """The modules of the package, but those that need verl, vLLM or Triton."""
    package = Path(importlib.import_module("cropi_tools").__path__[0])
    names = [
        ".".join(("cropi_tools", *found.relative_to(package).with_suffix("").parts)) for found in package.rglob("*.py")
    ]
    return sorted(
        name
        for name in names
        if not name.endswith("__init__") and not any(part in name for part in ("verl", "vllm", "triton"))
    )


def attend(asked: socket.socket) -> NoReturn:
    """One command: tell its process number, wait for it, tell how it ended."""
    asked.settimeout(None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, carried, _, _ = asked.recvmsg(4, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i", carried[0][2])
    request = json.loads(received(asked, int.from_bytes(head, "big")))
    child = os.fork()
    if child == 0:
        asked.close()
        run(request, list(streams))
    with suppress(OSError):
        asked.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with suppress(OSError):  # the client may have been killed
        asked.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    os._exit(0)


def received(asked: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        part = asked.recv(length - len(found))
        if not part:
            os._exit(1)  # the client is gone
        found += part
    return found


def run(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """The command, as if it had been started by itself."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Python opened its own for those of this process
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, errors=errors, closefd=False)
        for number, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
    )
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get(CLOCK) == "processor":
        importlib.import_module("cropi_tools.runtime.clock").use_processor_time()
    sys.argv = [f"cropi-{request['command']}", *request["words"]]
    code: Any = 0
    try:
        importlib.import_module(f"cropi_tools.cli.{request['command']}").main()
    except SystemExit as ended:
        code = ended.code or 0
    # what is registered for the end of a process, but not the taking apart of a million imported objects
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
