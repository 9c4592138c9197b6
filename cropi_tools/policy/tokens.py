"""What sampling and verifying need of a policy beside its weights: its tokenizer, and the tokens that end a response."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from cropi_tools.data.errors import InputError
from cropi_tools.data.policies import check_tokenizer, tokenizer_files
from cropi_tools.policy.opening import CONFIG, GENERATION, TOKENIZER, opening, without_panics


class Tokens(NamedTuple):
    """A policy's tokenizer. end_token_ids: tokens that end a response, as the model's own generation settings say."""

    tokenizer: Any
    end_token_ids: list[int]
    folder: str


def load_tokens(folder: str) -> Tokens:
    """Tokenizer and end tokens of a policy folder; its weights are not opened and need not be there. InputError: they do not open."""
    tokenizer_files(folder)
    check_tokenizer(folder)
    offline: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with opening(folder, *TOKENIZER, CONFIG), without_panics():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **offline)
    with opening(folder, GENERATION, CONFIG):
        if (Path(folder) / GENERATION).exists():
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, **offline))
    return Tokens(tokenizer, end_tokens(settings, tokenizer, folder), folder)


def end_tokens(generation_config: Any, tokenizer: Any, folder: str) -> list[int]:
    """The tokens that end a response: those of the generation settings, else the tokenizer's end token."""
    ends = getattr(generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise InputError(f"{folder}: neither generation_config.json nor the tokenizer names an end token")
    return [ends] if isinstance(ends, int) else list(ends)
