"""The final form of a prompt: a template around the question, a system message and worked examples before it, keyword arguments for
the policy's chat template. Applied once, by cropi-prompts, so that rollouts, training and evaluation cannot disagree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cropi_tools.data.jsonl import Record
from cropi_tools.data.nonfinite import place_of, refused
from cropi_tools.data.questions import EXAMPLES, examples_in
from cropi_tools.data.records import RESERVED_KWARGS
from cropi_tools.prompts.families import shape, template_fields
from cropi_tools.prompts.row_formats import as_messages
from cropi_tools.prompts.worked_examples import with_examples
from cropi_tools.runtime.errors import InputError, UsageError

LastAssistant = Literal["refuse", "drop", "continue"]


@dataclass(frozen=True)
class PromptTemplate:
    """What `cropi-prompts` does to every prompt. last_assistant: what becomes of a last message of the assistant's: `continue`
    keeps it as the beginning of the response, `drop` takes it away, as the solution it usually is. examples: messages before every
    question, after the system message."""

    system: str | None = None
    template: str | None = None
    answer_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    last_assistant: LastAssistant = "refuse"
    examples: Sequence[Record] = ()

    def of_row(self, record: Record, row: Record, where: str) -> Record:
        """A prompt from a data file; templates know the row's columns, `{prompt}` and `{answer}`."""
        prompt = record["prompt"]
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant" and self.last_assistant != "continue":
            prompt = self._without_last(prompt, where)
        fields = {**row, "prompt": question_text(prompt), "answer": record["answer"]}
        for template in filter(None, (self.template, self.answer_template)):
            for name in template_fields(template) & fields.keys():
                found = place_of(fields[name], name)
                if found is not None:
                    raise refused(where, record["id"], *found)
        if self.template is not None:
            prompt = _with_question(prompt, _shaped(self.template, fields, where), where)
        answer = record["answer"] if self.answer_template is None else _shaped(self.answer_template, fields, where)
        return self.of_prompt({**record, "prompt": prompt, "answer": answer}, where)

    def of_prompt(self, record: Record, where: str) -> Record:
        """A prompt whose text is final: the system message, the worked examples and the keyword arguments."""
        if self.system is not None:
            messages = as_messages(record["prompt"])
            if messages[0]["role"] in ("system", "developer"):
                raise InputError(
                    f"{where}: the prompt has a system message of its own; leave --system out, or remove it"
                )
            record = {**record, "prompt": [{"role": "system", "content": self.system}, *messages]}
        if self.examples:
            messages = with_examples(as_messages(record["prompt"]), self.examples)
            extra = {**(record.get("extra") or {}), EXAMPLES: examples_in(record) + len(self.examples)}
            record = {**record, "prompt": messages, "extra": extra}
        if self.chat_template_kwargs:
            own = {**record.get("chat_template_kwargs", {}), **self.chat_template_kwargs}
            record = {**record, "chat_template_kwargs": own}
        return record

    def _without_last(self, messages: list[Record], where: str) -> list[Record]:
        if self.last_assistant == "refuse":
            raise InputError(
                f"{where}: the last message is the assistant's; --last-assistant drop takes it away as a solution, continue keeps it as "
                "the beginning of the response"
            )
        if len(messages) == 1:
            raise InputError(f"{where}: the only message is the assistant's; a prompt needs a question")
        return messages[:-1]


def question_text(prompt: str | list[Record]) -> str:
    """The text of a prompt; of messages, that of the last user message, or of the last at all."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), prompt[-1]["content"])


def _shaped(template: str, fields: Mapping[str, Any], where: str) -> str:
    try:
        return shape(template, fields)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _with_question(prompt: str | list[Record], text: str, where: str) -> str | list[Record]:
    if isinstance(prompt, str):
        return text
    place = next((i for i in reversed(range(len(prompt))) if prompt[i]["role"] == "user"), None)
    if place is None:
        raise InputError(f"{where}: no user message for --template to shape")
    return [*prompt[:place], {**prompt[place], "content": text}, *prompt[place + 1 :]]


def parse_kwargs(texts: Iterable[str]) -> dict[str, Any]:
    """`enable_thinking=false` and the like as a dictionary; values are JSON, or else text. UsageError: no `=`, or a name that
    the commands set themselves."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(f"--chat-template-kwargs {text}: expected KEY=VALUE, such as enable_thinking=false")
        if name in RESERVED_KWARGS:
            raise UsageError(f"--chat-template-kwargs {text}: {name} is set by the commands themselves")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
        if value in ("True", "False", "None"):
            raise UsageError(f"--chat-template-kwargs {text}: values are JSON; write {name}={_JSON_WORDS[value]}")
        if isinstance(found[name], float) and not math.isfinite(found[name]):
            raise UsageError(f"--chat-template-kwargs {text}: must be a finite number")
    return found


_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}
