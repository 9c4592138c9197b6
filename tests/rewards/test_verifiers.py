"""The verifiers but for mathematics, their names and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from cropi_tools.rewards import (
    Grade,
    VerifierPool,
    check_own_verifiers,
    check_record,
    check_verifier,
    checked_verifiers,
    grade,
    verifier_fingerprint,
)
from cropi_tools.runtime.errors import InputError, UsageError


def test_exact_strips_only_the_ends() -> None:
    record = {"id": "p", "answer": " a  b\n", "verifier": "exact"}
    assert grade(record, "\ta  b ") == Grade(1.0, "correct")
    assert grade(record, "a b") == Grade(0.0, "wrong")
    assert grade({"id": "p", "answer": 12}, "12", "exact") == Grade(1.0, "correct")


def test_exact_reads_answer_tags() -> None:
    record = {"id": "p", "answer": "a  b", "verifier": "exact"}
    for right in (
        "It is <answer> a  b\n</answer>.",
        "<ANSWER>c</ANSWER> no <answer>a  b</answer>",
        "<answer>a  b",
        r"<answer>\boxed{a  b}</answer>",
    ):
        assert grade(record, right) == Grade(1.0, "correct")
    for wrong in (
        "a  b <answer>c</answer>",
        "The answer is a  b",
        "<answer>a  b</answer> no <answer>c</answer>",
        r"\boxed{a  b}",
    ):
        assert grade(record, wrong) == Grade(0.0, "wrong")


@pytest.mark.parametrize("own", [None, "", "maths", "exact"])
@pytest.mark.parametrize("chosen", [None, "maths", "exact"])
def test_a_chosen_verifier_comes_before_the_record_s_own(own: str | None, chosen: str | None) -> None:
    expected = chosen or own or "maths"
    record = {"id": "p", "answer": "0.50", "verifier": own}
    outcome = "wrong" if expected == "exact" else "correct"
    assert grade(record, "0.5", chosen).outcome == outcome
    with VerifierPool(chosen) as pool:
        assert [found.outcome for found in pool.grade_many([(record, "0.5")])] == [outcome]
    nothing = {"id": "p", "answer": "", "verifier": own}
    if expected == "maths":
        with pytest.raises(InputError, match="the verifier 'maths'"):
            check_record(nothing, chosen)
    else:
        check_record(nothing, chosen)


@pytest.mark.parametrize(
    ("chosen", "own", "said"),
    [
        (
            None,
            {"exact", "choice", "maths"},
            "5 of 7 records are graded by the verifiers that they name (exact, choice, maths), the others by maths\n",
        ),
        ("exact", {"exact"}, "--verifier exact overrides the verifiers of 3 of 7 records\n"),
        ("maths", {"maths"}, "--verifier maths overrides the verifiers of 3 of 7 records\n"),
        ("reasoning-gym", set(), "--verifier reasoning-gym overrides the verifiers of 5 of 7 records\n"),
    ],
)
def test_which_records_verifiers_count(
    tmp_path: Path, chosen: str | None, own: set[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [None, "exact", "choice", "exact", "", "maths", "maths"]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, part in zip(files, (names[:3], names[3:]), strict=True):
        path.write_text("\n".join(json.dumps({"answer": "a", "verifier": name}) for name in part) + "\n\n")
    found = checked_verifiers([str(path) for path in files], chosen, [], False)
    assert found == {
        "verifier": verifier_fingerprint(chosen or "maths"),
        "own_verifiers": {name: verifier_fingerprint(name) for name in own},
        "partial_credit": False,
    }
    assert capsys.readouterr().err == said


def test_what_is_overridden_is_not_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is none, and a program, of which other spellings are the same one."""
    (tmp_path / "mine.py").write_text("def score(**k): return 1\n\ndef other(**k): return 0\n")
    (tmp_path / "link.py").symlink_to("mine.py")
    path, mine = tmp_path / "p.jsonl", f"{tmp_path}/mine.py:score"
    names = ["nonsense", "absent.py:f", mine, f"{tmp_path}/x/../link.py:score", f"{tmp_path}/mine.py:other"]
    path.write_text("".join(json.dumps({"verifier": name}) + "\n" for name in names))
    assert set(check_own_verifiers([str(path)], mine)) == set(names[2:4])
    assert capsys.readouterr().err == f"--verifier {mine} overrides the verifiers of 3 of 5 records\n"
    for chosen in (None, "exact"):
        path.write_text('{"verifier": ["exact"]}')
        with pytest.raises(InputError, match=r"p\.jsonl:1: 'verifier' must be a text"):
            check_own_verifiers([str(path)], chosen)


@pytest.mark.parametrize(("chosen", "fits"), [(None, True), ("reasoning-gym", True), ("exact", False)])
def test_partial_credit_needs_a_verifier_in_use_that_gives_it(tmp_path: Path, chosen: str | None, fits: bool) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"verifier": "reasoning-gym"}')
    if fits:
        assert checked_verifiers([str(path)], chosen, [], True)["partial_credit"]
    else:
        with pytest.raises(UsageError, match="--partial-credit: exact grades no answer in part"):
            checked_verifiers([str(path)], chosen, [], True)


def test_reasoning_gym_agrees_with_its_own_scorer() -> None:
    for name in ("chain_sum", "spell_backward", "word_sorting"):
        data = reasoning_gym.create_dataset(name, size=4, seed=3)
        for index, entry in enumerate(data):
            source = {"dataset": name, "entry": {key: entry[key] for key in ("question", "answer", "metadata")}}
            record = {"id": str(index), "extra": {"reasoning_gym": source}, "verifier": "reasoning-gym"}
            right = str(entry["answer"])
            assert grade(record, f" {right}\n") == Grade(1.0, "correct")
            assert grade(record, f"<answer>9</answer> hm <answer> {right} </answer> done") == Grade(1.0, "correct")
            near = right[:-1] + "z"
            expected = data.score_answer(near, entry)
            outcome = "partial" if expected > 0 else "wrong"
            assert grade(record, f"<answer>{near}</answer>") == Grade(0.0, outcome)
            assert grade(record, f"<answer>{near}</answer>", partial_credit=True) == Grade(expected, outcome)
            assert grade(record, "").outcome == "wrong"


@pytest.mark.parametrize("extra", [None, {}, {"reasoning_gym": {"dataset": "chain_sum"}}, {"reasoning_gym": 3}])
def test_reasoning_gym_without_its_entry_is_an_input_error(extra: Any) -> None:
    with pytest.raises(InputError, match="'p1'"):
        check_record({"id": "p1", "extra": extra, "verifier": "reasoning-gym"})


def test_reasoning_gym_names_an_unknown_data_set() -> None:
    record = {"id": "p1", "extra": {"reasoning_gym": {"dataset": "no_such", "entry": {}}}}
    with pytest.raises(InputError, match="no_such"):
        grade(record, "1", "reasoning-gym")


def test_check_verifier_accepts_what_works(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(solution_str, **rest): return 1")
    for name in ("maths", "choice", "exact", "reasoning-gym", f"{tmp_path}/mine.py:score"):
        check_verifier(name)


@pytest.mark.parametrize("name", ["auto", "math", "file.py:", "file.py:1x", "file.txt:score", ""])
def test_an_unknown_name_is_a_usage_error_that_lists_the_known(name: str) -> None:
    with pytest.raises(UsageError, match=r"maths, choice, exact, reasoning-gym, or path/file\.py:function"):
        check_verifier(name)


def test_check_verifier_names_what_is_wrong_with_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no file"):
        check_verifier(f"{tmp_path}/absent.py:score")
    for text, message in [
        ("import nonexistent_library", "ModuleNotFoundError"),
        ("def score(:", "SyntaxError"),
        ("score = 3", "no function 'score'"),
        ("import os; os._exit(4)", "exit code 4"),
    ]:
        path = tmp_path / "bad.py"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            check_verifier(f"{path}:score")


def test_the_fingerprint_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(**k): return 1")
    first = verifier_fingerprint(f"{path}:score")
    assert first == f"mine.py:score sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"
    path.write_text("def score(**k): return 0")
    assert verifier_fingerprint(f"{path}:score") != first
    assert verifier_fingerprint("exact") == "exact rules=2"
    assert verifier_fingerprint("choice").startswith("choice rules=")
    assert "math-verify=" in verifier_fingerprint("maths")
    assert "reasoning-gym=" in verifier_fingerprint("reasoning-gym")


def test_the_room_imports_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "sympy", "math_verify", "reasoning_gym"]
    code = f"import sys, cropi_tools.rewards; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_without_a_function_is_asked_for_one() -> None:
    with pytest.raises(UsageError, match=r"as in mine\.py:reward"):
        check_verifier("mine.py")
