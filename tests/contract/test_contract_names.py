"""Names that others give (ids, sources, sets, arms, files) reach the terminal as harmless characters, whatever the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_policy
from shell import Done, Shell

HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\n[bold]x[/]\u202e\u2028\x9b1m"
ACCENTS = "Größe–∑😀"
SAMPLED = "--max-tokens 6 --verifier parity.py:reward"


def prepared(folder: Path, policy: Path, name: str) -> None:
    """Policy, prompts and verifier; ids and sources hold `name`."""
    shutil.copytree(policy, folder / "P0")
    shutil.copy(Path(tiny_policy.__file__).with_name("parity.py"), folder)
    for file, start in (("raw.jsonl", 0), ("valid.jsonl", 100)):
        records = [
            {
                **one,
                "id": f"{name}{one['id']}",
                "source": name + one["source"],
                "prompt": f"{start + i}+{one['prompt']}",
            }
            for i, one in enumerate(tiny_policy.prompts(12, start=start))
        ]
        (folder / file).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


LINES = f"""
cropi-prompts raw.jsonl -o prompts.jsonl
cropi-rollout --model P0 prompts.jsonl -n 16 {SAMPLED} -o rollouts.jsonl
cropi-rollout --model P0 valid.jsonl -n 16 {SAMPLED} -o valid.rollouts.jsonl
cropi-rollout --model P0 valid.jsonl -n 2 {SAMPLED} --json -o again.jsonl
cropi-grad --model P0 valid.rollouts.jsonl --mean --halves -o mean.safetensors
cropi-grad --model P0 rollouts.jsonl --halves --dim 64 -o grads.zarr --against NAME=mean.safetensors
cropi-grad --model P0 rollouts.jsonl --sketch none -o raw.zarr --against NAME=mean.safetensors
cropi-project --check grads.zarr
cropi-project raw.zarr --fidelity NAME=mean.safetensors
cropi-project raw.zarr --fidelity NAME=mean.safetensors --json
cropi-score grads.zarr -o scores.jsonl
cropi-score grads.zarr --reliability
cropi-score grads.zarr --reliability --json
cropi-score grads.zarr --suspects rollouts.jsonl -o suspects.jsonl
cropi-select scores.jsonl --prompts prompts.jsonl --ratio 0.5 -o selected.jsonl
cropi-train --model P0 prompts.jsonl --steps 2 --batch 4 -n 4 --eval-every 1 {SAMPLED} -o run/NAME/1/1/policy --eval NAME=valid.jsonl
cropi-report run -o page.html --png picture.png
cropi-report run --json
1 cropi-select --by random --prompts NAME
1 cropi-rollout --model NAME prompts.jsonl
1 cropi-select --by random --prompts raw.jsonl --prompts raw.jsonl -o x.jsonl
1 cropi-score grads.zarr --valid NAME=nothing.zarr -o y.jsonl
2 cropi-select --by NAME --prompts raw.jsonl
2 cropi-select --by random --ratio 0.01 --prompts raw.jsonl -o z.jsonl
"""
"""Every command, and what prints names, going well or (after its exit code) badly."""


def lines_of(name: str) -> list[tuple[list[str], int]]:
    """The words of each line with the name in it, and the exit code. Names of means and arms hold no slash."""
    found = []
    for line in LINES.strip().splitlines():
        words = [word.replace("NAME", name.replace("/", "|")) for word in line.split()]
        code = int(words.pop(0)) if words[0].isdigit() else 0
        found.append((words, code))
    return found


def harmless(done: Done, words: list[str]) -> None:
    for stream in (done.stdout, done.stderr):
        bad = {one for one in stream.replace("\n", "") if not one.isprintable()}
        assert not bad, (words, bad, stream)
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_no_command_prints_what_moves_a_cursor(policy_folder: Path, tmp_path: Path, shell: Shell) -> None:
    prepared(tmp_path, policy_folder, HOSTILE)
    (tmp_path / "run" / HOSTILE.replace("/", "|") / "1" / "1").mkdir(parents=True)
    told = ""
    for words, code in lines_of(HOSTILE):
        done = shell(words, tmp_path, code=code)
        harmless(done, words)
        if "--json" in words:
            json.loads(done.stdout.splitlines()[-1])
        told += done.stdout + done.stderr
    assert told.count("[bold]x[") > 10  # they are printed, and no markup
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "picture.png").exists()


ENVIRONMENTS = (
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ENVIRONMENTS, ids=lambda settings: "-".join(settings.values()))
def test_every_command_works_without_utf8(
    settings: dict[str, str], policy_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names that the streams cannot express; data on standard output is UTF-8 all the same."""
    prepared(tmp_path, policy_folder, ACCENTS)
    (tmp_path / "run" / ACCENTS / "1" / "1").mkdir(parents=True)
    with Shell(tmp_path_factory.mktemp("shell"), **settings) as shell:
        if settings.get("LC_ALL") == "C":
            done = shell(
                ["cropi-grad", "--model", "P0", "rollouts.jsonl", "--against", f"{ACCENTS}=m", "-o", "x"],
                tmp_path,
                code=2,
            )
            assert "set PYTHONUTF8=1, or give another name" in done.stderr
        for words, code in lines_of(ACCENTS):
            if settings.get("LC_ALL") == "C" and {"--against", "--fidelity"} & set(words):
                # sets of a store are files in it
                words = [word.replace(f"{ACCENTS}=", "t=") for word in words]
            done = shell(words, tmp_path, code=code)
            assert "Traceback" not in done.stderr
            assert "EncodeError" not in done.stderr
            assert "DecodeError" not in done.stderr
            if "--json" in words:
                json.loads(done.stdout.splitlines()[-1])
        piped = shell(["cropi-prompts", "raw.jsonl"], tmp_path)
    assert piped.stdout == (tmp_path / "prompts.jsonl").read_text(encoding="utf-8")
    record = json.loads(piped.stdout.splitlines()[0])
    assert record["id"].startswith(ACCENTS)
