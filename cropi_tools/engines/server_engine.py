"""Sampling from any OpenAI-compatible server: vLLM, SGLang, llama.cpp, or one of the plain interface.

Each response is a request of its own with its own seed and every sampling parameter said; nothing is left to the server's defaults or
to the generation_config.json it serves. Where a server cannot say what it sampled, or with which probability, the response says so: its
`logprobs` are None, and importance weights need a recomputed behavior policy.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import TYPE_CHECKING, Any

from cropi_tools import runtime
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling, scores_not_finite
from cropi_tools.engines.server_client import Client
from cropi_tools.engines.server_dialects import Answer, dialect_of
from cropi_tools.engines.server_probes import keeps_to_seeds, tells_sampled_logprobs
from cropi_tools.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from cropi_tools.policy.loading import Policy
    from cropi_tools.policy.tokens import Tokens

SEED_BITS = 31
"""Bits of a sample's seed that are sent; every server takes as many."""

_BEGUN = 2  # requests begun, in multiples of the concurrency: one that ends is replaced at once, while the caller is busy too
_HELD = 8  # responses begun and not yet given, in multiples of the concurrency: a slow one at the head holds up no more than these
_NOTICE_SECONDS = 0.5  # how soon the wish to stop is noticed
_PROBE_TOKENS = 16
_SAMPLE_TEXT = "Solve 12 + 345 = ?\n  x = (7 - y)/2, therefore The Answer is: 9."


class ServerEngine(Engine):
    """Samples from the model behind `url`, which must be that of the folder `tokens` is of.

    url: the server's address, with or without /v1. served_model: the model's name there; None: the only one. concurrency: most requests
    in flight. timeout: seconds for one response. The key, where one is wanted, is read from OPENAI_API_KEY.
    InputError: the server cannot be reached, does not serve that model or only under other names, or has another tokenizer; later: it
    refuses a request, or fails it again and again.
    """

    def __init__(
        self, url: str, tokens: Tokens, served_model: str | None = None, concurrency: int = 64, timeout: float = 3600.0
    ) -> None:
        self._tokens, self._ends = tokens, list(tokens.end_token_ids)
        self._concurrency = concurrency
        # neither larger nor smaller than its tokenizer's, in general
        self._vocabulary = tokens.vocabulary or len(tokens.tokenizer)
        self._generated: deque[int] = (
            deque()
        )  # tokens of responses that came and were not counted yet; of another thread
        self._sampled_logprobs: dict[float, bool] = {0.0: False}  # by temperature
        self._warned: set[str] = set()
        self._client = Client(url, concurrency, timeout)
        try:
            served = _choose(self._client.url, self._await(self._client.models()), served_model)
            self._served: str = served["id"]
            self._longest = served.get("max_model_len")
            self._dialect = dialect_of(served.get("owned_by"))
            self._version = self._ask_version()
            self._check_tokenizer()
        except BaseException:
            self._client.close()
            raise

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        """As the protocol says. Raises Interrupted when a signal asks to stop while no group is whole."""
        if 0.0 < sampling.temperature < self._dialect.lowest_temperature:
            raise UsageError(
                f"{self._client.url}: the server takes temperatures from {self._dialect.lowest_temperature:g} on, and 0; raise --temperature"
            )
        waiting = iter(groups)
        held: deque[_Group] = deque()
        pace = _Pace(_BEGUN * self._concurrency)
        try:
            while True:
                while (
                    not (
                        held and held[0].ready
                    )  # a group without requests is ready at once: giving it comes before taking more
                    and pace.left < pace.enough
                    and sum(len(group.futures) for group in held) < _HELD * self._concurrency
                    and (requests := next(waiting, None)) is not None
                ):
                    self._prepare(requests, sampling)
                    held.append(_Group([self._client.submit(self._answer(r, sampling)) for r in requests], pace))
                if not held:
                    return
                if held[0].ready:
                    yield held.popleft().result()
                    continue
                pace.wait()
                while self._generated:
                    runtime.count_tokens(self._generated.popleft())
                if not held[0].ready:
                    runtime.stop_if_requested()
        finally:
            for group in held:
                group.cancel()

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """As the protocol says: the server, its kind and version where it tells it, and all fields as sent."""
        return {
            "engine": "server",
            "server": self._dialect.name,
            "version": self._version,
            "url": self._client.url,
            "served_model": self._served,
            "end_token_ids": self._ends,
            "seed_bits": SEED_BITS,
            **self._dialect.fields(sampling, self._ends),
        }

    def update_weights(self, policy: Policy) -> None:
        """UsageError: a server keeps the weights that it was started with."""
        raise UsageError(f"{self._client.url}: a server's weights stay as they are; train with another --engine")

    def close(self) -> None:
        """Cancel what is in flight and end the thread and its connections."""
        self._client.close()

    def _body(self, prompt: list[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        if self._longest is not None and len(prompt) + sampling.max_tokens > self._longest:
            raise InputError(
                f"{self._client.url}: a prompt of {len(prompt)} tokens and --max-tokens {sampling.max_tokens} are more than the server's "
                f"{self._longest}; lower --max-tokens, leave the prompt out, or start the server with a longer context"
            )
        fields = self._dialect.fields(sampling, self._ends)
        return {"model": self._served, "prompt": prompt, "seed": seed % (1 << SEED_BITS), **fields}

    async def _answer(self, request: Request, sampling: Sampling) -> Completion:
        response = await self._client.complete(self._body(request.prompt_token_ids, request.seed, sampling))
        found = self._completion(self._client.read(self._dialect, response), sampling)
        self._generated.append(len(found.token_ids))
        return found

    def _completion(self, answer: Answer, sampling: Sampling) -> Completion:
        """The answer as a response that ends with its first end token, or at the limit. InputError: it is no sample of this policy."""
        url, stopped = self._client.url, answer.finish_reason == "stop"
        if not stopped and answer.finish_reason != "length":
            raise InputError(f"{url}: the server gave up a response ({answer.finish_reason}); see its log")
        generated = answer.counted if answer.token_ids is None else len(answer.token_ids)
        if not stopped and generated is not None and generated < sampling.max_tokens:
            raise InputError(
                f"{url}: the server cut a response at {generated} tokens, before --max-tokens {sampling.max_tokens}; "
                "lower --max-tokens, or start the server with a longer context"
            )
        if answer.token_ids is not None and len(answer.token_ids) > sampling.max_tokens:
            raise InputError(
                f"{url}: the server gave {len(answer.token_ids)} tokens, more than --max-tokens {sampling.max_tokens} asks for; "
                "see whether it knows max_tokens"
            )
        ids, logprobs = answer.token_ids, answer.logprobs
        if ids is None:
            self._warn(
                f"{url}: the server tells no token ids; responses are tokenized again from their text, without log-probabilities "
                "(give --behavior MODEL to cropi-grad)"
            )
            ids = list(self._tokens.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
            logprobs = None
        if ids and not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise InputError(
                f"{url}: token {max(ids)} is none of the {self._vocabulary} of {self._tokens.folder}; serve that folder, or name with "
                "--model the one that is served"
            )
        if logprobs is not None and not self._usable(logprobs, ids, sampling):
            logprobs = None
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        if end is not None:
            return Completion(ids[: end + 1], None if logprobs is None else logprobs[: end + 1], "stop")
        if stopped:
            return Completion([*ids, self._left_out(answer)], None, "stop")
        return Completion(ids, logprobs, "length")

    def _usable(self, logprobs: Sequence[float | None], ids: Sequence[int], sampling: Sampling) -> bool:
        """Whether these are log-probabilities, one a token, of the distribution sampled."""
        if not self._sampled_logprobs[sampling.temperature]:
            return False
        if len(logprobs) != len(ids) or any(value is None for value in logprobs):
            raise self._client.not_an_answer()
        told = [value for value in logprobs if value is not None]
        if not all(map(math.isfinite, told)):
            raise scores_not_finite(self._tokens.folder)
        if max(told, default=0.0) > 1e-3:
            raise InputError(
                f"{self._client.url}: the server tells scores in place of log-probabilities; {self._dialect.logprobs_remedy}"
            )
        return True

    def _left_out(self, answer: Answer) -> int:
        """The end token of a response that stopped without one among its tokens."""
        token = answer.stop_token
        if token is None:
            usual = self._tokens.usual_end
            own = self._tokens.tokenizer.eos_token_id if usual is None else usual
            token = own if own in self._ends else self._ends[0]
        if answer.token_ids is not None:
            self._warn(
                f"{self._client.url}: the server leaves out end tokens; they are put back, and responses that had one come without "
                "log-probabilities (give --behavior MODEL to cropi-grad)"
            )
        if token not in self._ends:
            raise InputError(
                f"{self._client.url}: the server ends responses at token {token}, which is no end token of {self._tokens.folder}; "
                "serve that folder, or name with --model the one that is served"
            )
        return token

    def _prepare(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Before the first request at a temperature: find out what the server's log-probabilities are of, and whether seeds count."""
        if sampling.temperature in self._sampled_logprobs or not requests:
            return
        prompts = list({tuple(request.prompt_token_ids): request.prompt_token_ids for request in requests}.values())[:3]
        short = sampling._replace(max_tokens=min(sampling.max_tokens, _PROBE_TOKENS))
        # seeds first: whatever else is wrong with the server or the request is told here
        if not self._await(keeps_to_seeds(self._client, self._dialect, prompts[0], short, self._body)):
            self._warn(
                f"{self._client.url}: the server gives other responses for the same seed; a resumed or repeated run will differ "
                f"({self._dialect.seeds_remedy})"
            )
        sampled = self._await(tells_sampled_logprobs(self._client, self._dialect, prompts, short, self._body))
        self._sampled_logprobs[sampling.temperature] = sampled
        if not sampled and self._dialect.tells_logprobs:
            self._warn(
                f"{self._client.url}: the server does not tell the log-probabilities of what it samples at temperature "
                f"{sampling.temperature:g}; responses come without ({self._dialect.logprobs_remedy}, or give --behavior MODEL to cropi-grad)"
            )

    def _await(self, work: Any) -> Any:
        """Wait for one thing of the client's thread, noticing the wish to stop."""
        future = self._client.submit(work)
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        try:
            while not done.wait(_NOTICE_SECONDS):
                runtime.stop_if_requested()
        finally:
            future.cancel()
        return future.result()

    def _ask_version(self) -> str | None:
        path = self._dialect.version_path
        told = self._await(self._client.ask(path)) if path else None
        return self._dialect.version(told) if told else None

    def _check_tokenizer(self) -> None:
        """InputError: the server splits a text into other tokens than the folder's tokenizer does."""
        wish = self._dialect.tokenize(self._served, _SAMPLE_TEXT)
        told = self._await(self._client.ask("/tokenize", wish)) if wish else None
        own = list(self._tokens.tokenizer(_SAMPLE_TEXT, add_special_tokens=False)["input_ids"])
        if told and isinstance(told.get("tokens"), list) and told["tokens"] != own:
            raise InputError(
                f"{self._client.url}: {self._served} has another tokenizer than {self._tokens.folder}; serve that folder, or name with "
                "--model the one that is served"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            runtime.warn(message)


class _Pace:
    """How many responses are begun and have not come; wakes the waiting thread when there is something to do for it."""

    def __init__(self, enough: int) -> None:
        self.enough = enough
        self.left = 0
        self.lock = threading.Lock()
        self._news = threading.Event()

    def wait(self) -> None:
        """Until a group is ready or fewer than `enough` are left; for a moment only, so that the wish to stop is noticed."""
        self._news.wait(_NOTICE_SECONDS)
        self._news.clear()

    def wake_if(self, ready: bool) -> None:
        """Not for every response: the thread that receives them would wait for the one that is woken."""
        if ready or self.left < self.enough:
            self._news.set()


class _Group:
    """The responses of one group as they come."""

    def __init__(self, futures: Sequence[Future[Completion]], pace: _Pace) -> None:
        self.futures = futures
        self._pace = pace
        self._failed = False
        self._left = len(futures)
        with pace.lock:
            pace.left += len(futures)
        for future in futures:
            future.add_done_callback(self._note)

    @property
    def ready(self) -> bool:
        """Whether it is whole, or one of its responses will not come."""
        return self._left == 0 or self._failed

    def result(self) -> list[Completion]:
        """The responses in order. Raises what one of them failed with."""
        try:
            failed = (future for future in self.futures if future.done() and future.exception() is not None)
            return [future.result() for future in chain(failed, self.futures)]
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give up what has not come."""
        for future in self.futures:
            future.cancel()

    def _note(self, future: Future[Completion]) -> None:
        with self._pace.lock:
            self._left -= 1
            self._pace.left -= 1
            self._failed = self._failed or (not future.cancelled() and future.exception() is not None)
        self._pace.wake_if(self.ready)


def _choose(url: str, models: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """The entry of the model to sample from. InputError: the name is not served, or missing where several are."""
    names = ", ".join(str(model["id"]) for model in models) or "none"
    if name is None and len(models) != 1:
        raise InputError(f"{url}: the server has several models or none ({names}); name one with --served-model")
    found = [model for model in models if name is None or model["id"] == name]
    if not found:
        raise InputError(f"{url}: the server has no model {name}; name one of these with --served-model: {names}")
    return found[0]
