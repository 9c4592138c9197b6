"""Prompts as token ids."""

from __future__ import annotations

import pytest
import tiny_policy

from cropi_tools.data.errors import InputError
from cropi_tools.policy.prompts import prompt_token_ids

TEMPLATE = (
    "{% for m in messages %}<|pad|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def ids(text: str) -> list[int]:
    vocabulary = {"<|pad|>": 0, "<|end|>": 1, **{c: i + 2 for i, c in enumerate(tiny_policy.CHARACTERS)}}
    found = []
    while text:
        token = next((special for special in ("<|pad|>", "<|end|>") if text.startswith(special)), text[0])
        found.append(vocabulary[token])
        text = text[len(token) :]
    return found


def test_text_without_a_template_is_taken_as_it_is() -> None:
    assert prompt_token_ids(tiny_policy.tokenizer(), {"id": "p", "prompt": "1+2="}) == ids("1+2=")


def test_text_with_a_template_is_a_user_message() -> None:
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    expected = ids("<|pad|>user 1+2=<|end|>assistant ")
    assert prompt_token_ids(tokenizer, {"id": "p", "prompt": "1+2="}) == expected
    assert prompt_token_ids(tokenizer, {"id": "p", "prompt": [{"role": "user", "content": "1+2="}]}) == expected


def test_messages_keep_their_roles() -> None:
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+2="}]
    assert prompt_token_ids(tokenizer, {"id": "p", "prompt": prompt}) == ids(
        "<|pad|>system add<|end|><|pad|>user 1+2=<|end|>assistant "
    )


def test_refusals_name_the_prompt() -> None:
    with pytest.raises(InputError, match="'p7' is a list of messages"):
        prompt_token_ids(tiny_policy.tokenizer(), {"id": "p7", "prompt": [{"role": "user", "content": "1"}]})
    with pytest.raises(InputError, match="'p8' has no tokens"):
        prompt_token_ids(tiny_policy.tokenizer(), {"id": "p8", "prompt": ""})
