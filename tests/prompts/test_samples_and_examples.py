"""`--size` of data is a seeded sample, and `--messages` puts worked examples before every question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.cli.prompts import prompts
from cropi_tools.prompts.options import PromptsOptions
from cropi_tools.prompts.worked_examples import read_examples
from cropi_tools.runtime.errors import InputError

SHOTS = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2="},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"r{i}", "prompt": f"what is {i}?", "answer": str(i)} for i in range(200)]
    tiny_policy.write_jsonl(tmp_path / "q.jsonl", rows)
    (tmp_path / "shots.json").write_text(json.dumps(SHOTS))
    return tmp_path


def made(*sources: str, output: str = "p.jsonl", **options: Any) -> list[dict[str, Any]]:
    prompts(PromptsOptions(sources=sources, output=output, force=True, **options))
    return [] if output == "-" else [json.loads(line) for line in Path(output).read_text().splitlines()]


def ids(records: list[dict[str, Any]]) -> list[str]:
    return [record["id"] for record in records]


def test_a_size_takes_a_sample_by_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = ids(made("q.jsonl"))
    samples = {seed: ids(made("q.jsonl", size=20, seed=seed)) for seed in (0, 1, 2)}
    assert "20 prompts (drawn from 200; 0 exact" in capsys.readouterr().err
    for found in samples.values():
        assert len(found) == 20
        assert found == [one for one in everything if one in found], "the file's order"
        assert found != everything[:20]
    assert len({tuple(found) for found in samples.values()}) == 3
    assert ids(made("q.jsonl", size=20, seed=1)) == samples[1]
    assert set(samples[1]) < set(ids(made("q.jsonl", size=50, seed=1)))
    assert ids(made("q.jsonl", size=200)) == everything
    manifest = json.loads((folder / "p.jsonl.manifest.json").read_text())
    assert "not drawn" not in manifest["skipped"]


def test_every_row_is_as_likely_as_another(folder: Path) -> None:
    drawn = dict.fromkeys(ids(made("q.jsonl")), 0)
    for seed in range(100):
        for one in ids(made("q.jsonl", size=100, seed=seed)):
            drawn[one] += 1
    # of 100 tosses of a coin: 5 standard deviations
    assert all(25 <= count <= 75 for count in drawn.values())


def test_only_what_is_drawn_counts_as_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (folder / "q.jsonl").read_text().splitlines()]
    tiny_policy.write_jsonl(folder / "again.jsonl", [{**row, "id": f"again-{row['id']}"} for row in rows])
    both = made("q.jsonl", "again.jsonl", size=20, check_overlap=("q.jsonl",))
    questions = [record["prompt"] for record in both]
    assert len(both) == len(set(questions)) == 40, "what the first left may be drawn from the second"
    assert "40 of the 40 questions stand in q.jsonl" in capsys.readouterr().err
    repeated = [{**row, "id": f"twice-{row['id']}"} for row in rows]
    tiny_policy.write_jsonl(folder / "twice.jsonl", [*rows, *repeated])
    found = made("twice.jsonl", size=150, exclude=("p.jsonl",), output="t.jsonl")
    assert len(found) == 150
    assert not {record["prompt"] for record in found} & set(questions)
    skipped = json.loads((folder / "t.jsonl.manifest.json").read_text())["skipped"]
    assert skipped == {"excluded": 80, "exact repetitions": 160, "normalised repetitions": 0, "not drawn": 10}


def test_an_id_that_comes_twice_is_refused_whoever_is_drawn(folder: Path) -> None:
    rows = [{"id": "a", "prompt": f"{i}?", "answer": "1"} for i in range(2)]
    tiny_policy.write_jsonl(folder / "twice.jsonl", rows)
    with pytest.raises(InputError, match=r"twice.jsonl:2: id 'a' comes twice"):
        made("twice.jsonl", size=1, output="-")


def test_what_held_the_first_rows_is_not_up_to_date() -> None:
    def decisive(*sources: str, **options: Any) -> dict[str, Any]:
        return PromptsOptions(sources=sources, **options).decisive({}, {}, [])

    assert decisive("q.jsonl", size=3)["sample"] == "by seed and id"
    for other in (decisive("q.jsonl"), decisive("reasoning-gym:gcd", size=3), decisive("recipe:r.jsonl", size=3)):
        assert "sample" not in other


def test_examples_stand_between_the_system_message_and_the_question(folder: Path) -> None:
    first = made("q.jsonl", messages="shots.json", system="Be brief.")[0]
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is 0?"}
    assert first["prompt"] == [system, *SHOTS, question]
    assert first["extra"] == {"worked_examples": 4}
    own = [system, question]
    tiny_policy.write_jsonl(folder / "own.jsonl", [{"id": "a", "prompt": own, "answer": "1", "extra": {"level": 2}}])
    (record,) = made("own.jsonl", messages="shots.json")
    assert record["prompt"] == [system, *SHOTS, question]
    assert record["extra"] == {"level": 2, "worked_examples": 4}
    inputs = json.loads((folder / "p.jsonl.manifest.json").read_text())["inputs"]
    assert inputs["messages"]["path"] == "shots.json"


def test_examples_do_not_hide_a_question(folder: Path) -> None:
    made("q.jsonl", messages="shots.json", system="Be brief.", size=20, output="few.jsonl")
    assert len(made("q.jsonl", exclude=("few.jsonl",))) == 180
    made("q.jsonl", size=20, output="plain.jsonl")
    assert len(made("q.jsonl", messages="shots.json", exclude=("plain.jsonl",))) == 180
    with pytest.raises(InputError, match="no prompt is left"):
        made("few.jsonl", exclude=("plain.jsonl",), output="-")
    twice = made("few.jsonl", messages="shots.json")[0]
    assert twice["extra"] == {"worked_examples": 8}
    assert len(twice["prompt"]) == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "broken JSON"),
        ("[", "broken JSON"),
        ("\xff", "broken JSON (not UTF-8)"),
        ("[" * 200 + "]" * 200, "broken JSON (more than 100"),
        ("{}", "expected a list of messages"),
        ("[]", "expected a list of messages"),
        ("[1]", "message 1: expected an object of role and content"),
        ('[{"role": "user"}]', "message 1: expected an object of role and content"),
        ('[{"role": "system", "content": "x"}]', "message 1: is a system message; give it as --system"),
        ('[{"role": "assistant", "content": "x"}]', "message 1: expected the role 'user', found 'assistant'"),
        ('[{"role": ["user"], "content": "x"}]', "message 1: expected the role 'user'"),
        ('[{"role": "user", "content": "x"}]', "the last message is the user's"),
        ('[{"role": "user", "content": 3}]', "message 1: 'content' must be a text"),
        ('[{"role": "user", "content": " "}]', "message 1: 'content' must be a text that is not empty"),
        ('[{"role": "user", "content": "\\ud800"}]', "message 1: broken Unicode"),
    ],
)
def test_examples_that_are_none_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "shots.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_examples(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        read_examples(str(tmp_path / "none.json"))


def test_a_template_says_which_verifier_it_sets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("reasoning-gym:gcd", size=2)
    assert "exact," not in capsys.readouterr().err
    made("reasoning-gym:gcd", size=2, template="G{question}")
    assert "2 of them have the verifier exact, since a template" in capsys.readouterr().err
    made("q.jsonl", template="Q {prompt}")
    assert "verifier" not in capsys.readouterr().err
