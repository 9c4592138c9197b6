"""From a prompt record to token ids, once: what is stored with the rollouts is used ever after."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from cropi_tools.data.errors import InputError
from cropi_tools.data.jsonl import Record


def prompt_token_ids(tokenizer: Any, record: Record) -> list[int]:
    """Token ids of a prompt as the policy's own use has them.

    With a chat template, text becomes one user message, the record's `chat_template_kwargs` go to the template, and its generation
    prompt is added; a last message of the assistant's is the beginning of the response instead, and is left open. The template
    writes the special tokens itself, so none are added. Without a template, text is tokenised as it is, with the special
    tokens the tokenizer adds; a text that begins with the token of beginning gets no second one.

    InputError: the template refuses the messages, messages or `chat_template_kwargs` without a template, or no token at all.
    """
    prompt, kwargs = record["prompt"], record.get("chat_template_kwargs") or {}
    if tokenizer.chat_template:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        ids = _rendered(tokenizer, messages, kwargs, record)
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


def _rendered(tokenizer: Any, messages: list[Record], kwargs: Record, record: Record) -> Any:
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=True,
            return_dict=False,
            **kwargs,
        )
    except (TemplateError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"prompt '{record['id']}': the policy's chat template refuses its messages ({reason}); change the prompt or the template"
        ) from None
