"""What the servers of the OpenAI-compatible interface call their sampling parameters, and where they put their answers.

The interface itself knows no top-k, takes a server's own defaults for what a request leaves out, and answers in text. vLLM, SGLang and
llama.cpp add fields for the rest, each under other names. A dialect writes every parameter that a server could have a default for, and
reads token ids and log-probabilities where that server gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cropi_tools.data.metadata import TEXT, Kind, Listed, Maybe, Shape, fault, is_number
from cropi_tools.engines.protocol import Sampling

_NEUTRAL = {"n": 1, "stream": False, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

_TOKEN = Kind("a token id", lambda value: type(value) is int)
_LOGPROB = Kind("a number", lambda value: isinstance(value, float) or is_number(value))  # NaN has a message of its own
_TEXT = {"choices": Listed({"text": TEXT, "finish_reason": Maybe(TEXT)})}
_LISTS = {
    "choices": Listed(
        {
            "token_ids?": Maybe(Listed(_TOKEN)),
            "logprobs?": Maybe({"token_logprobs?": Maybe(Listed(Maybe(_LOGPROB)))}),
        }
    )
}
_CONTENT = {"choices": Listed({"logprobs?": Maybe({"content?": Maybe(Listed({"id": _TOKEN}))})})}

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
"""What `read` and `likeliest` raise for what is no answer of the interface."""


class Answer(NamedTuple):
    """One response as a server gives it.

    token_ids, logprobs: None where it tells none. stop_token: the token it says ended the response. counted: how many tokens it says it
    generated.
    """

    token_ids: list[int] | None
    logprobs: list[float] | None
    text: str
    finish_reason: str
    stop_token: int | None
    counted: int | None


class Dialect:
    """The plain interface: standard fields only, text only."""

    name = "openai"
    version_path: str | None = None
    """Where the server tells its version, from its root."""

    lowest_temperature = 0.0
    """Lower ones, but 0, it raises to this without a word."""

    tells_logprobs = False
    logprobs_remedy = ""
    """How to have it tell those of the distribution it samples, where it tells any."""

    seeds_remedy = "use a server that keeps to seeds, such as vLLM"

    def fields(self, sampling: Sampling, end_token_ids: Sequence[int]) -> dict[str, Any]:
        """Every parameter of a request but its model, prompt and seed."""
        return {**_NEUTRAL, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature}

    def version(self, told: Mapping[str, Any]) -> str | None:
        """The version in what `version_path` answers."""
        found = told.get("version")
        return found if isinstance(found, str) else None

    def tokenize(self, model: str, text: str) -> dict[str, Any] | None:
        """What to ask /tokenize for the token ids of `text`, no special ones added; None: this server has no such page."""
        return None

    def read(self, response: Mapping[str, Any]) -> Answer:
        """The one answer of a response. One of MALFORMED: it is none."""
        _check(response, _TEXT)
        choice = response["choices"][0]
        return Answer(None, None, str(choice["text"]), str(choice["finish_reason"]), None, _counted(response))

    def probe(self, top: int) -> dict[str, Any]:
        """Fields to add for the log-probabilities of the `top` most likely tokens."""
        raise NotImplementedError(f"the dialect {self.name} tells no log-probabilities")

    def likeliest(self, response: Mapping[str, Any]) -> dict[str, float]:
        """The log-probabilities that `probe` asked for, of the first token generated, by the token's name."""
        raise NotImplementedError(f"the dialect {self.name} tells no log-probabilities")


class _WithLists(Dialect):
    """Log-probabilities as the interface has them, in lists, and token ids beside them."""

    tells_logprobs = True
    stop_field = ""

    def read(self, response: Mapping[str, Any]) -> Answer:
        """As the plain interface, with token ids and log-probabilities."""
        _check(response, _LISTS)
        choice = response["choices"][0]
        told = choice.get("logprobs") or {}
        stop = choice.get(self.stop_field)
        return (
            super()
            .read(response)
            ._replace(
                token_ids=choice.get("token_ids"),
                logprobs=told.get("token_logprobs"),
                stop_token=stop if type(stop) is int else None,
            )
        )

    def tokenize(self, model: str, text: str) -> dict[str, Any] | None:
        """Both servers of this kind have the page."""
        return {"model": model, "prompt": text, "add_special_tokens": False}

    def probe(self, top: int) -> dict[str, Any]:
        """As the interface asks for them."""
        return {"logprobs": top}

    def likeliest(self, response: Mapping[str, Any]) -> dict[str, float]:
        """As the interface tells them."""
        return {
            str(token): float(value) for token, value in response["choices"][0]["logprobs"]["top_logprobs"][0].items()
        }


class Vllm(_WithLists):
    """vLLM. Responses end at our end tokens and no others; what its generation_config.json names is ignored."""

    name = "vllm"
    lowest_temperature = 0.01
    version_path = "/version"
    logprobs_remedy = "start it with --logprobs-mode processed_logprobs"
    stop_field = "stop_reason"

    def fields(self, sampling: Sampling, end_token_ids: Sequence[int]) -> dict[str, Any]:
        """Everything that a request, the served folder or the command line of the server could set."""
        return {
            **super().fields(sampling, end_token_ids),
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "min_tokens": 0,
            "ignore_eos": True,
            "stop_token_ids": list(end_token_ids),
            "watermarking": False,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **({} if sampling.temperature == 0.0 else {"logprobs": 0}),
        }


class Sglang(_WithLists):
    """SGLang. Its ignore_eos would ignore our end tokens too, so it may end responses at others of its own."""

    name = "sglang"
    version_path = "/server_info"
    logprobs_remedy = "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
    seeds_remedy = "start it with --enable-deterministic-inference"
    stop_field = "matched_stop"

    def fields(self, sampling: Sampling, end_token_ids: Sequence[int]) -> dict[str, Any]:
        """Everything that a request or the served folder could set."""
        return {
            **super().fields(sampling, end_token_ids),
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "min_tokens": 0,
            "ignore_eos": False,
            "stop_token_ids": list(end_token_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            **({} if sampling.temperature == 0.0 else {"logprobs": 1}),
        }


class LlamaCpp(Dialect):
    """llama.cpp's server. Tokens stand beside their probabilities, which are asked for as the sampler saw them."""

    name = "llamacpp"
    version_path = "/props"
    tells_logprobs = True
    logprobs_remedy = "use a newer one, which knows post_sampling_probs"

    def fields(self, sampling: Sampling, end_token_ids: Sequence[int]) -> dict[str, Any]:
        """Its samplers all off but the temperature; most of them are on unless told."""
        return {
            **super().fields(sampling, end_token_ids),
            "samplers": ["temperature"],
            "top_k": 0,
            "min_p": 0.0,
            "typical_p": 1.0,
            "top_n_sigma": -1.0,
            "xtc_probability": 0.0,
            "dynatemp_range": 0.0,
            "repeat_penalty": 1.0,
            "repeat_last_n": 0,
            "dry_multiplier": 0.0,
            "mirostat": 0,
            "ignore_eos": False,
            "n_probs": 1,
            "post_sampling_probs": True,
        }

    def version(self, told: Mapping[str, Any]) -> str | None:
        """The build it names."""
        found = told.get("build_info")
        return found if isinstance(found, str) else None

    def tokenize(self, model: str, text: str) -> dict[str, Any] | None:
        """Under its own names."""
        return {"content": text, "add_special": False}

    def read(self, response: Mapping[str, Any]) -> Answer:
        """Tokens from the list of probabilities, which leaves out pieces of characters: then there are fewer than it counted."""
        answer = super().read(response)
        _check(response, _CONTENT)
        told = (response["choices"][0].get("logprobs") or {}).get("content")
        if not told or len(told) != answer.counted:
            return answer
        return answer._replace(token_ids=[token["id"] for token in told], logprobs=[_logprob(t) for t in told])

    def probe(self, top: int) -> dict[str, Any]:
        """Under its own name."""
        return {"n_probs": top}

    def likeliest(self, response: Mapping[str, Any]) -> dict[str, float]:
        """Probabilities after sampling, or where it does not know the wish, log-probabilities before."""
        first = response["choices"][0]["logprobs"]["content"][0]
        return {str(token["id"]): _logprob(token) for token in first.get("top_probs") or first["top_logprobs"]}


_DIALECTS: dict[str, type[Dialect]] = {dialect.name: dialect for dialect in (Vllm, Sglang, LlamaCpp)}


def dialect_of(owned_by: str | None) -> Dialect:
    """The dialect of a server by what it says of a model's owner; the plain interface for one that is not known."""
    return _DIALECTS.get((owned_by or "").lower(), Dialect)()


def _counted(response: Mapping[str, Any]) -> int | None:
    found = (response.get("usage") or {}).get("completion_tokens")
    return found if type(found) is int and found >= 0 else None


def _check(response: Mapping[str, Any], shape: Shape) -> None:
    """ValueError unless the response has the shape."""
    wrong = fault(response, shape)
    if wrong:
        raise ValueError(wrong)


def _logprob(token: Mapping[str, Any]) -> float:
    if "prob" in token:
        return math.log(max(float(token["prob"]), math.ulp(0.0)))
    return float(token["logprob"])
