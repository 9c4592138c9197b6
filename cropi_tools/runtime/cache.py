"""What commands keep for later ones in the user's cache folder. To lose it costs time and nothing else, so nothing here is ever an error.

A file is named by a hash of all that decides what is in it: what changes gets another name, and nothing can be out of date. It begins
with a hash of its content and appears under its name at once, so of a process that was killed, of two that write at once, and of a
damaged disk nothing is ever read but what was written. Only files are read that no other user can have written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

KEPT = 200  # files; older ones go when a new one comes
_DIGEST = hashlib.sha256().digest_size
_UNFINISHED = ".tmp"
_OTHERS_WRITE = 0o022


def cache_folder() -> Path | None:
    """`cropi-tools` in $XDG_CACHE_HOME, by default ~/.cache; None where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification has relative paths ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "cropi-tools") if os.path.isabs(base) else None


def kept(name: str) -> bytes | None:
    """What `keep` was given under this name, by this user; None where it is not there, or damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        with open(folder / name, "rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
                return None
            found = stream.read()
    except OSError:
        return None
    content = found[_DIGEST:]
    return content if hashlib.sha256(content).digest() == found[:_DIGEST] else None


def keep(name: str, content: bytes) -> None:
    """Keep it under this name, if the folder can be written to."""
    folder = cache_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(_UNFINISHED, dir=folder)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, folder / name)
        except BaseException:
            os.unlink(temporary)
            raise
        _drop_oldest(folder)


def _drop_oldest(folder: Path) -> None:
    """Leave the newest `KEPT` files; what processes left unfinished when they were killed goes with the others."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may be dropping them too
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-KEPT]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
