"""What a thinking model says aloud, apart from its answer.

A thinking model writes its reasoning between two markers and its answer after them. Only the answer is verified: a box in
the middle of a chain of thought is a try, and reasoning that was cut short answers nothing. A template may end the prompt
with the opening marker, so that the response begins inside the reasoning and holds the closing marker alone.

The markers must still be in the text: a decoder that skips special tokens removes those that are special tokens of the
tokenizer (Magistral's, Command A's, Gemma's).
"""

from __future__ import annotations

import re

MARKERS = {
    "<think>": "</think>",  # DeepSeek-R1 and -V3, Qwen3, QwQ, GLM, Phi-4-reasoning, SmolLM3, Olmo 3, Nemotron, MiMo, Kimi K2
    "[THINK]": "[/THINK]",  # Magistral and later Mistral models
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "<mm:think>": "</mm:think>",  # MiniMax-M3
    "<thought>": "</thought>",  # EXAONE Deep
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A Reasoning
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",  # gpt-oss
    "\u25c1think\u25b7": "\u25c1/think\u25b7",  # Kimi-VL-Thinking
    "<|begin_of_thought|>": "<|end_of_thought|>",  # OpenThinker, Sky-T1
    "<thinking>": "</thinking>",  # a habit of prompts, as is the next
    "<reasoning>": "</reasoning>",
}
"""The marker that opens a model's reasoning, and the one that closes it."""

_CLOSERS = frozenset(MARKERS.values())
_MARKER = re.compile("|".join(re.escape(marker) for pair in MARKERS.items() for marker in pair))


def final_answer(text: str, reasoning_open: bool = False) -> str:
    """The part of a response that answers: what follows the reasoning, or all of it where there is none.

    reasoning_open: the prompt ended inside the reasoning (`reasoning_is_open`). What is opened by one marker is closed by
    its counterpart alone, so that tags which are talked about in the reasoning do not end it; a closing marker of which
    no opening one is known counts as well. "" if reasoning is open at the end. Takes time linear in the text.
    """
    start: int | None = None if reasoning_open else 0  # where the answer starts; None inside reasoning
    awaited: str | None = None  # the marker that closes it; None: any
    for match in _MARKER.finditer(text):
        marker = match.group()
        if marker in _CLOSERS:
            if awaited is None or marker == awaited:
                start, awaited = match.end(), None
        elif awaited is None and start is not None:
            start, awaited = None, MARKERS[marker]
    return "" if start is None else text[start:].lstrip()


def reasoning_is_open(prompt_end: str) -> bool:
    r"""Whether a prompt ends inside the model's reasoning, as after `<think>\n` at the end of a chat template.

    prompt_end: the prompt as text, or its last characters, special tokens included.
    """
    return prompt_end.rstrip().endswith(tuple(MARKERS))
