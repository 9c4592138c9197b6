"""Questions kept apart and counted: repetitions, excluded and watched files, answers that differ."""

from __future__ import annotations

from typing import Any

from cropi_tools.data.questions import bare_question, normalize_question
from cropi_tools.prompts.duplicates import Exclusion


def ask(prompt: Any, answer: str = "1") -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer}


def test_the_normalized_question() -> None:
    assert normalize_question("  What\n is \uff12? ") == normalize_question("what IS 2?") == "what is 2?"
    messages = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "Go"}]
    assert normalize_question(messages) == "be brief. go"
    assert bare_question(messages) == bare_question("GO") == "go"


def test_repetitions_are_counted_apart() -> None:
    exclusion = Exclusion()
    kept = [text for text in ("a", "B", "b ", "B", "c", "a", "a") if exclusion.admits(ask(text))]
    assert kept == ["a", "B", "c"]
    assert (exclusion.kept, exclusion.exact, exclusion.normalized, exclusion.met) == (3, 3, 1, 7)
    assert exclusion.skipped() == {"excluded": 0, "exact repetitions": 3, "normalised repetitions": 1}


def test_messages_repeat_to_the_letter_or_by_their_question() -> None:
    exclusion = Exclusion()
    for content in ("Go", "Go", "go"):
        exclusion.admits(ask([{"role": "user", "content": content}]))
    assert (exclusion.kept, exclusion.exact, exclusion.normalized) == (1, 1, 1)


def test_the_same_question_with_another_answer_is_told() -> None:
    exclusion = Exclusion()
    for answer in ("1", " 1", "2", "3"):
        exclusion.admits(ask("a?", answer))
    assert (exclusion.kept, exclusion.exact, exclusion.conflicting) == (1, 3, 2)
    assert list(exclusion.warnings()) == ["repetitions dropped whose answer is not that of the one kept: 2"]


def test_excluded_files_are_counted_file_by_file() -> None:
    exclusion = Exclusion()
    exclusion.forbid("valid", ["a", "b"])
    exclusion.forbid("test", ["B", "c", "never"])
    exclusion.watch("other", ["d", "a"])
    exclusion.watch("apart", ["z"])
    kept = [text for text in ("A", "b", "c", "d", "e", "d") if exclusion.admits(ask(text))]
    assert kept == ["d", "e"]
    assert exclusion.facts() == {
        "excluded": {"valid": 2, "test": 1},
        "overlap": {"other": 1, "apart": 0},
        "conflicting_answers": 0,
    }
    assert exclusion.in_words() == (
        "3 excluded: 2 in valid, 1 in test; 1 exact and 0 normalized repetitions dropped; none in apart"
    )
    assert list(exclusion.warnings()) == ["1 of the 2 questions stand in other too; --exclude other leaves them out"]


def test_a_system_message_or_a_template_does_not_hide_a_question() -> None:
    exclusion = Exclusion()
    exclusion.forbid("test", ["a?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b?"}]])
    assert not exclusion.admits(ask([{"role": "system", "content": "x"}, {"role": "user", "content": "A?"}]))
    assert not exclusion.admits(ask("b?"))
    assert not exclusion.admits(ask("Q: a? A:"), "a?")
    assert exclusion.admits(ask("Q: c? A:"), "c?")


def test_a_system_message_makes_another_prompt_within_a_set() -> None:
    exclusion = Exclusion()
    for system in ("To French.", "To German."):
        assert exclusion.admits(ask([{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]))
