"""What sampling and verifying need of a policy beside its weights: its tokenizer, the tokens that end a response, what it has room for.

A response ends at any token that the model's generation settings name, at the tokenizer's own end token, and at the token by which the chat
template ends a turn of the assistant's. Published folders often name only one of them (a base model's settings beside a chat template),
and a response that runs on past its end invents the user's next turn, from which a verifier would then read the answer.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from cropi_tools import runtime
from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.data.policies import check_tokenizer, tokenizer_files
from cropi_tools.policy.loading_errors import CONFIG, GENERATION, TOKENIZER, opening, without_panics
from cropi_tools.policy.positions import positions
from cropi_tools.policy.template_sandbox import TooMuch
from cropi_tools.runtime.errors import InputError

# a conversation to see how a template ends the second turn
_ASKED, _ANSWERED = "How many are there?", "There are seven."


class Tokens(NamedTuple):
    """A policy's tokenizer, and what its token sequences must keep to.

    end_token_ids: every token that ends a response. usual_end: the one that a finished response most likely has. vocabulary: token ids
    lie below it; positions: the most tokens of a sequence; None: not known, or without a limit. date: what chat templates are told.
    unlisted: end tokens that the generation settings do not name, in words.
    """

    tokenizer: Any
    end_token_ids: list[int]
    folder: str
    usual_end: int | None = None
    vocabulary: int | None = None
    positions: int | None = None
    date: str = DEFAULT_DATE
    unlisted: tuple[str, ...] = ()

    def tell_ends(self) -> None:
        """Say once at which tokens responses end that the generation settings do not name."""
        if self.unlisted:
            _notify_once(
                f"{self.folder}: responses also end at {' and at '.join(self.unlisted)}; its generation settings do not name "
                f"{'it' if len(self.unlisted) == 1 else 'them'}"
            )


def load_tokens(folder: str, date: str = DEFAULT_DATE) -> Tokens:
    """Tokenizer and end tokens of a policy folder; its weights are not opened and need not be there.

    InputError: they do not open, no end token is named, or a special token's id is none of the vocabulary's.
    """
    tokenizer_files(folder)
    check_tokenizer(folder)
    # the files themselves, since the library fails on what is wrong there, in many ways and without naming it
    said = GENERATION if (Path(folder) / GENERATION).exists() else CONFIG
    settings = _settings(folder, said)
    offline: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with opening(folder, CONFIG):
        config: Any = AutoConfig.from_pretrained(folder, **offline)
    with opening(folder, *TOKENIZER, CONFIG), without_panics():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **offline)
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    _check_pad(getattr(text, "pad_token_id", None), f"{Path(folder) / CONFIG}: pad_token_id", vocabulary)
    _check_pad(settings.get("pad_token_id"), f"{Path(folder) / said}: pad_token_id", vocabulary)
    own = _own_token(tokenizer, "eos_token", vocabulary, folder)
    _own_token(tokenizer, "pad_token", vocabulary, folder)
    if said == CONFIG:
        settings = {**settings, "eos_token_id": text.eos_token_id}  # a family may have one that its file leaves out
    named = named_ends(settings.get("eos_token_id"), f"{Path(folder) / said}: eos_token_id", vocabulary)
    turn = turn_end(tokenizer)
    if turn is not None and vocabulary is not None and turn >= vocabulary:
        turn = None  # the policy cannot write it
    others = {turn: "the chat template's end of a turn", own: "the tokenizer's end token"}
    unlisted = [token for token in (own, turn) if token is not None and token not in named]
    unlisted = list(dict.fromkeys(unlisted))
    if not named and not unlisted:
        raise InputError(f"{folder}: neither generation_config.json nor the tokenizer names an end token")
    ends = [*named, *unlisted]
    usual = turn if turn is not None else own if own in named else ends[0]
    words = [f"{tokenizer.convert_ids_to_tokens(token)} ({token}, {others[token]})" for token in unlisted if named]
    return Tokens(tokenizer, ends, folder, usual, vocabulary, positions(config), date, tuple(words))


def _settings(folder: str, name: str) -> dict[str, Any]:
    """A settings file whose special tokens are token ids."""
    path = Path(folder) / name
    with opening(folder, name):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found.items()  # an object
    named_ends(found.get("eos_token_id"), f"{path}: eos_token_id", None)
    _check_pad(found.get("pad_token_id"), f"{path}: pad_token_id", None)
    return found


def named_ends(value: Any, where: str, vocabulary: int | None) -> list[int]:
    """The end tokens of `eos_token_id`, each once; none where it is absent. InputError: it is no token id and no list of them."""
    if value is None:
        return []
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found or any(type(token) is not int or token < 0 for token in found):
        raise InputError(f"{where} must be a token id or a list of token ids, found {value!r}; correct it")
    _check_below(max(found), where, vocabulary)
    return list(dict.fromkeys(found))


def turn_end(tokenizer: Any) -> int | None:
    """The token that the chat template writes after what the assistant says; None where it writes none, or there is no template.

    InputError: the template goes beyond a bound of time, memory or length.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
    # a template may refuse this conversation, for a reason of its own: it is no prompt of the user's
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TooMuch as error:
        raise InputError(f"the chat template of {tokenizer.name_or_path} {error}; change the template") from None
    except Exception:
        return None
    _, answered, rest = text.rpartition(_ANSWERED)
    rest = rest.lstrip()
    if not answered or not rest:
        return None
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    name = max((name for name in added if name and rest.startswith(name)), key=len, default=None)
    return None if name is None else added[name]


def _check_pad(value: Any, where: str, vocabulary: int | None) -> None:
    """InputError unless it is a token id, None, or -1, which stands for none in old folders."""
    if value is None or (type(value) is int and value == -1):
        return
    if type(value) is not int or value < 0:
        raise InputError(f"{where} must be a token id, found {value!r}; correct it")
    _check_below(value, where, vocabulary)


def _own_token(tokenizer: Any, name: str, vocabulary: int | None, folder: str) -> int | None:
    """The id of a special token of the tokenizer's that the model has too.

    One that it has not is none where the library made it up, as it does for some families. InputError: the folder's own files name it.
    """
    token_id: int | None = getattr(tokenizer, f"{name}_id", None)
    if token_id is None or vocabulary is None or token_id < vocabulary:
        return token_id
    for path in (Path(folder) / "tokenizer_config.json", Path(folder) / "special_tokens_map.json"):
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).get(name) is not None:
            _check_below(token_id, f"{path}: {name} {getattr(tokenizer, name)}", vocabulary)
    return None


def _check_below(token_id: int, where: str, vocabulary: int | None) -> None:
    if vocabulary is not None and token_id >= vocabulary:
        raise InputError(
            f"{where} is token {token_id}, but the model has only {vocabulary} (0 to {vocabulary - 1}); correct it, or enlarge the embedding"
        )


@cache
def _notify_once(sentence: str) -> None:
    runtime.notify(sentence)
