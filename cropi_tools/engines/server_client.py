"""The wire to an OpenAI-compatible server: the `openai` client on a thread of its own, and its failures in one sentence each.

The client retries by itself what may pass (connections refused or lost, timeouts, 409, 429, 5xx), with growing pauses or those the
server asks for. The key comes from OPENAI_API_KEY alone and is in no message.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cropi_tools.data.metadata import COUNT, TEXT, Listed, Maybe, fault
from cropi_tools.engines.server_dialects import MALFORMED, Answer, Dialect
from cropi_tools.runtime.errors import InputError, UsageError

RETRIES = 8  # pauses of 0.5 s, then twice as long each time, at most 8 s: a server may be away for about 40 s
_RETRIES_AT_FIRST = 2  # an address that never answered is more likely wrong than busy
_FIRST_SECONDS = 30.0  # for an answer about the server itself
_KEY = "OPENAI_API_KEY"
_LARGEST = 1 << 28  # bytes of an answer: more than the longest response with all its log-probabilities
_MODELS = {"data": Listed({"id": TEXT, "owned_by?": Maybe(TEXT), "max_model_len?": Maybe(COUNT)})}

T = TypeVar("T")


class _Endless(BaseException):
    """An answer has no end, or none in sight. No `Exception`, since the client would ask again for all of those."""


class _Bounded:
    """The body of an answer as it comes: _LARGEST bytes at most, in as many seconds as the request has for each of its steps."""

    def __init__(self, response: Any) -> None:
        self._stream = response.stream
        seconds = response.request.extensions.get("timeout", {}).get("read")
        self._seconds, self._begun = seconds, time.monotonic()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._stream:
            size += len(piece)
            if size > _LARGEST:
                raise _Endless(f"has more than {_LARGEST >> 20} MiB")
            if self._seconds is not None and time.monotonic() - self._begun > self._seconds:
                raise _Endless(f"does not end within {self._seconds:g} s")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: Any) -> None:
    """Before the body of an answer is read. It must not be compressed, which nobody asked for: a few bytes could stand for any number."""
    if response.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise _Endless(f"is compressed ({response.headers['content-encoding']}) though that was not asked for")
    # of the kind that the library wants; which library that is, httpx or its successor, the client alone knows
    response.stream = type("Bounded", (_Bounded, *type(response.stream).__bases__), {})(response)


class Client:
    """Requests to one server, at most `concurrency` of them in flight.

    url: its address, with or without the /v1; timeout: seconds for one response. Close it, or its thread and connections stay.
    InputError: the package is missing; UsageError: the address is none or carries a key.
    """

    def __init__(self, url: str, concurrency: int, timeout: float) -> None:
        try:
            import openai
        except ImportError:
            raise InputError(
                "a server needs the openai package; install it with pip install 'cropi-tools[server]'"
            ) from None
        self.url = _checked(url)
        self.root = self.url.removesuffix("/v1")
        self._openai = openai
        self._timeout = timeout
        self._key = os.environ.get(_KEY) or ""
        self._places = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server client", daemon=True)
        self._thread.start()
        # local servers want no key, but the client wants one to send
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=RETRIES,
            timeout=openai.Timeout(timeout, connect=10.0),
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_bound]}),
        )

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work` on the client's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response of /v1/completions, once there is a place among those in flight. InputError: there is none."""
        rest = {key: value for key, value in body.items() if key not in ("model", "prompt", "seed")}
        async with self._places:
            try:
                raw = await self._client.completions.with_raw_response.create(
                    model=body["model"], prompt=body["prompt"], seed=body["seed"], extra_body=rest
                )
                found = raw.http_response.json()
            except self._openai.OpenAIError as error:
                raise InputError(self._told(error, len(body["prompt"]))) from None
            except _Endless as error:
                raise self._endless(error) from None
            except (ValueError, RecursionError):
                raise self.not_an_answer() from None
        if not isinstance(found, dict):
            raise self.not_an_answer()
        return found

    async def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists. InputError: it lists nothing, or nobody answers."""
        try:
            found: Any = await self._client.with_options(max_retries=_RETRIES_AT_FIRST, timeout=_FIRST_SECONDS).get(
                "/models", cast_to=object
            )
        except self._openai.NotFoundError:
            raise InputError(
                f"{self.url}: no OpenAI-compatible server (it has no {self.url}/models); correct the address"
            ) from None
        except self._openai.OpenAIError as error:
            raise InputError(self._told(error, 0)) from None
        except _Endless as error:
            raise self._endless(error) from None
        except (ValueError, RecursionError):
            raise self.not_an_answer() from None
        if fault(found, _MODELS):
            raise InputError(f"{self.url}: {self.url}/models is no list of models; correct the address")
        listed: list[dict[str, Any]] = found["data"]
        return listed

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What a page beside /v1 answers, with a body by POST; None when the server has no such page, or not for us."""
        client, page = (
            self._client.with_options(max_retries=_RETRIES_AT_FIRST, timeout=_FIRST_SECONDS),
            self.root + path,
        )
        try:
            found: Any = await (
                client.get(page, cast_to=object) if body is None else client.post(page, body=body, cast_to=object)
            )
        except (self._openai.OpenAIError, _Endless, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def close(self) -> None:
        """Cancel what is in flight and end the thread."""
        if self._loop.is_closed():
            return
        self.submit(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    def read(self, dialect: Dialect, response: Mapping[str, Any]) -> Answer:
        """The one answer of a response. InputError: it is none."""
        try:
            return dialect.read(response)
        except MALFORMED:
            raise self.not_an_answer() from None

    def _endless(self, error: _Endless) -> InputError:
        return InputError(f"{self.url}: the answer {error}; correct the address, or see the server's log")

    def not_an_answer(self) -> InputError:
        """The error for a response that is not of the interface."""
        return InputError(f"{self.url}: the answer is not that of an OpenAI-compatible server; correct the address")

    def _told(self, error: Exception, prompt_tokens: int) -> str:
        """One sentence: what failed, where, and the remedy."""
        kinds, url, again = self._openai, self.url, "the same command resumes from what is finished"
        if isinstance(error, kinds.APITimeoutError):
            return f"{url}: no answer within {self._timeout:g} s; lower --concurrency or --max-tokens, {again}"
        if isinstance(error, kinds.APIConnectionError):
            reason = error.__cause__ or error
            return (
                f"{url}: no connection ({self._clean(str(reason))}); start the server or correct the address, {again}"
            )
        if not isinstance(error, kinds.APIStatusError):
            return f"{url}: {self._clean(str(error))}"
        code = error.status_code
        if code in (401, 403):
            wish = f"set {_KEY} to one that it takes" if self._key else f"set {_KEY}"
            return f"{url}: the server refuses {'the key' if self._key else 'requests without a key'} ({code}); {wish}"
        said = self._clean(error.message)
        if code == 429:
            return f"{url}: too many requests ({code}), {RETRIES} retries later too; lower --concurrency, {again}"
        if code >= 500:
            return f"{url}: the server fails ({said}), {RETRIES} retries later too; see its log, {again}"
        if code == 404:
            return f"{url}: not found ({said}); correct the address or --served-model"
        return (
            f"{url}: the server refuses a prompt of {prompt_tokens} tokens ({said}); "
            "lower --max-tokens, leave the prompt out, or start the server with a longer context"
        )

    def _clean(self, text: str) -> str:
        """The first line of a message, without the key should a server repeat it."""
        line = (text.strip().splitlines() or ["no reason given"])[0]
        return line.replace(self._key, "***") if self._key else line


def _checked(url: str) -> str:
    """The address with /v1 and nothing after it."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError:
        raise UsageError("the server's address cannot be read; give one such as http://127.0.0.1:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UsageError(f"the server's address must carry no key, no `?` and no `#`; put the key into {_KEY}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url} is no address of a server; give one such as http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
    return f"{parts.scheme}://{parts.netloc}{path}" + ("" if path.endswith("/v1") else "/v1")
