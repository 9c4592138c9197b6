"""A small OpenAI-compatible server on loopback that speaks like vLLM, SGLang, llama.cpp or the plain interface, and misbehaves as told.

Its model knows the last token only, and its samples follow from the seed, so a test can say what every answer must be. Whoever leaves
a parameter to this server's defaults gets other samples: its defaults pick one token always.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from cropi_tools.engines.protocol import sample_seed

VOCABULARY = 71
END = 1

_PLAIN = {"n": 1, "stream": False, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_NEUTRAL: dict[str, dict[str, Any]] = {
    "openai": _PLAIN,
    "vllm": {**_PLAIN, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "watermarking": False},
    "sglang": {**_PLAIN, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False},
    "llamacpp": {
        **_PLAIN,
        "samplers": ["temperature"],
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "dry_multiplier": 0.0,
        "ignore_eos": False,
    },
}


@functools.cache
def scores(last: int) -> np.ndarray:
    """float64 [VOCABULARY]: what the model says after a token."""
    made = np.random.default_rng(last).normal(0, 2, VOCABULARY)
    made[END] += 1.0
    return made


@functools.cache
def logprobs(last: int, temperature: float) -> np.ndarray:
    """float64 [VOCABULARY]: log softmax(scores / temperature)."""
    scaled = scores(last) / temperature
    return scaled - (scaled.max() + np.log(np.exp(scaled - scaled.max()).sum()))


def response(
    prompt: list[int], seed: int, max_tokens: int, temperature: float, ends: tuple[int, ...] = (END,)
) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities under the tempered softmax, end token included."""
    ids: list[int] = []
    told: list[float] = []
    last = prompt[-1]
    while len(ids) < max_tokens and not (ids and ids[-1] in ends):
        table = logprobs(last, temperature or 1.0)
        u = sample_seed(seed, len(ids)) / 2.0**64
        last = int(
            np.argmax(table) if temperature == 0 else min(np.searchsorted(np.exp(table).cumsum(), u), VOCABULARY - 1)
        )
        ids.append(last)
        told.append(float(table[last]))
    return ids, told


@dataclass
class Behaviour:
    """How the server answers; tests change it while it runs."""

    kind: str = "vllm"
    models: list[str] = field(default_factory=lambda: ["P0"])
    max_model_len: int | None = 512
    key: str | None = None
    raw: bool = False  # log-probabilities at temperature 1, whatever the request's
    as_scores: bool = False  # scores in place of log-probabilities
    token_ids: bool = True
    leaves_out_ends: bool = False
    honours_seeds: bool = True
    tokenizer: Any = None  # answers /tokenize; None: there is no such page
    failures: list[Any] = field(default_factory=list)  # of each request's first tries: a status, or "drop"
    always: Any = None  # of every try
    only_seed: int | None = None  # the failures above befall this seed alone
    message: str = "no luck"
    seconds: float = 0.0
    hold: dict[int, threading.Event] = field(default_factory=dict)  # seeds that wait
    change: dict[str, Any] = field(default_factory=dict)  # of every choice
    junk: bool = False
    answers: dict[str, Any] = field(default_factory=dict)  # by page, what becomes of its answer
    raw_answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)  # status, headers, body
    endless: dict[str, float] = field(default_factory=dict)  # by page, the pause between pieces


class FakeServer:
    """Runs until closed. `url`: its address; `bodies`: every request for a completion that came; `most`: the most at once."""

    def __init__(self, behavior: Behaviour) -> None:
        self.behavior = behavior
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.answered: Counter[tuple[Any, ...]] = Counter()
        self.tries: Counter[tuple[Any, ...]] = Counter()
        self.now = self.most = 0
        self.closing = threading.Event()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self.closing.set()
        for event in self.behavior.hold.values():
            event.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        behavior = self.server_state.behavior
        if self._forbidden():
            return
        if self.path == "/v1/models":
            entry = {"object": "model", "owned_by": behavior.kind}
            if behavior.max_model_len:
                entry["max_model_len"] = behavior.max_model_len
            self._json({"object": "list", "data": [{"id": name, **entry} for name in behavior.models]})
        elif (behavior.kind, self.path) in {("vllm", "/version"), ("sglang", "/server_info")}:
            self._json({"version": "9.9"})
        elif (behavior.kind, self.path) == ("llamacpp", "/props"):
            self._json({"build_info": "b99"})
        else:
            self._json({"error": {"message": "not here"}}, 404)

    def do_POST(self) -> None:
        state, behavior = self.server_state, self.server_state.behavior
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._forbidden():
            return
        if self.path == "/tokenize" and behavior.tokenizer is not None:
            text = body["content" if behavior.kind == "llamacpp" else "prompt"]
            self._json({"tokens": behavior.tokenizer(text, add_special_tokens=False)["input_ids"]})
            return
        if self.path != "/v1/completions":
            self._json({"error": {"message": "not here"}}, 404)
            return
        key = (tuple(body["prompt"]), body["seed"], body["max_tokens"], body["temperature"])
        with state.lock:
            state.bodies.append(body)
            state.tries[key] += 1
            tried = state.tries[key]
            state.now += 1
            state.most = max(state.most, state.now)
        try:
            self._complete(body, key, tried)
        finally:
            with state.lock:
                state.now -= 1

    def _complete(self, body: dict[str, Any], key: tuple[Any, ...], tried: int) -> None:
        state, behavior = self.server_state, self.server_state.behavior
        if body["seed"] in behavior.hold:
            behavior.hold[body["seed"]].wait(20)
        if behavior.seconds:
            threading.Event().wait(behavior.seconds)
        trouble = behavior.failures[tried - 1] if tried <= len(behavior.failures) else behavior.always
        if behavior.only_seed is not None and body["seed"] != behavior.only_seed:
            trouble = None
        if trouble == "drop":
            self.close_connection = True
            return
        if trouble is not None:
            self._json({"error": {"message": behavior.message}}, trouble)
            return
        if behavior.junk:
            self._json(["not", "an", "answer"])
            return
        found = self._answer(body)
        with state.lock:
            state.answered[key] += 1
        self._json(found)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        behavior = self.server_state.behavior
        temperature, seed = float(body["temperature"]), body["seed"]
        if not behavior.honours_seeds:
            seed = sample_seed(seed, len(self.server_state.bodies))
        neutral = all(body.get(name) == value for name, value in _NEUTRAL[behavior.kind].items())
        ids, told = response(body["prompt"], seed, body["max_tokens"], temperature)
        if not neutral:
            ids, told = [5] * body["max_tokens"], [0.0] * body["max_tokens"]
        lasts = [body["prompt"][-1], *ids[:-1]]
        shown = 1.0 if behavior.raw else temperature or 1.0
        tables = [scores(last) if behavior.as_scores else logprobs(last, shown) for last in lasts]
        if neutral:
            told = [float(table[token]) for table, token in zip(tables, ids, strict=True)]
        stopped = ids[-1] == END
        counted = len(ids)
        text = "".join(self._word(token) for token in ids if token != END)
        if stopped and behavior.leaves_out_ends:
            ids, told = ids[:-1], told[:-1]
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop" if stopped else "length"}
        choice |= self._details(body, ids, told, tables, stopped)
        choice |= behavior.change
        return {"object": "text_completion", "choices": [choice], "usage": {"completion_tokens": counted}}

    def _details(
        self, body: dict[str, Any], ids: list[int], told: list[float], tables: list[np.ndarray], stopped: bool
    ) -> dict[str, Any]:
        behavior = self.server_state.behavior
        kind = behavior.kind
        if kind == "openai":
            return {"logprobs": None}
        if kind == "llamacpp":
            top = body["n_probs"]
            after = body.get("post_sampling_probs", False)
            name, value = ("prob", math.exp) if after else ("logprob", float)
            content = [
                {
                    "id": token,
                    name: value(one),
                    f"top_{name}s": [{"id": int(t), name: value(table[t])} for t in np.argsort(-table)[:top]],
                }
                for token, one, table in zip(ids, told, tables, strict=True)
            ]
            return {"logprobs": {"content": content} if behavior.token_ids else None}
        stop = {"vllm": "stop_reason", "sglang": "matched_stop"}[kind]
        found: dict[str, Any] = {stop: END if stopped and not behavior.leaves_out_ends else None}
        if behavior.token_ids and body.get("return_token_ids"):
            found["token_ids"] = ids
        if body.get("logprobs") is not None:
            tops = [
                {f"token_id:{t}": float(table[t]) for t in np.argsort(-table)[: body["logprobs"]]} for table in tables
            ]
            found["logprobs"] = {"token_logprobs": told, "top_logprobs": tops}
        return found

    def _word(self, token: int) -> str:
        import tiny_policy

        return "" if token < 2 else tiny_policy.CHARACTERS[token - 2]

    def _forbidden(self) -> bool:
        key = self.server_state.behavior.key
        if key is None or self.headers.get("authorization") == f"Bearer {key}":
            return False
        given = self.headers.get("authorization", "")
        self._json({"error": {"message": f"wrong key {given}"}}, 401)
        return True

    def _json(self, found: Any, status: int = 200) -> None:
        behavior = self.server_state.behavior
        if self.path in behavior.raw_answers:
            self._raw(*behavior.raw_answers[self.path])
            return
        if self.path in behavior.endless:
            self._without_end(behavior.endless[self.path])
            return
        data = json.dumps(behavior.answers.get(self.path, lambda given: given)(found)).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have given up
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after-ms", "5")
            self.end_headers()
            self.wfile.write(data)

    def _raw(self, status: int, headers: dict[str, str], body: bytes) -> None:
        told = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **headers}
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in told.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def _without_end(self, pause: float) -> None:
        self.close_connection = True
        piece = b" " * (1 if pause else 1 << 20)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            while not self.server_state.closing.wait(pause):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
