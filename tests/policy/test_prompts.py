"""Prompts as token ids."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_policy
from tokenizers import processors

from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.runtime.errors import InputError

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


# templates of the usual families, cut down to what matters, in the tiny policy's characters
QWEN = (
    "{% for m in messages %}<|pad|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant "
    "{% if enable_thinking is defined and enable_thinking is false %}<|pad|><|pad|>{% endif %}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|pad|>{{ m.role }} {{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant {% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"  # without a generation prompt of its own
CHOOSY = "{% for m in messages %}{{ m.content if m.role != 'assistant' else '' }}{% endfor %}"


def templated(template: str | None, bos: str | None = None) -> Any:
    """The tiny tokenizer with a template; with `bos`, one that puts that token first by itself, as Llama's does."""
    tokenizer = tiny_policy.tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.bos_token = bos
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    return tokenizer


def asked(tokenizer: Any, prompt: Any, **fields: Any) -> list[int]:
    return prompt_token_ids(tokenizer, {"id": "p", "prompt": prompt, **fields})


USER, SYSTEM = {"role": "user", "content": "1+2="}, {"role": "system", "content": "add"}


def test_thinking_is_switched_by_the_record() -> None:
    qwen = templated(QWEN)
    assert asked(qwen, "1+2=") == ids("<|pad|>user 1+2=<|end|><|pad|>assistant ")
    off = asked(qwen, "1+2=", chat_template_kwargs={"enable_thinking": False})
    assert off == ids("<|pad|>user 1+2=<|end|><|pad|>assistant <|pad|><|pad|>")
    assert asked(qwen, "1+2=", chat_template_kwargs={"enable_thinking": True}) == asked(qwen, "1+2=")
    assert asked(qwen, "1+2=", chat_template_kwargs={}) == asked(qwen, "1+2=")


def test_the_token_of_beginning_comes_once() -> None:
    once = ids("<|pad|>")
    plain, chat = templated(None, bos="<|pad|>"), templated(LLAMA, bos="<|pad|>")
    assert asked(plain, "1+2=") == once + ids("1+2=")
    assert asked(plain, "<|pad|>1+2=") == once + ids("1+2="), "a text that was rendered before"
    assert asked(chat, "1+2=") == once + ids("<|pad|>user 1+2=<|end|><|pad|>assistant ")
    assert asked(templated(QWEN, bos="<|pad|>"), "1+2=")[:2] == ids("<|pad|>u"), (
        "the template has none, so none is added"
    )


def test_the_same_tokens_as_a_rendered_text_tokenized_without_additions() -> None:
    for tokenizer in (templated(QWEN), templated(LLAMA, bos="<|pad|>"), templated(BARE, bos="<|end|>")):
        text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        assert asked(tokenizer, [USER]) == tokenizer(text, add_special_tokens=False)["input_ids"] == ids(text)


def test_a_template_without_a_generation_prompt() -> None:
    assert asked(templated(BARE), "1+2=") == ids("1+2=<|end|>")


def test_the_beginning_of_a_response_is_left_open() -> None:
    prompt = [SYSTEM, USER, {"role": "assistant", "content": "So"}]
    expected = ids("<|pad|>system add<|end|><|pad|>user 1+2=<|end|><|pad|>assistant So")
    assert asked(templated(QWEN), prompt) == expected
    with pytest.raises(InputError, match="prompt 'p': the policy's chat template refuses its messages"):
        asked(templated(CHOOSY), prompt)


def test_what_a_template_refuses_is_said_in_one_line() -> None:
    llama = templated(LLAMA, bos="<|pad|>")
    for prompt, said in (([SYSTEM, USER], "no system role"), ([USER, USER], "roles must alternate")):
        with pytest.raises(InputError, match=f"prompt 'p': .*refuses its messages .{said}.; change") as raised:
            asked(llama, prompt)
        assert "\n" not in str(raised.value)


def test_arguments_need_a_template() -> None:
    with pytest.raises(InputError, match=r"'p' has chat_template_kwargs, but .* no chat template; remove them"):
        asked(templated(None), "1+2=", chat_template_kwargs={"enable_thinking": False})
