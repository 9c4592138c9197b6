"""What sampling and verifying need of a policy beside its weights: its tokenizer, and the tokens that end a response."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from cropi_tools.data.errors import InputError
from cropi_tools.data.policies import tokenizer_files


class Tokens(NamedTuple):
    """A policy's tokenizer. end_token_ids: tokens that end a response, as the model's own generation settings say."""

    tokenizer: Any
    end_token_ids: list[int]
    folder: str


def load_tokens(folder: str) -> Tokens:
    """Tokenizer and end tokens of a policy folder; its weights are not opened and need not be there. InputError: they do not open."""
    tokenizer_files(folder)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        try:
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:
            settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its tokenizer does not open ({first_line(error)})") from None
    return Tokens(tokenizer, end_tokens(settings, tokenizer, folder), folder)


def end_tokens(generation_config: Any, tokenizer: Any, folder: str) -> list[int]:
    """The tokens that end a response: those of the generation settings, else the tokenizer's end token."""
    ends = getattr(generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise InputError(f"{folder}: neither generation_config.json nor the tokenizer names an end token")
    return [ends] if isinstance(ends, int) else list(ends)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, for ours."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
