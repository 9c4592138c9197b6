"""Functions of the user's own: verl's signature, TRL's, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cropi_tools.rewards import Grade, VerifierPool, allow_files, check_verifier, grade
from cropi_tools.runtime.errors import InputError


@pytest.fixture
def verifier(tmp_path: Path) -> Any:
    """Write a file with a function `score` of the given body and return the verifier's name."""
    count = 0

    def write(body: str) -> str:
        nonlocal count
        count += 1
        path = tmp_path / f"mine{count}.py"
        path.write_text(f"def score(data_source, solution_str, ground_truth, extra_info):\n    {body}\n")
        return f"{path}:score"

    return write


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return solution_str == ground_truth", Grade(1.0, "correct")),
        ("return 0.25", Grade(0.25, "partial")),
        ("return -1", Grade(-1.0, "wrong")),
        ("return {'score': 1, 'note': 'x'}", Grade(1.0, "correct")),
        ("import numpy; return numpy.float32(0.5)", Grade(0.5, "partial")),
        ("import numpy; return numpy.bool_(True)", Grade(1.0, "correct")),
        ("return extra_info['k'] + (data_source == 's')", Grade(3.0, "correct")),
    ],
)
def test_a_function_of_the_user(verifier: Any, body: str, expected: Grade) -> None:
    record = {"id": "p", "answer": "12", "source": "s", "extra": {"k": 2}}
    assert grade(record, "12", verifier(body)) == expected


@pytest.mark.parametrize(
    "body",
    [
        "return None",
        "return float('nan')",
        "return float('inf')",
        "return 10 ** 400",
        "return 'yes'",
        "return {'acc': 1}",
        "import numpy; return numpy.ones(2)",
        "raise ValueError('odd')",
        "import sys; sys.exit(3)",
    ],
)
def test_a_mistake_in_it_is_named_with_file_function_and_prompt(verifier: Any, body: str) -> None:
    name = verifier(body)
    with pytest.raises(InputError) as caught:
        grade({"id": "p42", "answer": "12"}, "12", name)
    assert name in str(caught.value)
    assert "'p42'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    """Write a whole file that defines `f` and return the verifier's name."""

    def write(text: str) -> str:
        path = tmp_path / f"functions{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        return f"{path}:f"

    return write


RECORD = {"id": "p", "prompt": "1+1?", "answer": "2", "source": "s", "level": 3, "extra": {"hint": "h"}}
TALK = {**RECORD, "prompt": [{"role": "user", "content": "1+1?"}]}


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("def f(completions, answer, **kwargs): return [float(c == a) for c, a in zip(completions, answer)]", RECORD),
        ("def f(completions, solution): return [float(completions == solution)]", RECORD),
        ("def f(prompts, completions, **kwargs): return [prompts == ['1+1?']]", RECORD),
        ("def f(completions, **kwargs): return [kwargs['level'] == [3] and kwargs['hint'] == ['h']]", RECORD),
        ("def f(completions, *, source): return [source == ['s'] and completions == ['2']]", RECORD),
        ("def f(completions, level, trainer_state=None): return [trainer_state is None]", RECORD),
        (
            "def f(completions, prompts, **kwargs): return [completions == [[{'role': 'assistant', 'content': '2'}]]]",
            TALK,
        ),
        ("def f(completions, prompts, **kwargs): return [prompts[0][0]['content'] == '1+1?']", TALK),
        ("async def f(completions, answer, **kwargs): return [c == a for c, a in zip(completions, answer)]", RECORD),
        ("import numpy\ndef f(completions, **kwargs): return numpy.ones(1)", RECORD),
        ("class C:\n    def __call__(self, completions): return [1]\nf = C()", RECORD),
        (
            "async def f(data_source, solution_str, ground_truth, extra_info=None): return solution_str == ground_truth",
            RECORD,
        ),
        ("def f(solution_str, ground_truth): return {'score': solution_str == ground_truth}", RECORD),
        ("def f(**kwargs): return kwargs['solution_str'] == '2' and kwargs['data_source'] == 's'", RECORD),
    ],
)
def test_both_signatures_in_this_process_and_in_a_worker(
    written: Callable[[str], str], text: str, record: dict[str, Any]
) -> None:
    name = written(text)
    assert grade(record, "2", name) == Grade(1.0, "correct")
    allow_files([name.rpartition(":")[0]])
    rollout = {**record, "verifier": name, "prompt_token_ids": [1], "samples": [{"text": "2"}]}
    with VerifierPool("exact", workers=1) as pool:
        assert pool.grade_many([(rollout, "2")]) == [Grade(1.0, "correct")]


def test_functions_of_trl_work_as_they_are(written: Callable[[str], str]) -> None:
    name = written("from trl.rewards import accuracy_reward as f")
    for text, outcome in ((r"So \boxed{\frac{2}{1}}", "correct"), (r"So \boxed{3}", "wrong")):
        assert grade({**TALK, "answer": "$2$"}, text, name).outcome == outcome
    name = written("from trl.rewards import think_format_reward as f")
    assert grade(TALK, "<think>a</think>2", name).reward == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(completions, solution_str): return [1]", "mix two forms"),
        ("def f(prompt, response): return 1", "its parameters are prompt, response: write verl's"),
        ("def f(): return 1", "it has no parameters: write verl's"),
        ("f = dict", "cannot be read"),
        ("f = 3", "no function 'f'"),
    ],
)
def test_a_signature_that_tells_neither_is_named_when_it_is_loaded(
    written: Callable[[str], str], text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_verifier(written(text))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(completions): return [None]", "None, TRL's word for a reward that does not apply"),
        ("def f(completions): return [1, 1]", "2 rewards for one completion"),
        ("def f(completions): return 1", "it returned 1: return a list"),
        ("def f(completions): return ['x']", "it returned 'x'"),
        ("def f(completions, missing): return [1]", "it needs 'missing', which the prompt's record does not have"),
        ("def f(completions, prompts, trainer_state): return [1]", "it needs 'trainer_state'"),
        ("def f(solution_str, reward_router_address): return 1", "it needs 'reward_router_address'"),
        ("async def f(completions): raise OSError('no net')", "OSError: no net"),
    ],
)
def test_what_goes_wrong_in_a_call_is_named(written: Callable[[str], str], body: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        grade(RECORD, "2", written(body))
    assert "prompt 'p'" in str(caught.value)
