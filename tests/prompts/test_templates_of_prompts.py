"""The final form of a prompt: template, system message, what goes to the chat template, and solutions that came with it."""

from __future__ import annotations

from typing import Any

import pytest

from cropi_tools.prompts.templates import PromptTemplate, parse_kwargs, question_text
from cropi_tools.runtime.errors import InputError, UsageError

USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
SOLVED = {"role": "assistant", "content": "It is 2."}


def dressed(prompt: Any, prompt_template: PromptTemplate, **columns: Any) -> dict[str, Any]:
    record = {"id": "a", "prompt": prompt, "answer": "2", "source": "s"}
    return prompt_template.of_row(record, {"prompt": prompt, "answer": "long", **columns}, "p.jsonl:1")


def test_nothing_asked_changes_nothing() -> None:
    for prompt in ("1+1?", [USER]):
        assert dressed(prompt, PromptTemplate()) == {"id": "a", "prompt": prompt, "answer": "2", "source": "s"}


def test_a_template_shapes_the_question_with_the_rows_columns() -> None:
    shaping = PromptTemplate(template="{unit}: {prompt} In \\boxed{}.", answer_template="<{answer}>")
    found = dressed("1+1?", shaping, unit="apples")
    assert (found["prompt"], found["answer"]) == ("apples: 1+1? In \\boxed{}.", "<2>")
    found = dressed([SYSTEM, USER], shaping, unit="apples")
    assert found["prompt"] == [SYSTEM, {"role": "user", "content": "apples: 1+1? In \\boxed{}."}]
    with pytest.raises(UsageError, match="no field 'unit'; there are answer, prompt"):
        dressed("1+1?", shaping)
    with pytest.raises(InputError, match=r"p.jsonl:1: no user message"):
        dressed([SYSTEM], PromptTemplate(template="{prompt}"))


def test_a_system_message_comes_first() -> None:
    shaping = PromptTemplate(system="Be brief.", template="Q: {prompt}")
    assert dressed("1+1?", shaping)["prompt"] == [SYSTEM, {"role": "user", "content": "Q: 1+1?"}]
    assert dressed([USER], PromptTemplate(system="Be brief."))["prompt"] == [SYSTEM, USER]
    with pytest.raises(InputError, match=r"p.jsonl:1: the prompt has a system message of its own"):
        dressed([SYSTEM, USER], shaping)


def test_arguments_of_the_chat_template_go_into_the_record() -> None:
    shaping = PromptTemplate(chat_template_kwargs={"enable_thinking": False})
    record = {"id": "a", "prompt": "1?", "answer": "1", "source": "s", "chat_template_kwargs": {"style": "x"}}
    found = shaping.of_prompt(record, "")["chat_template_kwargs"]
    assert found == {"style": "x", "enable_thinking": False}
    assert record["chat_template_kwargs"] == {"style": "x"}


def test_a_solution_at_the_end_is_not_asked_silently() -> None:
    prompt = [USER, SOLVED]
    with pytest.raises(InputError, match=r"p.jsonl:1: the last message is the assistant's; --last-assistant drop"):
        dressed(prompt, PromptTemplate())
    assert dressed(prompt, PromptTemplate(last_assistant="drop"))["prompt"] == [USER]
    assert dressed(prompt, PromptTemplate(last_assistant="continue"))["prompt"] == prompt
    shaped = dressed(prompt, PromptTemplate(last_assistant="continue", template="Q: {prompt}"))["prompt"]
    assert shaped == [{"role": "user", "content": "Q: 1+1?"}, SOLVED]
    with pytest.raises(InputError, match="the only message is the assistant's"):
        dressed([SOLVED], PromptTemplate(last_assistant="drop"))


def test_the_text_of_a_prompt() -> None:
    assert question_text("a") == "a"
    assert question_text([SYSTEM, USER, SOLVED]) == "1+1?"
    assert question_text([SYSTEM]) == "Be brief."


def test_values_are_json_or_text() -> None:
    given = ["enable_thinking=false", "budget=128", "style=short answers", 'tools=["a"]']
    assert parse_kwargs(given) == {"enable_thinking": False, "budget": 128, "style": "short answers", "tools": ["a"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("enable_thinking", "expected KEY=VALUE"),
        ("a b=1", "expected KEY=VALUE"),
        ("tokenize=false", "tokenize is set by the commands themselves"),
        ("enable_thinking=False", "write enable_thinking=false"),
        ("x=NaN", "must be a finite number"),
        ("x=1e999", "must be a finite number"),
    ],
)
def test_a_faulty_argument(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--chat-template-kwargs {text}: .*{said}"):
        parse_kwargs([text])
