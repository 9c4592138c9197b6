"""A hub of a few folders over HTTP, as far as huggingface_hub downloads snapshots from it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


def commit_of(folder: Path) -> str:
    """A name of forty digits for what a folder holds."""
    parts = [(str(file.relative_to(folder)), file.read_bytes()) for file in _files(folder)]
    return hashlib.sha1(repr(parts).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


class FakeHub(ThreadingHTTPServer):
    """models: the folder of each revision by repository. The rest is what goes wrong, and what was asked.

    status: what every request is answered with instead, such as 503. stall: a file of which half is sent, and then nothing. lost: a
    file that is listed, but not there.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.status: int | None = None
        self.stall: str | None = None
        self.lost: str | None = None
        self.stalled = threading.Event()
        self.requests: list[str] = []
        self.ranges: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Let a revision be what the folder holds; its commit."""
        commit = commit_of(folder)
        self.models.setdefault(repository, {}).update({revision: folder, commit: folder})
        return commit

    @property
    def downloads(self) -> list[str]:
        """The files that were sent, by name."""
        return sorted(
            {line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line}
        )


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.status is not None:
            return self._send(self.server.status, b"")
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            return self._api("/".join(words[2:4]), words[4:])
        if words[2:3] == ["resolve"]:
            return self._file("/".join(words[:2]), words[3], "/".join(words[4:]))
        self._send(404, b"")

    def _api(self, repository: str, rest: list[str]) -> None:
        revision = "/".join(rest[1:]) or "main"
        folder = self._folder(repository, revision)
        if folder is None:
            return
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _oid(file)}
                for file in _files(folder)
            ]
            return self._send(200, json.dumps(tree).encode())
        names = [{"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size} for f in _files(folder)]
        self._send(200, json.dumps({"id": repository, "sha": commit_of(folder), "siblings": names}).encode())

    def _folder(self, repository: str, revision: str) -> Path | None:
        """The folder of a revision; None once the refusal is sent."""
        if repository in self.server.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repository not in self.server.models:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.server.models[repository]:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.server.models[repository][revision]
        return None

    def _file(self, repository: str, revision: str, name: str) -> None:
        folder = self._folder(repository, revision)
        if folder is None:
            return
        if not (folder / name).is_file() or name == self.server.lost:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{_oid(folder / name)}"', "X-Repo-Commit": commit_of(folder), "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is not None and self.command == "GET":
            self.server.ranges.append((name, wanted))
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[first:], headers)
        self._send(200, content, headers, stall=self.command == "GET" and name == self.server.stall)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, stall: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not stall:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.server.stalled.set()
        time.sleep(60)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
