"""`cropi-verify`: responses graded again, and rollouts of others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
from test_refreshing import ROLLOUTS
from test_refreshing import run as sampled

from cropi_tools.cli.verify import main
from cropi_tools.data.manifest import file_digest, read_manifest
from cropi_tools.data.records import read_rollouts
from cropi_tools.rewards import grade, verifier_fingerprint, verifiers


@pytest.fixture(autouse=True)
def nothing_allowed() -> Iterator[None]:
    """What one command allowed in this process is not allowed to the next test's."""
    yield
    verifiers._allowed.clear()
    verifiers._may_run.cache_clear()


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return tiny_policy.save(tmp_path / "P0")


def run(*words: str) -> int:
    """cropi-verify in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cropi-verify", *words])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def refused(*words: str) -> str:
    """What cropi-verify says when it fails; in a process of its own, which gives back the lock of its output."""
    program = str(Path(sys.executable).parent / "cropi-verify")
    found = subprocess.run([program, *words], capture_output=True, text=True)
    assert found.returncode == 1
    return found.stderr


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_rewards_and_outcomes_change(tmp_path: Path) -> None:
    source = tiny_policy.write_jsonl(tmp_path / "r.jsonl", ROLLOUTS)
    assert run(str(source), "--verifier", "exact", "-o", str(tmp_path / "new.jsonl"), "--quiet") == 0
    rows = read(tmp_path / "new.jsonl")
    for old, new in zip(ROLLOUTS, rows, strict=True):
        assert {**new, "samples": old["samples"]} == old
        for before, after in zip(old["samples"], new["samples"], strict=True):
            assert after == {**before, "reward": 1.0, "outcome": "correct"}
            assert list(after) == list(before)


def test_a_record_s_own_verifier_counts_where_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text(
        "def reward(data_source, solution_str, ground_truth, extra_info):\n    return 0.25\n"
    )
    rows = [{**ROLLOUTS[0], "verifier": f"{tmp_path}/never.py:reward"}, ROLLOUTS[1]]
    source = tiny_policy.write_jsonl(tmp_path / "r.jsonl", rows)
    words = [str(source), "-o", str(tmp_path / "new.jsonl"), "--quiet"]
    assert run(*words) == 1  # a program that the command line does not name
    assert run(*words, "--allow-verifier", f"{tmp_path}/never.py") == 0
    first, second = read(tmp_path / "new.jsonl")
    assert [sample["reward"] for sample in first["samples"]] == [0.25, 0.25]
    assert [sample["reward"] for sample in second["samples"]] == [1.0, 1.0]


OWN = ("exact", "reasoning-gym", "mine.py:half")


def asked_variously() -> list[dict[str, Any]]:
    """Prompts with verifiers of their own: one that needs no process, one of a library, a program; and one without."""
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    source = {"dataset": "chain_sum", "entry": {key: entry[key] for key in ("question", "answer", "metadata")}}
    plain = tiny_policy.prompts(8)
    owned = [{**prompt, "verifier": name} for prompt, name in zip(plain, 2 * OWN, strict=False)]
    return [{**prompt, "answer": "0", "extra": {"reasoning_gym": source}} for prompt in [*owned, *plain[6:]]]


@pytest.mark.parametrize("chosen", [None, "maths", OWN[0], pytest.param(OWN[1], marks=pytest.mark.slow), OWN[2]])
def test_rollouts_are_verified_as_they_were_first(
    tmp_path: Path,
    policy: Path,
    chosen: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever's verifiers grade: the same rewards of both commands, those of `grade`; the records keep their own."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def half(solution_str, **more):\n    return len(solution_str) / 2\n")
    prompts = asked_variously()
    tiny_policy.write_jsonl(Path("p.jsonl"), prompts)
    option = ["--verifier", chosen] if chosen else ["--allow-verifier", "mine.py"]
    assert sampled("--model", str(policy), "p.jsonl", "-n", "3", "--max-tokens", "2", *option, "-o", "r.jsonl") == 0
    first = capsys.readouterr().err
    assert run("r.jsonl", *option, "-o", "again.jsonl") == 0
    assert Path("again.jsonl").read_text() == Path("r.jsonl").read_text()
    others = sum(prompt.get("verifier", chosen) != chosen for prompt in prompts)
    told = f"--verifier {chosen} overrides the verifiers of {others} of 8 records\n" if chosen else ""
    assert first.count("overrides") == (chosen is not None)
    assert first.startswith(told)
    assert capsys.readouterr().err.startswith(told)
    for prompt, row in zip(prompts, read(Path("r.jsonl")), strict=True):
        assert row.get("verifier") == prompt.get("verifier")
        for sample in row["samples"]:
            assert (sample["reward"], sample["outcome"]) == grade(prompt, sample["text"], chosen)
    manifest = read_manifest("again.jsonl")
    assert manifest is not None
    own = manifest["fingerprint"]["options"]["own_verifiers"]
    assert set(own) == (set(OWN) if chosen is None else {chosen} & set(OWN))


def test_overriding_is_another_result_and_naming_what_records_name_is_none(tmp_path: Path) -> None:
    for own, code in (("exact", 0), ("choice", 1)):
        rows = [{**row, "verifier": own, "answer": "A"} for row in ROLLOUTS]
        source = tiny_policy.write_jsonl(tmp_path / f"{own}.jsonl", rows)
        line = [str(source), "-o", str(tmp_path / f"{own}.new.jsonl"), "--quiet"]
        assert run(*line) == 0
        # the options' own names are "maths" and "exact"
        assert run(*line, "--verifier", "maths") == 1
        assert run(*line, "--verifier", "exact", "-o", str(tmp_path / f"{own}.exact.jsonl")) == 0
        same = (tmp_path / f"{own}.exact.jsonl").read_text() == (tmp_path / f"{own}.new.jsonl").read_text()
        assert same is (code == 0)


def test_what_the_former_command_made_is_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the fingerprint of `cropi-rollout --verify-only`."""
    source = tiny_policy.write_jsonl(tmp_path / "r.jsonl", ROLLOUTS)
    line = [str(source), "--verifier", "exact", "-o", str(tmp_path / "new.jsonl")]
    assert run(*line) == 0
    manifest = read_manifest(tmp_path / "new.jsonl")
    assert manifest is not None
    assert manifest["fingerprint"] == {
        "command": "cropi-rollout",
        "options": {
            "verifier": verifier_fingerprint("exact"),
            "own_verifiers": {},
            "partial_credit": False,
            "verify_seconds": 10.0,
            "verify_only": True,
            "max_tokens": None,
            "shard": "1/1",
            "limit": None,
        },
        "inputs": {"rollouts": file_digest(source)},
    }
    capsys.readouterr()
    assert run(*line) == 0
    assert "new.jsonl: up to date" in capsys.readouterr().err


def gym_rollouts(family: str, texts: list[str]) -> dict[str, Any]:
    import reasoning_gym

    entry = reasoning_gym.create_dataset(family, size=1, seed=3)[0]
    source = {"dataset": family, "entry": {key: entry[key] for key in ("question", "answer", "metadata")}}
    samples = [{**ROLLOUTS[0]["samples"][0], "text": text.replace("ANSWER", entry["answer"])} for text in texts]
    changed = {"answer": entry["answer"], "verifier": "reasoning-gym", "extra": {"reasoning_gym": source}}
    return {**ROLLOUTS[0], "id": "gym", **changed, "samples": samples}


def test_partial_scores_are_counted_and_rewarded_only_where_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [gym_rollouts("spell_backward", ["ANSWERq", "zzzz", "The answer is ANSWER."]), ROLLOUTS[1]]
    source, new = tiny_policy.write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "new.jsonl"
    line = [str(source), "-o", str(new)]
    assert run(*line, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    gym, other = read(new)
    assert [(sample["reward"], sample["outcome"]) for sample in gym["samples"]] == [
        (0, "partial"),
        (0, "wrong"),
        (1, "correct"),
    ]
    assert found["partial_fraction"] == pytest.approx(1 / (3 + len(other["samples"])))
    assert found["outcomes"]["partial"] == 1
    assert "partial-credit False, now True" in refused(*line, "--partial-credit")
    assert run(*line, "--partial-credit", "--force") == 0
    assert "partial" in capsys.readouterr().err
    again = read(new)[0]["samples"]
    assert 0.5 < again[0]["reward"] < 1
    assert [sample["outcome"] for sample in again] == ["partial", "wrong", "correct"]


@pytest.mark.parametrize("verifier", ["maths", "recorded", "choice"])
def test_partial_credit_of_verifiers_that_give_none_is_refused(tmp_path: Path, verifier: str) -> None:
    source = tiny_policy.write_jsonl(tmp_path / "r.jsonl", ROLLOUTS)
    program = str(Path(sys.executable).parent / "cropi-verify")
    line = [
        program,
        str(source),
        "--verifier",
        verifier,
        "--partial-credit",
        "-o",
        str(tmp_path / "n.jsonl"),
    ]
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.returncode == 2
    assert "--partial-credit" in found.stderr
    assert ("leave one of them out" if verifier == "recorded" else "reasoning-gym") in found.stderr


AUTHORS = [
    {"id": "a1", "prompt": "1+2=", "answer": "3", "responses": ["3", "4", ""], "rewards": [1.0, 0.0, 0.0]},
    {"id": "a2", "prompt": "2+2=", "answer": "4", "responses": ["3", "5", "44"], "rewards": [0.5, 0.0, 0.0]},
]


def test_the_authors_rollouts(tmp_path: Path, policy: Path) -> None:
    source = tiny_policy.write_jsonl(tmp_path / "theirs.jsonl", AUTHORS)
    target = tmp_path / "ours.jsonl"
    line = [str(source), "--verifier", "exact", "-o", str(target), "--quiet"]
    assert "--model" in refused(*line)
    assert run(*line, "--model", str(policy)) == 0
    found = list(read_rollouts([target], 71))
    assert [rollout.id for rollout in found] == ["a1", "a2"]
    assert found[0].rewards == [1.0, 0.0, 0.0]
    assert found[1].rewards == [0.0, 0.0, 0.0]  # graded anew: theirs said .5
    tokenizer = tiny_policy.tokenizer()
    assert found[0].prompt_token_ids == tokenizer("1+2=")["input_ids"]
    assert [sample.token_ids for sample in found[1].samples] == [tokenizer(t)["input_ids"] for t in ("3", "5", "44")]
    assert [sample.logprobs for sample in found[0].samples] == [None] * 3
    assert {sample["finish_reason"] for sample in found[0].record["samples"]} == {"unknown"}


def test_recorded_rewards_stay(tmp_path: Path, policy: Path) -> None:
    source = tiny_policy.write_jsonl(tmp_path / "theirs.jsonl", AUTHORS)
    target = tmp_path / "ours.jsonl"
    line = ["--model", str(policy), "--verifier", "recorded", "-o", str(target), "--quiet"]
    assert run(*line, str(source), "--max-tokens", "2") == 0
    found = list(read_rollouts([target], 71))
    assert [rollout.rewards for rollout in found] == [[1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
    reasons = [[sample["finish_reason"] for sample in rollout.record["samples"]] for rollout in found]
    assert reasons == [["stop", "stop", "stop"], ["stop", "stop", "length"]]
    assert found[0].samples[2].token_ids == [1]  # empty, but it ended
    bare = [{key: value for key, value in row.items() if key != "rewards"} for row in AUTHORS]
    source = tiny_policy.write_jsonl(tmp_path / "bare.jsonl", bare)
    said = refused(*line[:-2], str(tmp_path / "other.jsonl"), str(source))
    assert "'a1' has samples without a reward" in said


def test_verl_dumps(tmp_path: Path, policy: Path) -> None:
    prompts = tiny_policy.prompts(3)
    plain = tiny_policy.write_jsonl(tmp_path / "p.jsonl", prompts)
    lines = [
        {
            "input": prompt["prompt"],
            "output": text,
            "gts": prompt["answer"],
            "score": float(text == prompt["answer"]),
            "step": 1,
        }
        for text in ("0", "1")
        for prompt in prompts[:2]
    ]
    dump = tiny_policy.write_jsonl(tmp_path / "1.jsonl", lines)
    target = tmp_path / "ours.jsonl"
    line = ["--model", str(policy), "--verifier", "exact", "-o", str(target), "--quiet", str(dump)]
    assert "--prompts FILE" in refused(*line)
    assert run(*line, "--prompts", str(plain)) == 0
    found = list(read_rollouts([target], 71))
    assert [rollout.id for rollout in found] == ["p0", "p1"]
    assert [rollout.rewards for rollout in found] == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("chosen", [None, "exact", "choice"])
def test_a_dump_is_graded_by_what_its_prompts_name(
    tmp_path: Path, policy: Path, chosen: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [{**prompt, "verifier": "choice", "answer": "A"} for prompt in tiny_policy.prompts(3)]
    plain = tiny_policy.write_jsonl(tmp_path / "p.jsonl", prompts)
    lines = [{"input": prompts[0]["prompt"], "output": text, "score": 0.0, "step": 1} for text in ("A", "a", "B")]
    dump = tiny_policy.write_jsonl(tmp_path / "1.jsonl", lines)
    line = [str(dump), "--model", str(policy), "--prompts", str(plain), "-o", str(tmp_path / "ours.jsonl")]
    assert run(*line, *(["--verifier", chosen] if chosen else [])) == 0
    (row,) = read(tmp_path / "ours.jsonl")
    assert [sample["reward"] for sample in row["samples"]] == [1.0, 0.0 if chosen == "exact" else 1.0, 0.0]
    said = "--verifier exact overrides the verifiers of 3 of 3 records"
    assert (said in capsys.readouterr().err) is (chosen == "exact")
    manifest = read_manifest(tmp_path / "ours.jsonl")
    assert manifest is not None
    assert set(manifest["fingerprint"]["options"]["own_verifiers"]) == (set() if chosen == "exact" else {"choice"})


def test_shards_one_after_another_are_the_whole(tmp_path: Path) -> None:
    source = tiny_policy.write_jsonl(tmp_path / "r.jsonl", ROLLOUTS)
    line = [str(source), "--verifier", "exact", "--quiet"]
    assert run(*line, "-o", str(tmp_path / "all.jsonl")) == 0
    for i in (1, 2):
        assert run(*line, "-o", str(tmp_path / f"{i}.jsonl"), "--shard", f"{i}/2") == 0
    parts = (tmp_path / "1.jsonl").read_text() + (tmp_path / "2.jsonl").read_text()
    assert parts == (tmp_path / "all.jsonl").read_text()


def test_rollouts_without_outcomes_or_texts(tmp_path: Path) -> None:
    """An outcome is told from the reward; a text that is not there cannot be graded."""

    def without(*names: str) -> str:
        rows = [
            {**row, "samples": [{k: v for k, v in s.items() if k not in names} for s in row["samples"]]}
            for row in ROLLOUTS
        ]
        return str(tiny_policy.write_jsonl(tmp_path / f"{'-'.join(names)}.jsonl", rows))

    source = without("outcome", "finish_reason")
    assert run(source, "--verifier", "recorded", "-o", str(tmp_path / "a.jsonl"), "--quiet") == 0
    assert (tmp_path / "a.jsonl").read_text() == Path(source).read_text()
    said = refused(without("text"), "--verifier", "exact", "-o", str(tmp_path / "b.jsonl"))
    assert said == "cropi-verify: prompt 'none' has a sample without 'text', which a verifier reads; add it\n"


def test_a_signal_ends_verifying_soon(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\n\ndef reward(solution_str, **more):\n    time.sleep(600)\n")
    source = tiny_policy.write_jsonl(tmp_path / "r.jsonl", ROLLOUTS)
    program = str(Path(sys.executable).parent / "cropi-verify")
    words = [str(source), "--verifier", f"{tmp_path}/slow.py:reward", "--verify-seconds", "600"]
    process = subprocess.Popen([program, *words, "-o", str(tmp_path / "new.jsonl")], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "new.jsonl.part").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(1)
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert said.splitlines()[-1].startswith("cropi-verify: stopped by SIGTERM")
