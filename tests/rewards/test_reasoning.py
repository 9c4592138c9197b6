"""Reasoning apart from the answer."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi_tools.rewards.reasoning import MARKERS, final_answer, reasoning_is_open


@pytest.mark.parametrize(("opener", "closer"), MARKERS.items())
def test_every_family(opener: str, closer: str) -> None:
    assert final_answer(f"{opener}\nperhaps 4\n{closer}\n\nIt is 5.") == "It is 5."
    assert final_answer(f"perhaps 4\n{closer}\n\nIt is 5.", reasoning_open=True) == "It is 5."
    assert final_answer(f"perhaps 4\n{closer}\n\nIt is 5.") == "It is 5."
    assert final_answer(f"{opener}\nperhaps 4, or") == ""
    assert final_answer("perhaps 4, or", reasoning_open=True) == ""
    assert reasoning_is_open(f"<|im_start|>assistant\n{opener}\n")
    assert not reasoning_is_open(f"<|im_start|>assistant\n{opener}\n\n{closer}\n\n")
    assert not reasoning_is_open(f"Put your thoughts between {opener} and {closer} tags.\nassistant\n")


@pytest.mark.parametrize(
    ("text", "reasoning_open", "answer"),
    [
        ("It is 5.", False, "It is 5."),
        ("", False, ""),
        ("", True, ""),
        ("<think></think>5", False, "5"),
        ("<think>a</think>4<think>b</think>5", False, "5"),
        ("<think>a</think>4<think>b", False, ""),
        ("<think>a <think> b</think>5", False, "5"),
        ("<think>use <reasoning> tags</think>5", False, "5"),
        ("<think>use </reasoning> tags", False, ""),
        ("<think>use </reasoning> tags</think>5", False, "5"),
        ("a </reasoning> b </think> 5", True, "5"),
        ("a <think> b </think> 5", True, "5"),
        ("a<think>b", True, ""),
        ("<think>a</think>", False, ""),
        ("x < think > y", False, "x < think > y"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>5", False, "5"),
    ],
)
def test_where_the_answer_starts(text: str, reasoning_open: bool, answer: str) -> None:
    assert final_answer(text, reasoning_open) == answer


@given(
    st.lists(st.sampled_from([*MARKERS, *MARKERS.values(), "<", "|", "think", ">", " "]) | st.text(max_size=3)).map(
        "".join
    )
)
def test_an_answer_is_an_end_of_the_text_and_closing_markers_let_it_start(text: str) -> None:
    for reasoning_open in (False, True):
        answer = final_answer(text, reasoning_open)
        assert text.endswith(answer)
        assert final_answer(f"{text}{''.join(MARKERS.values())}5", reasoning_open) == "5"


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<", "<|channel|>", "\ud800", "<thin"])
def test_a_million_markers_take_no_time(piece: str) -> None:
    started = time.perf_counter()
    final_answer(piece * (10**6 // len(piece)))
    reasoning_is_open(piece * (10**6 // len(piece)))
    assert time.perf_counter() - started < 2.0
