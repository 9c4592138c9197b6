"""Manifests: beside every output, what it was made from and how.

A manifest is written last, so an output with a manifest is whole. Its fingerprint (command, options that change the result,
hashes of the inputs) decides between "up to date", "resume" and "refuse".
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cropi_tools import __version__
from cropi_tools.data.jsonl import is_stream, local_path
from cropi_tools.data.metadata import COUNT, NAME, NUMBER, OBJECT, TEXT, WHOLE, Each, Listed, Maybe, checked, read_json
from cropi_tools.runtime.errors import InputError

SCHEMA = 1
FOLDER_MANIFEST = "manifest.json"
MANIFEST_ENDING = ".manifest.json"  # of a file's
_REMEDY = "remove it if you trust the data beside it"
_RECORDED_VERSIONS = ("torch", "transformers", "numpy", "zarr", "numba", "safetensors", "math-verify", "reasoning-gym")

FINGERPRINT = {"command": TEXT, "options": {"date?": Maybe(TEXT)}, "inputs": Each(TEXT)}
MANIFEST = {
    "command": TEXT,
    "fingerprint": FINGERPRINT,
    "options": {"learning_rate?": NUMBER, "steps?": NUMBER},
    "inputs": Each({"path": TEXT, "sha256": TEXT}),
    "outputs": Each({"sha256": TEXT, "bytes": COUNT, "mtime_ns": WHOLE}, key=NAME),
    "rows": COUNT,
    "skipped": Each(COUNT),
    "facts": {"tokenizer?": Maybe(TEXT)},
    "ledger": OBJECT,
    "entries?": Listed(NAME),
}
"""What a manifest must hold, of what is read again."""


@dataclass(frozen=True)
class Input:
    """One input of a command: where it was and what was in it."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Fingerprint:
    """What decides a result: two runs with the same fingerprint make the same output."""

    command: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str]

    @staticmethod
    def of(command: str, options: Mapping[str, Any], inputs: Mapping[str, Input]) -> Fingerprint:
        """Options must be JSON values; inputs count by content, not by path."""
        plain = json.loads(json.dumps(options, sort_keys=True))
        return Fingerprint(command, plain, {name: item.sha256 for name, item in sorted(inputs.items())})

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Fingerprint:
        return Fingerprint(value["command"], value["options"], value["inputs"])

    def to_json(self) -> dict[str, Any]:
        return {"command": self.command, "options": dict(self.options), "inputs": dict(self.inputs)}

    def difference(self, wanted: Fingerprint) -> str | None:
        """What differs, in words: `temperature 1.0, now 0.5`; None when nothing does."""
        if self.command != wanted.command:
            return f"made by {self.command}, now {wanted.command}"
        found = []
        for name in sorted(self.options.keys() | wanted.options.keys()):
            before, now = self.options.get(name), wanted.options.get(name)
            if before != now:
                found.append(f"{name.replace('_', '-')} {before}, now {now}")
        for name in sorted(self.inputs.keys() | wanted.inputs.keys()):
            if self.inputs.get(name) != wanted.inputs.get(name):
                found.append(f"the contents of {name}")
        return "; ".join(found) or None


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies: inside a folder, beside a file."""
    return output / FOLDER_MANIFEST if output.is_dir() else output.with_name(output.name + MANIFEST_ENDING)


def read_manifest(output: str | Path) -> dict[str, Any] | None:
    """The manifest of a file or folder, or None when it has none. InputError: it is none of these tools', damaged, or of a newer version."""
    path = manifest_path(Path(output))
    try:
        return checked_manifest(load_manifest(path), path)
    except FileNotFoundError:
        return None


def load_manifest(path: Path) -> dict[str, Any]:
    """What a manifest file holds, an object of this schema or an older one. Errors as `read_manifest`; FileNotFoundError: there is none."""
    found = read_json(path, _REMEDY)
    checked(found, {"schema?": COUNT}, f"{path}: is damaged or no manifest of these tools", _REMEDY)
    refuse_newer(found, path)
    return found


def checked_manifest(value: Any, path: Path) -> dict[str, Any]:
    """A manifest with everything that readers rely on. InputError: something of it is missing or of another type; path: of its file."""
    checked(value, MANIFEST, f"{path}: is damaged or no manifest of these tools", _REMEDY)
    if value["command"] == "cropi-train" and "policy" not in value["inputs"]:
        raise InputError(f"{path}: is damaged, its inputs have no policy; {_REMEDY}")
    return value


def refuse_newer(value: Mapping[str, Any], path: Path) -> None:
    """InputError when what was read says that its schema is newer than what is known here."""
    schema = value.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise InputError(f"{path}: was made by a newer cropi-tools (schema {schema}); upgrade to read it")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, sort_keys=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes; for `-`, of what standard input held."""
    with open(local_path(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_input(path: str | Path) -> Input:
    """A file as an input, hashed as it is read."""
    return Input("-" if is_stream(path) else str(path), file_digest(path))


def numbered(name: str, paths: Sequence[str]) -> dict[str, Input]:
    """Input files of one kind, hashed, as `name`, `name 2`, ...: known by their place, so that a moved file is still the same."""
    return {name if place == 1 else f"{name} {place}": file_input(path) for place, path in enumerate(paths, 1)}


def folder_digest(files: Mapping[str, str]) -> str:
    """One hash of a set of files, given each one's hash by its name in the folder."""
    text = json.dumps(dict(sorted(files.items())))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def environment() -> dict[str, Any]:
    """Versions, revision and host, for the manifest; none of it enters the fingerprint."""
    versions = {"cropi-tools": __version__, "python": platform.python_version()}
    for name in _RECORDED_VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "revision": _source_revision(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _source_revision() -> str | None:
    """The git revision of this source tree, `+` when it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        said = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
