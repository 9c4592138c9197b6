"""Outputs that survive a kill: work grows in `X.part`, is committed in steps, and takes its name when it is whole.

    X.part            the work (a file, or a folder for stores and policies)
    X.part.json       what is committed and the fingerprint of the command that works on it (`X.part/progress.json` in a folder)
    X, X.manifest.json   the result, renamed into place, then its manifest (in a folder the manifest is inside, so both appear at once)

The same command again: a finished output is "up to date", an unfinished one is resumed after its last commit. Another command on
the same name is refused with what differs; `--force` starts again and replaces the old result only after success.
A command that fails before its first commit leaves nothing behind.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from cropi_tools.data.jsonl import compress
from cropi_tools.data.manifest import (
    FINGERPRINT,
    FOLDER_MANIFEST,
    MANIFEST,
    SCHEMA,
    Fingerprint,
    Input,
    environment,
    file_digest,
    manifest_path,
    read_manifest,
    write_json,
)
from cropi_tools.data.metadata import COUNT, NUMBER, OBJECT, Shape, checked, read_json
from cropi_tools.data.output_place import check_part, check_place, check_replaceable, open_lock
from cropi_tools.runtime.clock import Clock
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.runtime.signals import keeps

PROGRESS = "progress.json"
_STATE = {
    "fingerprint": FINGERPRINT,
    "seconds": NUMBER,
    "seconds_start?": NUMBER,
    "committed": {"lines?": COUNT, "bytes?": COUNT, "records?": COUNT, "rows?": COUNT, "counters?": OBJECT},
}
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)


class Output:
    """One output of one command. `open` says whether there is work; `commit` and `finish` end it."""

    def __init__(
        self,
        path: str | Path,
        fingerprint: Fingerprint,
        inputs: Mapping[str, Input],
        *,
        folder: bool = False,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.name in ("", ".."):
            raise UsageError(f"-o {str(path)!r}: is no name for a file or folder")
        self.fingerprint, self.inputs, self.folder, self.force = fingerprint, inputs, folder, force
        self.part = self.path.with_name(self.path.name + ".part")
        self._packed = self.path.with_name(self.path.name + ".part.packed")
        self._old = self.path.with_name(self.path.name + ".part.old")
        self._state_path = self.part / PROGRESS if folder else self.path.with_name(self.path.name + ".part.json")
        self.state: dict[str, Any] = {}
        self._clock = Clock()
        self._lock: IO[str] | None = None
        self._manifest: dict[str, Any] | None = None  # from the moment that the file may bear its name

    # -- beginning

    def open(self) -> bool:
        """True when there is work to do (then `state` holds what an earlier try committed), False when it is up to date.

        InputError when the name is taken by something else: a result of other options or inputs, a file without a manifest,
        unfinished work of another command, or a process that works on it now.
        """
        check_place(self.path, self.folder, self.inputs.values())
        try:
            self._take_lock()
        except OSError as error:
            if error.errno in _NO_WRITING and self._up_to_date():
                return False
            raise InputError(f"{self.path.parent}: cannot be written to ({error.strerror})") from None
        try:
            check_part(self.part, self._state_path)
            self._recover_rename()
            done = self._up_to_date()
            if not done:
                self._adopt_part()
        except BaseException:
            self._release_lock()
            raise
        if done:
            self._release_lock()
        self.begin_work()
        return not done

    def _take_lock(self) -> None:
        path = self.path.with_name(self.path.name + ".part.lock")
        while True:
            lock = open_lock(path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise InputError(f"{self.path}: another process is writing it; wait for it or stop it") from None
            # whoever held it until now may have removed it: then another process can lock a new file of this name
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    break
            lock.close()
        self._lock = lock
        atexit.register(self._leave)

    def _leave(self) -> None:
        """At the end of a process that did not finish: without a commit there is nothing to resume from."""
        if self._lock is not None:
            if not (self.state or self._is_whole()):
                # a thread of a library may still write there; then the next try takes it away
                with contextlib.suppress(OSError):
                    self._drop_part()
            self._release_lock()

    def _is_whole(self) -> bool:
        """Whether `finish` came so far that the next try only has to complete it."""
        if self.folder:
            return (self.part / FOLDER_MANIFEST).exists()
        return self._manifest is not None and self._is_described(self._manifest)

    def _release_lock(self) -> None:
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _read_state(self) -> dict[str, Any] | None:
        """What the progress file says. InputError: it is damaged."""
        path, remedy = self._state_path, f"remove {self.part} and {self._state_path} to start again"
        try:
            found: dict[str, Any] = checked(read_json(path, remedy), _STATE, f"{path}: is damaged", remedy)
        except FileNotFoundError:
            return None
        if "manifest" in found:
            checked(found["manifest"], MANIFEST, f"{path}: is damaged", remedy)
            checked(found["manifest"]["outputs"], {self.path.name: OBJECT}, f"{path}: is damaged", remedy)
        return found

    def _recover_rename(self) -> None:
        """Finish a `finish` that was killed between its steps."""
        if self.folder:
            if read_manifest(self.part) is not None:
                self._replace_folder()
            elif self.path.exists():
                shutil.rmtree(self._old, ignore_errors=True)
            return
        state = self._read_state()
        if state and "manifest" in state and self._is_described(state["manifest"]):
            self.part.unlink(missing_ok=True)
            write_json(manifest_path(self.path), state["manifest"])
            self._state_path.unlink()

    def _is_described(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the file at the final name is the one of this manifest: a rename keeps size and time."""
        wanted = manifest["outputs"][self.path.name]
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        return (found.st_size, found.st_mtime_ns) == (wanted["bytes"], wanted["mtime_ns"])

    def _up_to_date(self) -> bool:
        if not self.path.exists():
            return False
        manifest = read_manifest(self.path)
        if self.force and self.folder:
            check_replaceable(self.path, manifest)
        if manifest is None:
            if self.force:
                return False
            raise InputError(f"{self.path}: exists and was not written by this command; --force replaces it")
        difference = Fingerprint.from_json(manifest["fingerprint"]).difference(self.fingerprint)
        changed = self._changed_since(manifest)
        if difference is None and changed is None:
            # --force on a finished output asks for it again, unless that very repetition is already under way
            return not self.force
        if self.force:
            return False
        raise InputError(f"{self.path}: exists, {difference or changed}; --force replaces it")

    def _changed_since(self, manifest: Mapping[str, Any]) -> str | None:
        if not self.folder and len(manifest["outputs"]) != 1:
            return f"its manifest names {len(manifest['outputs'])} files"
        for name, output in manifest["outputs"].items():
            path = self.path / name if self.folder else self.path
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return f"its {name} is gone"
            if (found.st_size, found.st_mtime_ns) == (output["bytes"], output["mtime_ns"]):
                continue
            if file_digest(path) != output["sha256"]:
                return f"{path.name} was changed since it was written"
        return None

    def _adopt_part(self) -> None:
        state = self._read_state()
        if state is not None and state["committed"]:
            difference = Fingerprint.from_json(state["fingerprint"]).difference(self.fingerprint)
            if difference is None:
                self.state = state["committed"]
                self._clock.whole, self._clock.start = state["seconds"], state.get("seconds_start", 0.0)
                keeps("what was finished before")  # until the work itself says how much that is
                return
            if not self.force:
                raise InputError(
                    f"{self.part}: unfinished work, {difference}; remove it or give --force to start again"
                )
        self._drop_part()
        if self.folder:
            self.part.mkdir()
        self.commit({})

    def _drop_part(self) -> None:
        if self.part.is_dir():
            if self._state_path.exists():
                self.commit({})  # a kill in the middle must not leave the word that all of it counts
            for path in self.part.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path != self._state_path:
                    path.unlink()
            self._state_path.unlink(missing_ok=True)
            self.part.rmdir()
        else:
            for path in (self.part, self._packed, self._state_path):
                path.unlink(missing_ok=True)

    # -- working

    def resumed(self, shape: Shape) -> dict[str, Any]:
        """What an earlier try committed, of this shape; empty without one. InputError: the progress file is damaged."""
        remedy = f"remove {self.part} and {self._state_path} to start again"
        return checked(self.state, shape, f"{self._state_path}: is damaged", remedy) if self.state else {}

    def begin_work(self) -> None:
        """Say that starting (imports, loading, compiling, trying out) is over: from here on seconds are work.

        `open` says so first; a command that still has something to load calls this again before its first unit of work.
        """
        self._clock.begin_work()

    def seconds(self) -> float:
        """Seconds spent on this output, its start included; earlier tries counted up to their last commit."""
        return self._clock.seconds()[0]

    def _times(self) -> dict[str, float]:
        """The seconds as the ledger has them: all, and start and work apart."""
        whole, start = (round(value, 3) for value in self._clock.seconds())
        return {"seconds": whole, "seconds_start": start, "seconds_work": round(whole - start, 3)}

    def commit(self, state: Mapping[str, Any], **extra: Any) -> None:
        """Say durably that everything up to `state` is in the part; a later try resumes from here."""
        self.state = dict(state)
        seconds, start = self._clock.seconds()
        times = {"seconds": seconds, "seconds_start": start}
        whole = {"fingerprint": self.fingerprint.to_json(), **times, "committed": self.state, **extra}
        write_json(self._state_path, whole)

    # -- ending

    def finish(
        self,
        *,
        rows: int,
        skipped: Mapping[str, int] | None = None,
        ledger: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        content: Iterable[str] | None = None,
    ) -> None:
        """Give the part its name and write the manifest.

        ledger: costs (tokens generated, tokens trained on, device); seconds are added. facts: what readers need to check that
        files belong together (policy, tokenizer, projection). content: for a folder, the files whose hashes are recorded; None = all.
        """
        produced = self.part
        if not self.folder and self.path.suffix in (".gz", ".zst"):
            produced = self._packed
            compress(self.part, produced, self.path.suffix)
        if self.folder:
            for torn in self.part.glob("*.tmp"):  # of a write that a kill cut short
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
            names = [str(p.relative_to(self.part)) for p in sorted(self.part.rglob("*")) if p.is_file()]
            names = [name for name in names if name != PROGRESS and (content is None or name in set(content))]
            outputs = {name: _described(self.part / name) for name in names}
        else:
            outputs = {self.path.name: _described(produced)}
        manifest = {
            "schema": SCHEMA,
            "command": self.fingerprint.command,
            "fingerprint": self.fingerprint.to_json(),
            "options": dict(self.fingerprint.options),
            "inputs": {name: {"path": item.path, "sha256": item.sha256} for name, item in self.inputs.items()},
            "outputs": outputs,
            "rows": rows,
            "skipped": dict(skipped or {}),
            "facts": dict(facts or {}),
            "ledger": {**self._times(), **dict(ledger or {})},
            **environment(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if self.folder:
            manifest["entries"] = sorted(path.name for path in self.part.iterdir() if path.name != PROGRESS)
            write_json(self.part / FOLDER_MANIFEST, manifest)
            self._replace_folder()
        else:
            self.commit(self.state, manifest=manifest)
            self._manifest = manifest
            old_manifest = manifest_path(self.path)
            old_manifest.unlink(missing_ok=True)
            os.replace(produced, self.path)
            self.part.unlink(missing_ok=True)
            write_json(old_manifest, manifest)
            self._state_path.unlink()
        self._release_lock()

    def _replace_folder(self) -> None:
        (self.part / PROGRESS).unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            os.rename(self.path, self._old)
        os.rename(self.part, self.path)
        shutil.rmtree(self._old, ignore_errors=True)


def _described(path: Path) -> dict[str, Any]:
    # safetensors makes its files readable by their owner alone; outputs have the rights the user's umask gives
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(PermissionError):  # a file system without rights
        path.chmod(0o666 & ~umask)
    found = path.stat()
    return {"sha256": file_digest(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
