"""What is off in rollouts is said in a line, with a response beside its reference; --show prints what a person would look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.cli import rollout, verify
from cropi_tools.rollouts.look import Look, cut
from cropi_tools.rollouts.metrics import Tallies
from cropi_tools.rollouts.remarks import remarks


def run(command: Any, *words: object) -> None:
    """A command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cropi", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            command.main()
    assert not stop.value.code


def sample(text: str, outcome: str = "wrong", **more: Any) -> dict[str, Any]:
    return {"token_ids": [1, 2], "text": text, "reward": float(outcome == "correct"), "outcome": outcome} | more


def record(number: int, *samples: dict[str, Any], answer: str = "42", verifier: str | None = None) -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "prompt": "?",
        "answer": answer,
        "source": "s",
        "verifier": verifier,
        "prompt_token_ids": [1],
        "samples": list(samples),
    }


def said(records: list[dict[str, Any]], verifier: str | None = None) -> list[str]:
    tallies, look = Tallies(), Look()
    for one in records:
        look.add(one)
    tallies.add(records)
    return list(remarks(tallies.summary(), look.records, verifier))


RIGHT, WRONG = sample("42", "correct"), sample("7")


def test_nothing_is_said_where_all_is_well() -> None:
    assert said([record(k, RIGHT, WRONG) for k in range(8)]) == []
    assert said([record(k, WRONG) for k in range(3)]) == [], "too few to tell"
    assert said([record(k, [RIGHT, WRONG][k % 2]) for k in range(8)]) == [], "one sample each: an evaluation"


@pytest.mark.parametrize(
    ("samples", "options", "sentence"),
    [
        ((WRONG, WRONG), {}, "none of the 16 responses is right: take easier prompts, or worked examples"),
        ((RIGHT, RIGHT), {}, "all 16 responses are right"),
        ((RIGHT, sample("7, so", finish_reason="length")), {}, "50% of the responses are cut off; raise --max-tokens"),
        (
            (WRONG, sample("7, so", finish_reason="length")),
            {},
            "none of the 16 responses is right: 50% of the responses are cut off",
        ),
        ((RIGHT, sample("no idea", "unparsed")), {}, "in 50% of the responses the verifier finds no answer"),
        (
            (sample("It is 42."), sample("It is 420.")),
            {"verifier": "exact"},
            "none of the 16 responses is right: the verifier exact wants the answer to the letter, and 8 of 8 wrong",
        ),
        (
            (WRONG, WRONG),
            {"verifier": "exact", "answer": "She sold 48/2 = 24 clips in May. #### 42"},
            "none of the 16 responses is right: the verifier exact wants the reference to the letter, and references are sentences",
        ),
    ],
)
def test_what_is_off_is_said(samples: tuple[dict[str, Any], ...], options: dict[str, Any], sentence: str) -> None:
    (found,) = said([record(k, *samples, **options) for k in range(8)])
    assert found.startswith(sentence)
    assert "; such as prompt 'p0': response \"" in found
    assert 'reference "' in found


def test_groups_of_equal_rewards_are_said() -> None:
    (found,) = said([record(k, *([RIGHT, RIGHT], [WRONG, WRONG])[k % 2]) for k in range(8)])
    assert found.startswith("in none of the 8 prompts do responses differ in reward, so none has a gradient")


def test_the_chosen_verifier_counts_not_the_records() -> None:
    held = [record(k, sample("It is 42."), verifier="maths") for k in range(8)]
    assert "to the letter" in said(held, "exact")[0]
    assert "to the letter" not in said(held)[0]


def test_a_text_is_cut_in_the_middle() -> None:
    assert cut("short", 10) == "short"
    assert cut("a" * 50 + "b" * 50, 10) == "aaaaa [... 90 characters ...] bbbbb"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tiny_policy.write_jsonl(tmp_path / "prompts.jsonl", tiny_policy.prompts(4))


def test_show_prints_prompts_and_responses(
    chat_policy: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r.jsonl"
    words = [rollout, "--model", chat_policy, prompts, "-n", "4", "--max-tokens", "5", "--show", "2"]
    shown = []
    for more in (["-o", output], ["-o", output], ["--dry-run"]):
        run(*words, *more)
        shown.append(capsys.readouterr().err.partition("-- prompt 1 of 2: 'p0' (source even)")[2].splitlines())
    assert shown[0] == shown[1], "after sampling and when it is up to date"
    for lines in shown:
        assert lines[1] == "  | <|pad|>user0+0=<|end|><|pad|>assistant", (
            "special tokens too; this vocabulary has no spaces"
        )
        assert lines[2] == "reference: 0"
        assert lines[3].startswith("response: ")
        assert ", reward " in lines[3]
        assert any(line.startswith("-- prompt 2 of 2: 'p1'") for line in lines)
    run(*words, "-o", "-")
    assert "-- prompt 2 of 2: 'p1'" in capsys.readouterr().err


def test_line_breaks_stand_and_nothing_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    class Tokenizer:
        def decode(self, tokens: list[int]) -> str:
            return "one\n-- prompt 9\n\x1b[2J" + "x" * 3000 + "\nlast"

    look = Look(1)
    look.add(record(0, WRONG))
    look.tell(Tokenizer())
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:3] == ["  | one", "  | -- prompt 9"]
    assert lines[3].startswith("  | \\x1b[2Jxxx")
    assert "characters ...]" in lines[3]
    assert lines[4] == "  | last"


def test_warnings_follow_the_summary(
    policy_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [rollout, "--model", policy_folder, prompts, "-n", "4", "--max-tokens", "5", "--verifier", "exact"]
    run(*words, "-o", tmp_path / "r.jsonl")
    assert "warning: " in capsys.readouterr().err
    run(verify, tmp_path / "r.jsonl", "--verifier", "exact", "-o", tmp_path / "v.jsonl")
    assert "warning: " in capsys.readouterr().err
