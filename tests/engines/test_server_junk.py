"""Servers that answer junk: every node of every answer replaced, and answers that are no JSON, never end, or end in the middle."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fake_server import Behaviour, FakeServer
from mutations import BRIEF, JUNK, mutations, one_line
from sweeps import some

from cropi_tools.engines import server_client
from cropi_tools.engines.protocol import Request, Sampling
from cropi_tools.engines.server_engine import ServerEngine
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.runtime.errors import CropiError

SAMPLING = Sampling(4, 1.0)
KINDS = ("openai", "vllm", "sglang", "llamacpp")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures that may pass are not waited for."""
    monkeypatch.setattr(server_client, "RETRIES", 0)
    monkeypatch.setattr(server_client, "_RETRIES_AT_FIRST", 0)
    monkeypatch.setattr(server_client, "_FIRST_SECONDS", 2.0)


@pytest.fixture(scope="module")
def tokens(policy_folder: Path) -> Any:
    return load_tokens(str(policy_folder))


@pytest.fixture
def start(tokens: Any) -> Iterator[Callable[..., FakeServer]]:
    servers = []

    def begin(**behavior: Any) -> FakeServer:
        servers.append(FakeServer(Behaviour(tokenizer=tokens.tokenizer, **behavior)))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def ask(server: FakeServer, tokens: Any, temperature: float = 1.0, timeout: float = 5.0) -> Any:
    """A response from the server, or the error in one line."""
    try:
        with closing(ServerEngine(server.url, tokens, timeout=timeout)) as engine:
            ((completion,),) = engine.stream([[Request([5, 6], 3)]], Sampling(4, temperature))
    except CropiError as error:
        return one_line(error, "127.0.0.1")
    json.dumps(completion._asdict(), allow_nan=False)
    assert all(type(token) is int and 0 <= token < 71 for token in completion.token_ids)
    assert completion.logprobs is None or len(completion.logprobs) == len(completion.token_ids)
    return completion


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", ["/v1/models", "/v1/completions", "/tokenize", "version"])
def test_every_node_of_every_answer(
    kind: str, page: str, start: Callable[..., FakeServer], tokens: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(kind=kind)
    paths = {"vllm": "/version", "sglang": "/server_info", "llamacpp": "/props"}
    path = paths.get(kind, "/v1/models") if page == "version" else page
    seen: list[Any] = []
    server.behavior.answers[path] = lambda found: (seen.append(found), found)[1]
    ask(server, tokens)
    if not seen:
        return  # this kind has no such page
    whole = seen[-1]
    for what, value in some(mutations(whole, BRIEF), 0.5, f"{kind} {page}"):
        server.behavior.answers[path] = lambda _, value=value: value
        try:
            ask(server, tokens)
        except AssertionError:
            raise
        except BaseException as error:
            pytest.fail(f"{kind} {path}: {what}: {type(error).__name__}: {str(error)[:300]}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
def test_every_node_of_what_probes_are_answered(kind: str, start: Callable[..., FakeServer], tokens: Any) -> None:
    """At another temperature than 1 the log-probabilities of the likeliest tokens are compared."""
    server = start(kind=kind)
    wishes = ("logprobs", "n_probs")
    seen: list[Any] = []

    def watch(found: Any) -> Any:
        if any(server.bodies[-1].get(wish) == 5 for wish in wishes):
            seen.append(found)
        return found

    server.behavior.answers["/v1/completions"] = watch
    ask(server, tokens, 0.5)
    few = {name: JUNK[name] for name in ("null", "text", "beyond floats", "no number", "list", "object of null")}
    for what, value in some(mutations(seen[-1], few, within=("choices",)), 0.4, kind):

        def change(found: Any, value: Any = value) -> Any:
            return value if any(server.bodies[-1].get(wish) == 5 for wish in wishes) else found

        server.behavior.answers["/v1/completions"] = change
        try:
            ask(server, tokens, 0.5)
        except BaseException as error:
            pytest.fail(f"{kind}: {what}: {type(error).__name__}: {str(error)[:300]}")


RAW: dict[str, tuple[int, dict[str, str], bytes]] = {
    "nothing": (200, {}, b""),
    "HTML": (200, {"content-type": "text/html"}, b"<html><body>Welcome to nginx!</body></html>"),
    "HTML that says it is JSON": (200, {}, b"<html>"),
    "no UTF-8": (200, {}, b'{"choices": "\xff\xfe"}'),
    "UTF-16 that says it is UTF-8": (200, {"content-type": "application/json; charset=utf-8"}, "{}".encode("utf-16")),
    "an unknown character set": (200, {"content-type": "application/json; charset=klingon"}, b"{}"),
    "nested deep": (200, {}, b"[" * 100_000),
    "a number of 5000 digits": (200, {}, b"9" * 5000),
    "not compressed as it says": (200, {"content-encoding": "gzip"}, b"{}"),
    "compressed without a word": (200, {}, gzip.compress(b"{}")),
    "an unknown compression": (200, {"content-encoding": "magic"}, b"\x01\x02"),
    "a bomb": (200, {"content-encoding": "gzip"}, gzip.compress(b" " * (300 << 20))),
    "a failure in bytes": (500, {}, bytes(range(256)) * 40),
    "a failure in HTML": (502, {"content-type": "text/html"}, b"<html>\n<h1>502</h1>\nBad\x1b[31m Gateway\n</html>"),
    "a refusal in bytes": (400, {}, bytes(range(256))),
    "a refusal in a list": (400, {}, b'[{"error": [1]}]'),
    "a refusal in deep nesting": (400, {}, b"[" * 100_000),
    "a redirect in a circle": (307, {"location": "/v1/models"}, b""),
    "a redirect to nowhere": (302, {"location": "http://127.0.0.1:9/v1"}, b""),
    "a redirect to no address": (302, {"location": "junk://["}, b""),
    "a redirect without a word where to": (301, {}, b""),
    "nothing new": (304, {}, b""),
    "no content": (204, {}, b""),
    "an unknown status": (799, {}, b"{}"),
    "a short body": (200, {"content-length": "10000"}, b'{"data": ['),
}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["/v1/models", "/v1/completions", "/tokenize", "/version"])
@pytest.mark.parametrize("what", RAW)
def test_answers_that_are_none(what: str, page: str, start: Callable[..., FakeServer], tokens: Any) -> None:
    server = start(kind="vllm")
    server.behavior.raw_answers[page] = RAW[what]
    said = ask(server, tokens)
    if page.startswith("/v1"):
        assert isinstance(said, str), "there was an answer"
    else:
        assert not isinstance(said, str), "nobody needs these pages"


@pytest.mark.parametrize("page", ["/v1/models", "/v1/completions"])
def test_an_answer_that_never_ends(page: str, start: Callable[..., FakeServer], tokens: Any) -> None:
    """Neither the memory nor the time that it takes grows without bound: not byte by byte, and not as fast as the wire carries."""
    for pause in (0.2, 0.0):
        server = start(kind="vllm")
        server.behavior.endless[page] = pause
        begun = time.monotonic()
        assert isinstance(ask(server, tokens, timeout=2.0), str)
        assert time.monotonic() - begun < 30
