"""From a prompt record to token ids, once: what is stored with the rollouts is used ever after."""

from __future__ import annotations

from typing import Any

from cropi_tools.data.errors import InputError
from cropi_tools.data.jsonl import Record


def prompt_token_ids(tokenizer: Any, record: Record) -> list[int]:
    """Token ids of a prompt as the policy's own use has them.

    With a chat template, text becomes one user message and the template's generation prompt is added; without one, text is
    tokenised as it is (special tokens as the tokenizer adds them). InputError: messages without a chat template, or no token at all.
    """
    prompt = record["prompt"]
    if tokenizer.chat_template:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        raise InputError(
            f"prompt '{record['id']}' is a list of messages, but the policy's tokenizer has no chat template"
        )
    if not ids:
        raise InputError(f"prompt '{record['id']}' has no tokens")
    return [int(token) for token in ids]
