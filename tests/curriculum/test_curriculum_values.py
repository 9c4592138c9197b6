"""Values of a CONFIG, or of make's command line, that can only be mistakes: make ends with one line before anything starts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from curriculum_runs import ROOT, BookkeptCurriculum

MISTAKES = (
    *(f"{name}={value}" for name in ("STAGES", "GPUS") for value in ("abc", "0", "-1", "1.5", "1 2", "01", "x1")),
    *("STEPS=x", "SAMPLES=0", "VALID_SAMPLES=-4", "MAX_TOKENS=1k"),
    *("FORCE=yes", "FORCE=force", "FORCE=--force --force", "CARRY=all", "ARMS=cropy", "ARMS=cropi randm", "SEEDS=1 b"),
    *(
        f"{name}={value}"
        for name in ("PROBE", "SHORTLIST")
        for value in ("x", "-1", "1.2.3", "1..2", ".1", "1 2", "1e-1")
    ),
    *(f"{name}={value}" for name in ("AUDIT", "FRESH_VALID") for value in ("yes", "0", "1 1")),
    *("ARMS=complete", "VALID="),
    *(f"DRAW={value}" for value in ("x", "-1", "1 2", "1.5", "08")),
    *("ARMS=start", "ARMS=random settings", "ARMS=random a/b", "ARMS=a%b", "ARMS=random random"),
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_value_is_told_before_anything_starts(mistake: str, tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    done = curriculum.make(mistake, code=2)
    assert done.stderr.count("\n") == 1
    assert f"*** {mistake}: " in done.stderr
    assert curriculum.asked() == []
    assert not curriculum.run.exists()


@pytest.mark.parametrize(
    "value",
    ["STAGES=1", "STAGES= 2 ", "FORCE=", "FORCE=--force", "CARRY=full", "SEEDS=10 2", "PROBE=0.1", "SHORTLIST=1.5"],
)
def test_what_is_no_mistake_goes_on(value: str, tmp_path: Path) -> None:
    assert BookkeptCurriculum(tmp_path).make("-n", value).stdout


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("VALID=target other", "the prompts of other are not told; set VALID_FILE.other"),
        ("TEST=other", "the prompts of other are not told; set TEST_FILE.other"),
        ("VALID_FILE.target=absent.jsonl", "there is no file absent.jsonl, and no rule that makes it"),
        ("TEST_FILE.target=absent.jsonl", "there is no file absent.jsonl"),
        ("POOL=absent.jsonl", "there is no file absent.jsonl"),
        ("MODEL_MADE=absent/manifest.json", "there is no file absent/manifest.json"),
        ("MODEL=absent", "no policy folder"),
        ("MODEL=./absent/policy", "no policy folder"),
        ("MODEL=docs/commands", "no policy folder"),
    ],
)
def test_what_is_not_there_is_told_before_anything_starts(mistake: str, said: str, tmp_path: Path) -> None:
    curriculum = BookkeptCurriculum(tmp_path)
    for words in ([], ["-n"], ["-j2"]):
        done = curriculum.make(*words, mistake, code=2)
        assert done.stderr.count("\n") == 1
        assert f"*** {mistake}: " in done.stderr
        assert said in done.stderr
    assert curriculum.asked() == []
    assert not curriculum.run.exists()


def test_what_a_rule_makes_need_not_be_there(tmp_path: Path) -> None:
    """A rule of the config, whatever quotes the command line has beside."""
    curriculum = BookkeptCurriculum(tmp_path)
    made = tmp_path / "made.jsonl"
    with open(curriculum.config, "a") as config:
        config.write(f"{tmp_path}/%.jsonl:\n\techo made > $@\n{tmp_path}/P9/done:\n\tmkdir -p $(@D) && touch $@\n")
    given = (
        f"POOL={made}",
        f"MODEL={tmp_path}/P9",
        f"MODEL_MADE={tmp_path}/P9/done",
        "TRAIN_OPTIONS=--clip '0.2,0.3' \"x y\"",
    )
    assert "echo made" in curriculum.make("-n", *given).stdout
    assert not made.exists()


@pytest.mark.parametrize("model", ["ORG/NAME", "ORG/NAME@main", "ORG/NAME@refs/pr/1"])
def test_a_name_of_the_hub_is_a_policy(model: str, tmp_path: Path) -> None:
    assert f"--model {model} " in BookkeptCurriculum(tmp_path).make("-n", f"MODEL={model}").stdout


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", *words], capture_output=True, text=True)


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mk").touch()
    for name, said in (("absent.mk", "no such file"), (".", "is a folder"), ("empty.mk", "does not set RUN")):
        done = make("curriculum", f"CONFIG={tmp_path / name}")
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_make_config_writes_one_that_can_be_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.mk"
    assert make("config", f"CONFIG={path}").returncode == 0
    assert path.read_text() == make("config").stdout
    again = make("config", f"CONFIG={path}")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists" in again.stderr
    curriculum = BookkeptCurriculum(tmp_path)
    given = [
        f"RUN={curriculum.run}",
        *(f"{name}={tmp_path / 'pool.jsonl'}" for name in ("POOL", "VALID_FILE.target", "TEST_FILE.target")),
    ]
    shown = make("-n", "curriculum", f"CONFIG={path}", *given)
    assert shown.returncode == 0, shown.stderr
    assert "--model Qwen/Qwen2.5-0.5B-Instruct" in shown.stdout


def test_every_value_is_explained_and_in_the_template() -> None:
    """All that curriculum.mk reads and does not make itself; the defaults are those that the page and the template say."""
    rules = (ROOT / "curriculum.mk").read_text()
    code = "\n".join(line for line in rules.splitlines() if not line.startswith("#"))
    own = set(re.findall(r"^(?:define )?([A-Z_]+) *:?=", code, re.M)) | {
        "MAKE",
        "MAKEFILE_LIST",
        "MAKEOVERRIDES",
        "MAKE_VERSION",
        "CONFIG",
    }
    read = set(re.findall(r"\$\(([A-Z_]+)[):]", code)) | {"VALID_FILE", "TEST_FILE"}
    defaults = dict(re.findall(r"^([A-Z_]+) \?= *(.*)$", code, re.M))
    page = (ROOT / "docs" / "curriculum.md").read_text()
    explained = {
        row[0].removesuffix(".NAME"): row for row in re.findall(r"^\| `([A-Z_]+(?:\.NAME)?)` \| ([^|]*)", page, re.M)
    }
    assert read - own - {"S", "ALL"} == set(explained)
    template = (ROOT / "examples" / "config.mk").read_text()
    not_of_a_config = {"FORCE", "SUBMIT", "CUDA_VISIBLE_DEVICES", "MODEL_MADE"}
    for name in set(explained) - not_of_a_config:
        assert re.search(rf"^(# )?{name}(\.target)? [:?]=", template, re.M), name
    for name, value in defaults.items():
        if value and name != "MODEL_MADE":
            assert explained[name][1].strip() == value
            assert re.search(rf"^# {name} [:?]= {re.escape(value)}$", template, re.M), name


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("STEPS=2", "drop"),
        ("GRAD_OPTIONS=--weighting none", "drop"),
        ("CARRY=full", ""),
        ("GRAD_OPTIONS=--preconditioner adam", ""),
        ("STORE_OPTIONS=--preconditioner=adam", ""),
        ("TRAIN_OPTIONS=--state keep", "keep"),
    ],
)
def test_the_optimizers_state_is_kept_where_it_is_read(change: str, state: str, tmp_path: Path) -> None:
    shown = BookkeptCurriculum(tmp_path, STAGES=2).make("-n", change).stdout
    lines = re.findall(r"^cropi-train .*", shown, re.M)
    assert len(lines) == 4
    assert [" ".join(re.findall(r"--state (\S+)", line)) for line in lines] == [state] * 4
