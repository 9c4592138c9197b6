"""From a prompt record to token ids, once: what is stored with the rollouts is used ever after.

The tokens are a function of the policy's folder, the record and one date. What else a chat template can ask for is given it here: the
clock shows that date at midnight, and random choices (Jinja has a few) follow from the prompt's id.
"""

from __future__ import annotations

import contextlib
import datetime
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers.utils import chat_template_utils

from cropi_tools.data.dates import CLOCK, DEFAULT_DATE
from cropi_tools.data.jsonl import Record
from cropi_tools.policy.template_sandbox import TooMuch
from cropi_tools.policy.tokens import Tokens
from cropi_tools.runtime.errors import InputError, first_line

_CHARACTERS_A_TOKEN = 64  # tokens of longer words and runs of spaces are few
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 1 << 20, 1 << 24  # tokenizers take hundreds of bytes for each
_EXACT = 256  # prompts whose tokens are counted, before the lengths of the others are estimated
_SLACK = 256  # tokens that a template may add beyond what it added to those


def encoded_prompt(tokens: Tokens, record: Record) -> list[int]:
    """Token ids of a prompt for a policy. InputError as `prompt_token_ids` and `check_size`, and a token without an embedding."""
    check_size(tokens, record["id"], len(prompt_text(record)))
    ids = prompt_token_ids(tokens.tokenizer, record, tokens.date, tokens.folder)
    check_vocabulary(tokens, record["id"], ids)
    return ids


def prompt_token_ids(tokenizer: Any, record: Record, date: str = DEFAULT_DATE, folder: str | None = None) -> list[int]:
    """Token ids of a prompt as the policy's own use has them.

    With a chat template, text becomes one user message, the record's `chat_template_kwargs` go to the template, and its generation
    prompt is added; a last message of the assistant's is the beginning of the response instead, and is left open. The template
    writes the special tokens itself, so none are added. Without a template, text is tokenized as it is, with the special
    tokens the tokenizer adds; a text that begins with the token of beginning gets no second one.

    date: what a template is told that asks for it. folder: what messages call the policy. InputError: the template fails on the
    messages, messages or `chat_template_kwargs` without a template, or no token at all.
    """
    prompt, kwargs = record["prompt"], record.get("chat_template_kwargs") or {}
    if tokenizer.chat_template:
        ids = _rendered(tokenizer, record, _clock(date), folder)
    elif not isinstance(prompt, str):
        raise InputError(
            f"prompt '{record['id']}' is a list of messages, but the policy's tokenizer has no chat template; give it as text"
        )
    elif kwargs:
        raise InputError(
            f"prompt '{record['id']}' has chat_template_kwargs, but the policy's tokenizer has no chat template; remove them"
        )
    else:
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id and prompt.startswith(tokenizer.bos_token):
            ids = ids[1:]
    if not ids:
        raise InputError(f"prompt '{record['id']}' has no tokens")
    return [int(token) for token in ids]


def depends_on_date(tokenizer: Any, record: Record) -> bool:
    """Whether the chat template asks for the date when it renders this prompt."""
    if CLOCK not in str(tokenizer.chat_template):
        return False
    asked: list[str] = []

    def clock(form: str) -> str:
        asked.append(form)
        return _clock(DEFAULT_DATE)(form)

    _rendered(tokenizer, record, clock, None)
    return bool(asked)


def check_vocabulary(tokens: Tokens, identity: str, ids: Sequence[int]) -> None:
    """InputError when a prompt, or a response to it, holds a token that the policy has no embedding for."""
    if tokens.vocabulary is not None and max(ids, default=0) >= tokens.vocabulary:
        name = tokens.tokenizer.convert_ids_to_tokens(max(ids))
        raise InputError(
            f"prompt '{identity}' holds token {max(ids)} ({name}), but {tokens.folder} has embeddings for {tokens.vocabulary} tokens only; "
            "its tokenizer is larger than the model: take the model's own, or enlarge the embedding"
        )


def prompt_text(record: Record) -> str:
    """All that a prompt's tokens are made of, as one text: what it says, and what its messages and template arguments are called."""
    return f"{record['prompt']}{record.get('chat_template_kwargs') or ''}"


def check_size(tokens: Tokens, identity: str, characters: int) -> None:
    """InputError when a prompt, or a response to it, is so long that no policy of these positions can take it: told before its tokens are made,
    which would take hundreds of times the memory."""
    fitting = _MOST_CHARACTERS if tokens.positions is None else tokens.positions * _CHARACTERS_A_TOKEN
    limit = min(max(fitting, _FEWEST_CHARACTERS), _MOST_CHARACTERS)
    if characters > limit:
        raise InputError(
            f"prompt '{identity}': a text of {characters:,} characters is too long for {tokens.folder} (at most {limit:,} are made into "
            "tokens); shorten it, or leave the prompt out"
        )


def check_room(tokens: Tokens, identity: str, length: int, max_tokens: int) -> None:
    """InputError when a prompt of `length` tokens with its response would be longer than the policy's positions reach."""
    limit = tokens.positions
    if limit is None or length + max_tokens <= limit:
        return
    remedy = f"lower --max-tokens to {limit - length}, or leave" if limit > length else "leave"
    raise InputError(
        f"prompt '{identity}': its {length} tokens and --max-tokens {max_tokens} are more than the {limit} positions of "
        f"{tokens.folder}; {remedy} the prompt out"
    )


class PromptCheck:
    """Checks prompts before the first sample: do they hold only tokens that the policy has, is there room for the response?

    A million prompts are not all rendered for that, which would take minutes: once _EXACT were, one whose bytes show that it fits is taken at
    its word (no tokenizer makes more tokens than bytes), unless it may hold a token beyond the vocabulary. Whatever is passed over here is
    checked when the prompt is sampled.
    """

    def __init__(self, tokens: Tokens, max_tokens: int) -> None:
        self._tokens, self._max_tokens = tokens, max_tokens
        limit, tokenizer = tokens.vocabulary, tokens.tokenizer
        self._all = limit is not None and tokenizer.vocab_size > limit
        # the library adds tokens to some families' tokenizers that no text holds
        added = {} if limit is None else tokenizer.added_tokens_decoder
        self._beyond = [str(token) for token_id, token in added.items() if limit is not None and token_id >= limit]
        self._seen = self._added = 0

    def __call__(self, record: Record, ids: Sequence[int] | None = None) -> None:
        """ids: where they are known. InputError: the policy cannot take the prompt."""
        tokens = self._tokens
        if ids is None:
            text = prompt_text(record)
            size = len(text.encode())
            if self._seen >= _EXACT and self._surely_fits(size) and not self._may_be_beyond(text):
                return
            ids = encoded_prompt(tokens, record)
            self._seen, self._added = self._seen + 1, max(self._added, len(ids) - size)
        else:
            check_vocabulary(tokens, record["id"], ids)
        check_room(tokens, record["id"], len(ids), self._max_tokens)

    def _may_be_beyond(self, text: str) -> bool:
        return self._all or any(name in text for name in self._beyond)

    def _surely_fits(self, size: int) -> bool:
        limit = self._tokens.positions
        return limit is None or size + self._added + _SLACK + self._max_tokens <= limit


def _rendered(tokenizer: Any, record: Record, clock: Callable[[str], str], folder: str | None) -> Any:
    prompt, kwargs = record["prompt"], record.get("chat_template_kwargs") or {}
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    goes_on = messages[-1]["role"] == "assistant"
    template = str(tokenizer.chat_template)
    whose = folder or tokenizer.name_or_path or "the policy"
    # a template is a program, which may fail in any way
    try:
        with contextlib.ExitStack() as held:
            if CLOCK in template:
                held.enter_context(_stopped(clock))
            if "random" in template or "lipsum" in template:
                held.enter_context(_seeded(record["id"]))
            return tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                tokenize=True,
                return_dict=False,
                **kwargs,
            )
    except TooMuch as error:
        raise InputError(
            f"prompt '{record['id']}': the chat template of {whose} {error}; change the template, or leave the prompt out"
        ) from None
    except Exception as error:
        kind = "" if type(error).__name__ in ("TemplateError", "ValueError") else f"{type(error).__name__}: "
        raise InputError(
            f"prompt '{record['id']}': the policy's chat template refuses its messages ({kind}{first_line(error)}); change the prompt, or the "
            f"template of {whose}"
        ) from None


def _clock(date: str) -> Callable[[str], str]:
    """What a template gets in place of the clock: midnight of the date, in UTC, whatever the machine's time zone."""
    midnight = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time(), datetime.UTC)

    def strftime_now(form: str) -> str:
        # %s, seconds since 1970, is not Python's but the C library's, which takes the machine's time zone
        fixed = re.sub(r"%(.)", lambda found: str(int(midnight.timestamp())) if found[1] == "s" else found[0], form)
        return midnight.strftime(fixed)

    return strftime_now


@contextlib.contextmanager
def _stopped(clock: Callable[[str], str]) -> Iterator[None]:
    """Give the library's `strftime_now` this clock. A function among a template's arguments would be simpler, but the library makes text of
    it, as of anything there, to keep control tokens out.
    """
    library: Any = chat_template_utils
    before = library.datetime
    library.datetime = _Clock(clock)
    try:
        yield
    finally:
        library.datetime = before


class _Clock:
    """What the library reads the date of, with a date that stays."""

    def __init__(self, strftime: Callable[[str], str]) -> None:
        self.strftime = strftime

    def now(self) -> _Clock:
        """The same at any time."""
        return self


@contextlib.contextmanager
def _seeded(identity: str) -> Iterator[None]:
    """Random choices that follow from the prompt alone; the state before is put back."""
    before = random.getstate()
    random.seed(f"chat template {identity}")
    try:
        yield
    finally:
        random.setstate(before)
