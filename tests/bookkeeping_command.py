"""Stands for any of the commands: `bookkeeping_command.py NAME ARGUMENTS...`, with its books in the folder $BOOKS.

The result is a hash of the options and of the contents of all inputs, so that a wrong or a stale input shows in
everything made from it. As the real commands do, it says "up to date", refuses a result made otherwise unless
--force is given, works in OUTPUT.part, goes on from there, and ends with 143 on TERM or USR2. Files in $BOOKS with
a pattern for the words: `fail` makes it fail, `hold` keeps it working until it is stopped or the file is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

BOOKS = Path(os.environ["BOOKS"])


def content(path: Path) -> str:
    """A hash of an input; of a policy or store, what was made, not its manifest."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.name != "manifest.json")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def told(order: str, words: list[str]) -> bool:
    try:
        pattern = (BOOKS / order).read_text()
    except FileNotFoundError:  # it may go between two looks
        return False
    return re.search(pattern, " ".join(words)) is not None


def main() -> int:
    words = sys.argv[1:]
    output = Path(words[words.index("-o") + 1])
    folder = output.suffix in ("", ".zarr")
    manifest = output / "manifest.json" if folder else output.with_name(output.name + ".manifest.json")
    part = output.with_name(output.name + ".part")
    asked = [word for word in words if word not in ("-o", str(output), "--force")]
    paths = [(word, Path(word.rpartition("=")[2])) for word in asked]
    fingerprint = [content(path) if path.exists() else word for word, path in paths]

    def note(outcome: str) -> None:
        cuda = os.environ.get("CUDA_VISIBLE_DEVICES")
        entry = {"words": words, "output": str(output), "outcome": outcome, "cuda": cuda}
        with open(BOOKS / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: stopped.append(number))
    if told("fail", words):
        note("failed")
        print(f"{words[0]}: told to fail", file=sys.stderr)
        return 1
    if manifest.exists() and "--force" not in words:
        if json.loads(manifest.read_text()) == fingerprint:
            note("up to date")
            return 0
        note("refused")
        print(f"{words[0]}: {output}: exists, something differs; --force replaces it", file=sys.stderr)
        return 1
    if output.exists() and not manifest.exists() and "--force" not in words:
        note("refused")
        print(f"{words[0]}: {output}: exists and was not written by this command; --force replaces it", file=sys.stderr)
        return 1
    note("resumed" if part.exists() else "began")
    part.write_text("some work\n")
    while told("hold", words) and not stopped:
        time.sleep(0.02)
    if stopped:
        note(f"stopped by {signal.Signals(stopped[0]).name}")
        return 143
    made = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest() + "\n"
    if folder:
        output.mkdir(exist_ok=True)
        (output / "content").write_text(made)
    else:
        output.write_text(made)
    part.unlink()
    manifest.write_text(json.dumps(fingerprint))
    note("made")
    return 0


sys.exit(main())
