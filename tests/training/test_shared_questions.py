"""An evaluation on questions that are trained on is told."""

from __future__ import annotations

import pytest

from cropi_tools.training.inputs import warn_of_shared_questions

SHOTS = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def test_questions_that_are_trained_on_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    system = {"role": "system", "content": "Be brief."}
    trained = [
        {"prompt": "What is 2?"},
        {"prompt": [system, *SHOTS, {"role": "user", "content": "b"}], "extra": {"worked_examples": 2}},
    ]
    sets = {
        "target": [{"prompt": "what  IS 2?"}, {"prompt": [{"role": "user", "content": "B"}]}, {"prompt": "c"}],
        "apart": [{"prompt": "1+1="}, {"prompt": "d"}],
    }
    warn_of_shared_questions(trained, sets)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 2 of the 3 questions of --eval target are among those to train on")
