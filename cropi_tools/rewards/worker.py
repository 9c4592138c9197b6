"""The process that a verifier runs in, started by the pool as `python -m cropi_tools.rewards.worker`.

It reads slices of work as JSON lines on standard input and answers each item with a JSON line on what was standard
output; both descriptors are taken away from the verifiers first, so that a verifier that prints writes to standard
error. Ctrl-C is the parent's to handle. The worker must not outlive the parent: a thread kills it at the end of input
or when the parent is gone, and a kernel timer, which needs no interpreter, when compiled code holds the interpreter for
longer than an answer is allowed.

In:  {"load": [verifier, ...], "items": [[index, verifier, record, response], ...]}
Out, each behind the word of the pool: {"ready": true} once the verifiers are imported; [index, reward, outcome] for each
     item, in order; in place of either {"mistake": text, "usage": bool} for what the user can fix, {"defect": traceback}
     for what only we can.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import traceback
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

from cropi_tools.rewards import verifiers
from cropi_tools.runtime.errors import CropiError, UsageError
from cropi_tools.runtime.limits import bounded_memory

GRACE = 3.0
"""Seconds after an answer's time limit at which the kernel ends a worker that its parent did not."""

EXTRA_MEMORY = 2 * 2**30
"""Bytes of address space that a built-in verifier may add while it grades: a power tower asks for all there is."""

OWN_MEMORY = 8 * 2**30
"""Bytes of data that a function of the user's own may add while it grades. (Not of address space: a GPU's library reserves that at will.)"""

PARENT_CHECK = 2.0
"""Seconds between two looks at whether the parent still lives; the end of input normally tells sooner."""


def main() -> None:
    """Serve until the parent closes our input. `sys.argv` has the time limit of an answer in seconds, and the word that begins our replies:
    a verifier may write to the same descriptor, by mistake or not.
    """
    seconds, process = float(sys.argv[1]), os.getpid()
    word = sys.argv.pop(2).encode()
    requests = os.dup(0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    slices: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_read_slices, args=(requests, slices), daemon=True).start()
    while True:
        _serve(slices.get(), seconds, Replies(replies, word), process)


class Replies(NamedTuple):
    """Where replies go, and the word that begins each."""

    stream: BinaryIO
    word: bytes


def _serve(work: dict[str, Any], seconds: float, replies: Replies, process: int) -> None:
    """Load the verifiers of a slice, then grade it; the first mistake ends the slice, since the parent stops there.

    process: our id. A copy of us that a verifier forked, and that came back from it, ends here: its reply would be a second one.
    """
    try:
        for name in work["load"]:
            verifiers.load(name)
        _reply(replies, {"ready": True})
        for index, name, record, response in work["items"]:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
            with _bounded(name):
                grade = verifiers.load(name)(record, response)
            if os.getpid() != process:
                os._exit(0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _reply(replies, [index, *grade])
    except CropiError as error:
        if os.getpid() != process:
            os._exit(0)
        _reply(replies, {"mistake": str(error), "usage": isinstance(error, UsageError)})
    except Exception:
        _reply(replies, {"defect": traceback.format_exc()})


def _bounded(name: str) -> AbstractContextManager[None]:
    """The limit of a verifier's memory."""
    if name in verifiers.BUILT_IN:
        return bounded_memory(EXTRA_MEMORY, address_space=True)
    return bounded_memory(OWN_MEMORY)


def _reply(replies: Replies, message: Any) -> None:
    # on a line of its own, whatever was written before
    replies.stream.write(b"\n%b %b\n" % (replies.word, json.dumps(message).encode()))


def _read_slices(descriptor: int, slices: SimpleQueue[dict[str, Any]]) -> None:
    """Keep reading, so that the parent never blocks on writing; end the process when there will be no more to read."""
    parent = os.getppid()
    unread = bytearray()
    while os.getppid() == parent:
        if not select.select([descriptor], [], [], PARENT_CHECK)[0]:
            continue
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            break
        unread += chunk
        if b"\n" in chunk:
            *lines, rest = unread.split(b"\n")
            unread = bytearray(rest)
            for line in lines:
                slices.put(json.loads(line))
    if os.getpgrp() == os.getpid():  # the pool gives each worker a group of its own: take along what a verifier started
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
