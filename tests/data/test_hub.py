"""Policies by name: downloaded once, whole, and only what is a policy's; without a network from the cache; every refusal one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import torch
from fake_hub import FakeHub
from safetensors.torch import save_file

from cropi_tools.data.policies import OPTIMIZER_STATE, policy_input
from cropi_tools.options import POLICY, described

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"
DRIVER = """
import sys
from cropi_tools.runtime.errors import CropiError
from cropi_tools.data.hub import policy_folder
try:
    print(policy_folder(sys.argv[1], **dict.fromkeys(sys.argv[2:], True)))
except CropiError as error:
    sys.exit(str(error))
assert "torch" not in sys.modules
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub.running() as running:
        yield running


@pytest.fixture
def model(policy_folder: Path, tmp_path: Path) -> Path:
    """The tiny policy with everything around it that a hub's repository may hold and nobody needs."""
    folder = shutil.copytree(policy_folder, tmp_path / "upstream")
    for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors", "m.gguf", "modeling.py"):
        (folder / name).write_text("not wanted")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_text("not wanted")
    return folder


class Caller:
    """Asks for a folder in a process of its own, as a command does: the library reads its environment when it is imported."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def start(self, at: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            cwd=self.home,
            env={**known, "HF_ENDPOINT": at, "HF_HOME": str(self.home / "hf"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, at: str, *words: str, **environment: str) -> Path:
        out, said = (process := self.start(at, *words, **environment)).communicate(timeout=60)
        assert process.returncode == 0, said
        return Path(out.strip())

    def refused(self, at: str, *words: str, **environment: str) -> str:
        """The line with which it is refused, which comes within seconds."""
        began = time.monotonic()
        out, said = (process := self.start(at, *words, **environment)).communicate(timeout=60)
        assert (process.returncode, out, said.count("\n")) == (1, "", 1), said
        assert said.startswith(f"{words[0]}: ")
        assert time.monotonic() - began < 12
        return said


@pytest.fixture
def call(tmp_path: Path) -> Caller:
    return Caller(tmp_path)


def test_a_model_is_downloaded_once_and_only_what_is_the_policy(
    hub: FakeHub, model: Path, policy_folder: Path, call: Caller
) -> None:
    hub.put("org/tiny", model)
    found = call(hub.url, "org/tiny")
    assert hub.downloads == sorted(path.name for path in policy_folder.iterdir())
    assert (found / "model.safetensors").is_symlink()
    # what the cache links to is hashed as the files of a folder are
    assert policy_input(found).sha256 == policy_input(policy_folder).sha256 == policy_input(model).sha256
    asked = len(hub.requests)
    assert (
        call(hub.url, "org/tiny") == call(NOWHERE, "org/tiny") == call(NOWHERE, "org/tiny", HF_HUB_OFFLINE="1") == found
    )
    assert len(hub.requests) == asked


def test_a_name_stays_the_revision_that_it_was_and_others_are_named(
    hub: FakeHub, policy_folder: Path, call: Caller
) -> None:
    first = hub.put("org/tiny", policy_folder)
    found = call(hub.url, "org/tiny")
    newer = shutil.copytree(policy_folder, call.home / "newer")
    (newer / "generation_config.json").write_text('{"eos_token_id": 2}')
    second = hub.put("org/tiny", newer)
    hub.put("org/tiny", newer, "branch/two")
    assert found.name == first
    assert call(hub.url, "org/tiny") == call(hub.url, f"org/tiny@{first}") == found
    assert call(hub.url, f"org/tiny@{second}").name == call(NOWHERE, f"org/tiny@{second}").name == second
    assert call(hub.url, "org/tiny@branch/two").name == call(NOWHERE, "org/tiny@branch/two").name == second


def test_what_stands_there_is_meant(hub: FakeHub, policy_folder: Path, call: Caller) -> None:
    hub.put("org/tiny", policy_folder)
    (call.home / "org" / "tiny").mkdir(parents=True)
    for word in ("org/tiny", "org/tiny/", "./org/none", "none", "a/b/c", "/org/none", "org/none/"):
        assert call(hub.url, word) == Path(word)
    assert hub.requests == []


def test_refusals_are_one_line_and_come_soon(hub: FakeHub, policy_folder: Path, call: Caller) -> None:
    commit = hub.put("org/tiny", policy_folder)
    hub.gated.add("org/gated")
    assert "no such folder, and no model at" in call.refused(hub.url, "org/none")
    assert "asks for consent" in call.refused(hub.url, "org/gated")
    assert "no revision nope" in call.refused(hub.url, "org/tiny@nope")
    assert "no name of a model" in call.refused(hub.url, "org/a--b")
    for word in ("org/tiny", f"org/tiny@{commit}"):
        assert "not in the cache" in call.refused(NOWHERE, word)
        assert "HF_HUB_OFFLINE" in call.refused(hub.url, word, HF_HUB_OFFLINE="1")
    hub.status = 503
    assert "503" in call.refused(hub.url, "org/tiny")
    hub.status, hub.lost = None, "model.safetensors"
    process = call.start(hub.url, "org/tiny")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("org/tiny: the download broke off (404 Client Error")
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_download_that_was_killed_goes_on(number: int, hub: FakeHub, policy_folder: Path, call: Caller) -> None:
    hub.put("org/tiny", policy_folder)
    hub.stall = "model.safetensors"
    process = call.start(hub.url, "org/tiny")
    assert hub.stalled.wait(30)
    while len(hub.downloads) < len(list(policy_folder.iterdir())):
        time.sleep(0.05)
    time.sleep(0.5)  # the small files are on their way
    process.send_signal(number)
    out, said = process.communicate(timeout=5)
    ends = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
    assert (process.returncode, out) == (ends[signal.Signals(number)], "")
    assert number == signal.SIGKILL or "org/tiny: stopped" in said.splitlines()[-1]
    # half of a policy is none
    assert "only a part of it" in call.refused(NOWHERE, "org/tiny")
    hub.stall, hub.requests[:] = None, []
    found = call(hub.url, "org/tiny")
    assert hub.downloads == ["model.safetensors"]
    assert policy_input(found).sha256 == policy_input(policy_folder).sha256


def test_a_copy_that_another_program_made_serves_without_a_network(
    hub: FakeHub, policy_folder: Path, call: Caller
) -> None:
    """Nothing says then whether it is whole: with a network it is completed, without one it is taken."""
    commit = hub.put("org/tiny", policy_folder)
    cache = call.home / "hf" / "hub" / "models--org--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(policy_folder / "config.json", cache / "snapshots" / commit)
    assert call(NOWHERE, "org/tiny") == call(NOWHERE, "org/tiny", HF_HUB_OFFLINE="1") == cache / "snapshots" / commit
    assert call(hub.url, "org/tiny") == cache / "snapshots" / commit
    assert "config.json" not in hub.downloads
    assert policy_input(cache / "snapshots" / commit).sha256 == policy_input(policy_folder).sha256


def test_models_without_weights_that_are_read_here(hub: FakeHub, policy_folder: Path, call: Caller) -> None:
    for name in ("model.bin", "model.gguf", "notes.md"):
        folder = call.home / name.replace(".", "-")
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).write_text("")
        hub.put(f"org/{folder.name}", folder)
    pickled = call.refused(hub.url, "org/model-bin")
    assert "as model.bin" in pickled
    assert "from_pretrained('org/model-bin')" in pickled
    assert "from_pretrained('org/model-gguf', revision='main', gguf_file='model.gguf'" in call.refused(
        hub.url, "org/model-gguf@main"
    )
    assert "no .safetensors weights" in call.refused(hub.url, "org/notes-md")
    assert hub.downloads == []


def test_the_optimizer_comes_when_it_is_asked_for(hub: FakeHub, policy_folder: Path, call: Caller) -> None:
    folder = shutil.copytree(policy_folder, call.home / "trained")
    (folder / "state").mkdir()
    save_file({"step/x": torch.zeros(1)}, folder / OPTIMIZER_STATE)
    hub.put("org/trained", folder)
    assert not (call(hub.url, "org/trained") / OPTIMIZER_STATE).exists()
    assert (call(hub.url, "org/trained", "optimizer") / OPTIMIZER_STATE).exists()
    assert (call(NOWHERE, "org/trained", "optimizer") / OPTIMIZER_STATE).exists()


def options_for_policies() -> list[tuple[str, str]]:
    """Every option that takes a policy, by command; those that name another folder are outputs."""
    found = []
    for page in sorted((ROOT / "docs" / "commands").glob("*.md")):
        name = page.stem.removeprefix("cropi-")
        for field, option in described(import_module(f"cropi_tools.cli.{name}").main.record).items():
            if option.metavar == POLICY:
                found.append((name, option.flag))
            assert option.metavar != "FOLDER" or field == "output", f"{option.flag}: a policy's metavar is {POLICY}"
    assert len(found) == 8
    return found


LINES: dict[str, list[str]] = {
    "rollout": ["p.jsonl", "-o", "out.jsonl"],
    "grad": ["p.jsonl", "--mean", "-o", "out.safetensors"],
    "embed": ["p.jsonl", "-o", "out.safetensors"],
    "verify": ["p.jsonl", "-o", "out.jsonl"],
    "train": ["p.jsonl", "--steps", "1", "--kl", "1", "-o", "out"],
}


@pytest.mark.parametrize("command", options_for_policies())
def test_every_option_for_a_policy_takes_a_name(
    command: tuple[str, str],
    policy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    record = {"id": "a", "prompt": "1+1=", "answer": "2", "source": "s", "samples": []}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    name, option = command
    given = {"--model": str(policy_folder), option: "org/tiny@v1"}
    words = [word for pair in given.items() for word in pair]
    monkeypatch.setattr(sys, "argv", [f"cropi-{name}", *words, *LINES[name]])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            import_module(f"cropi_tools.cli.{name}").main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("\n") == 1
    assert f"cropi-{name}: org/tiny@v1: no such folder, not in the cache" in said


@pytest.mark.slow
def test_a_pipeline_by_name_is_that_of_the_folder(
    hub: FakeHub, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    import tiny_policy

    hub.put("org/tiny", policy_folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(4))
    sampled = ("p.jsonl", "-n", "4", "--max-tokens", "4", "--verifier", f"{ROOT / 'tests' / 'parity.py'}:reward")
    for model, made in (("org/tiny", "name"), (policy_folder, "folder")):
        run("cropi-rollout", "--model", model, *sampled, "-o", f"{made}.jsonl")
        hub.status = 503  # from now on the cache will do
        assert "up to date" in run("cropi-rollout", "--model", model, *sampled, "-o", f"{made}.jsonl").stderr
        run("cropi-rollout", "--model", model, *sampled, "--dry-run")
        run("cropi-grad", "--model", model, f"{made}.jsonl", "--behavior", model, "--mean", "-o", f"{made}.safetensors")
        train = ("p.jsonl", "--steps", "1", "--batch", "2", "--kl", "0.1", *sampled[1:])
        run("cropi-train", "--model", model, *train, "--reference", model, "-o", f"{made}.policy")
    for ending in (".jsonl", ".policy/model.safetensors", ".policy/tokenizer.json"):
        assert (tmp_path / f"name{ending}").read_bytes() == (tmp_path / f"folder{ending}").read_bytes()
    # made under one name it is up to date under the other
    assert "up to date" in run("cropi-rollout", "--model", "org/tiny", *sampled, "-o", "folder.jsonl").stderr
