"""Runs commands in forked processes: importing torch takes seconds, and the contract suite starts hundreds of commands.

The server imports what the commands import, compiles the sketch kernel that small policies use, and starts no thread,
since a process with threads cannot be forked. For each request it forks a process that runs the command's own `main` as
its console script does. Requests and replies are JSON lines.

In:  {"module", "argv", "cwd", "stdin", "stdout", "stderr": files, "kill_at": n or null, "events": file}
Out: {"pid"} when the process runs, then {"code"}: its exit code, or minus the signal that ended it

`kill_at` sends KILL just before the process makes its n-th change below `cwd` (a file opened for writing, renamed,
removed or linked; a folder made or removed). So every window between two changes can be hit, not only those that are
wide enough for a timer.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import numpy as np

PRELOADED = (
    "torch",
    "numpy",
    "zarr",
    "numba",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.generation.utils",
    "cropi_tools.data.store",
    "cropi_tools.prompts.sources",
    "cropi_tools.prompts.exports",
    "cropi_tools.rollouts",
    "cropi_tools.gradients.write_store",
    "cropi_tools.sketches.project_stores",
    "cropi_tools.scores.influence",
    "cropi_tools.selection.rules",
    "cropi_tools.engines.transformers_engine",
    "cropi_tools.training.loop",
)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def watch(folder: str, kill_at: int | None) -> list[int]:
    """Count the changes below `folder` in the one cell that is returned; KILL this process before the `kill_at`-th."""
    counted = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.abspath(os.fsdecode(path)).startswith(folder):
            return
        counted[0] += 1
        if counted[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def become(request: dict[str, Any]) -> NoReturn:
    """In the forked process: take the request's files, folder and arguments, and run the command to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    for descriptor, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        opened = os.open(request[name], flags | (os.O_CREAT | os.O_TRUNC if descriptor else 0))
        os.dup2(opened, descriptor)
        os.close(opened)
    # as a shell would hand them over, whatever the encoding of file names
    sys.argv = [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in request["argv"]]
    main = importlib.import_module(request["module"]).main
    counted = watch(os.path.abspath(request["cwd"]), request["kill_at"])
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    changes = counted[0]
    with open(request["events"], "w") as stream:
        stream.write(str(changes))
    # taking torch down takes a second, and there is nothing to learn from it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def compile_kernel() -> None:
    from cropi_tools.sketches.projection import sketch_vector
    from cropi_tools.sketches.spec import Layout, ProjectionSpec

    gradient = {"weight": np.ones(64, np.float32)}
    layout = Layout.of(gradient.items())
    sketch_vector(ProjectionSpec.create("countsketch", layout, 64), layout, gradient)


def serve() -> None:
    requests = os.fdopen(os.dup(0), "r")
    replies = os.fdopen(os.dup(1), "w")
    for name in PRELOADED:
        importlib.import_module(name)
    compile_kernel()
    gc.freeze()
    while line := requests.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request)
        print(json.dumps({"pid": pid}), file=replies, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=replies, flush=True)


if __name__ == "__main__":
    serve()
