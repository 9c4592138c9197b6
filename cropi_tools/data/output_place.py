"""Whether an output may take its name: checked before any work, so that nothing foreign is ever deleted or overwritten.

An output owns its name and a few names beside it (`X.part`, `X.part.json`, `X.part.lock`, `X.manifest.json`, ...). Anything there that these
tools did not write is refused, with --force too: --force replaces what a command made, and a plain file that the user named.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from cropi_tools.data.jsonl import is_stream
from cropi_tools.data.manifest import FOLDER_MANIFEST, MANIFEST_ENDING, Input
from cropi_tools.data.metadata import read_json
from cropi_tools.runtime.errors import InputError

_LONGEST_ENDING = MANIFEST_ENDING + ".tmp"  # of the names beside an output


def check_place(path: Path, folder: bool, inputs: Iterable[Input]) -> None:
    """InputError when the output cannot have this name, whatever the options: a folder that is not there, a name too long, a device, a link in
    place of a folder, an input of the command or a folder that holds one, or a manifest of somebody else.
    """
    parent = path.parent
    try:
        if not parent.is_dir():
            raise InputError(f"{parent}: no such folder; make it first")
        _check_name_length(path)
        found = _kind(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be an output ({error.strerror}); choose another name") from None
    if folder and path.is_symlink():
        raise InputError(f"{path}: is a link; give the folder that it means, or another output name")
    if found not in (None, "a file", "a folder"):
        raise InputError(f"{path}: is {found}; choose another output name, or `-` for standard output")
    if found is not None and found != ("a folder" if folder else "a file"):
        raise InputError(f"{path}: is {found}; choose another output name")
    for item in inputs:
        if not is_stream(item.path):
            _check_input(path, Path(item.path))
    if not folder:
        _check_manifest(path.with_name(path.name + MANIFEST_ENDING))


def check_replaceable(folder: Path, manifest: dict[str, Any] | None) -> None:
    """InputError unless everything in an existing output folder was written by these tools, so that --force may replace it."""
    if manifest is None:
        if any(folder.iterdir()):
            raise InputError(
                f"{folder}: is a folder that no command here wrote; remove it, or choose another output name"
            )
        return
    known = {FOLDER_MANIFEST, *manifest.get("entries", ())}
    foreign = (
        sorted(entry.name for entry in folder.iterdir() if entry.name not in known) if "entries" in manifest else []
    )
    if foreign:
        raise InputError(
            f"{folder}: holds {foreign[0]}, which its command did not write; move it elsewhere before --force replaces the folder"
        )


def check_part(part: Path, state_path: Path) -> None:
    """InputError when `X.part` is there but nothing says that it is unfinished work of these tools."""
    if part.is_symlink():
        raise InputError(f"{part}: is a link; unfinished work goes there, so remove it or choose another output name")
    if not part.exists() or state_path.exists():
        return
    if part.is_dir() and _is_manifest(part / FOLDER_MANIFEST):
        return  # a kill came after its last word
    if part.is_dir() and {path.name for path in part.iterdir()} <= {state_path.name + ".tmp"}:
        return  # a kill came before its first word
    raise InputError(
        f"{part}: is not unfinished work of these tools, which goes there; move it away, or choose another output name"
    )


def open_lock(path: Path) -> IO[str]:
    """Open a lock file, made if need be, without following links or emptying anything. InputError: something else is there."""

    def opener(name: str, _: int) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)

    foreign = InputError(f"{path}: is not a lock file; remove it, or choose another output name")
    if path.is_fifo():  # opening it would never end, or change it
        raise foreign
    try:
        lock = open(path, "r+", encoding="utf-8", opener=opener)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise foreign from None
    found = os.fstat(lock.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        lock.close()
        raise foreign
    return lock


def _check_name_length(path: Path) -> None:
    longest = os.pathconf(path.parent, "PC_NAME_MAX")
    length = len(os.fsencode(path.name + _LONGEST_ENDING))
    if 0 < longest < length:
        room = longest - len(_LONGEST_ENDING)
        raise InputError(f"{path}: its name is too long for the files beside it; the longest here has {room} bytes")


def _kind(path: Path) -> str | None:
    """What stands at a path, links followed; None: nothing (or a link to nothing)."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for fits, name in kinds if fits(mode)), "a device")


def _check_input(path: Path, given: Path) -> None:
    if not given.exists():
        return
    if path.suffix == ".safetensors" and given.is_dir() and path.parent.samefile(given):
        raise InputError(f"{path}: would lie among the weights of {given}; choose another folder for it")
    if not path.exists():
        return
    if path.samefile(given):
        raise InputError(f"{path}: is an input of this command; choose another output name")
    if path.is_dir() and given.resolve().is_relative_to(path.resolve()):
        raise InputError(f"{path}: holds {given}, an input of this command; choose another output name")


def _check_manifest(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path}: the manifest goes there; move it away, or choose another output name")
    if path.exists() and not _is_manifest(path):
        raise InputError(
            f"{path}: is no manifest of these tools, whose own goes there; move it away, or choose another output name"
        )


def _is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of these tools."""
    try:
        value = read_json(path, "")
    except (OSError, InputError):
        return False
    return isinstance(value, dict) and isinstance(value.get("fingerprint"), dict)
