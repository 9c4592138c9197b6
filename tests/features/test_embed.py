"""cropi-embed against the hidden states of one plain forward pass a prompt, over families of models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny_policy
import torch
from safetensors import safe_open

from cropi_tools.cli.embed import embed
from cropi_tools.data.features import Features, as_rows, header
from cropi_tools.features.options import EmbedOptions
from cropi_tools.features.run import hidden_states, last_hidden_states
from cropi_tools.runtime.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # outputs of commands that fail
TEXTS = ["1+1=", "7*8=?", "abc", "9", "12345678901234567890", "x,y,z" * 9, "A"]


def write_prompts(path: Path, texts: list[str] = TEXTS) -> Path:
    records = [{"id": f"p{n}", "prompt": text, "answer": "1", "source": "s"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(folder: Path, **options: Any) -> Features:
    given = {
        "prompts": (str(folder / "p.jsonl"),),
        "model": str(folder / "P0"),
        "output": str(folder / "f.safetensors"),
    }
    made = EmbedOptions(**{**given, **options})
    embed(made)
    return Features([made.output])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "p.jsonl")
    tiny_policy.save(tmp_path / "P0")
    return tmp_path


def plain(folder: Path, model: Any) -> np.ndarray:
    """Features by one unpadded pass a prompt."""
    tokenizer = tiny_policy.tokenizer()
    found = []
    for line in (folder / "p.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["prompt"])["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        found.append(torch.cat([states.mean(0), states[-1]]).numpy())
    return np.stack(found)


@pytest.mark.parametrize("limit", [1, 30, 16384])
def test_hidden_states_of_the_prompt(place: Path, limit: int) -> None:
    found = run(place, tokens_per_pass=limit)
    expected = plain(place, tiny_policy.model())
    names = list(found.places)
    assert names == [f"p{number}" for number in range(len(TEXTS))]
    np.testing.assert_allclose(found.rows(names), expected, atol=2e-3)
    # any order, any subset
    np.testing.assert_array_equal(found.rows(["p5", "p0"]), found.rows(names)[[5, 0]])
    with safe_open(place / "f.safetensors", "np") as opened:
        assert opened.get_slice("features").get_shape() == [len(TEXTS), 2 * 32]


def test_shards_and_resuming_give_the_bytes_of_one_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(place / "p.jsonl", [f"{number}+1=" for number in range(50)])
    monkeypatch.setattr("cropi_tools.features.run.PROMPTS_TOGETHER", 8)
    whole = run(place)
    shards = [str(place / f"{shard}.safetensors") for shard in (1, 2, 3)]
    for shard, output in enumerate(shards, 1):
        run(place, shard=(shard, 3), output=output)
    names = list(whole.places)
    together = Features(shards)
    assert list(together.places) == names
    np.testing.assert_allclose(together.rows(names), whole.rows(names), atol=2e-3)

    # a stop after the third group, by a process of its own
    again = {"output": str(place / "again.safetensors")}
    program = """
import sys
from cropi_tools import runtime
from cropi_tools.features import run
run.PROMPTS_TOGETHER, asked = 8, []
def stop():
    asked.append(0)
    if len(asked) == 3:
        runtime.stop_now()
runtime.stop_if_requested = stop
from cropi_tools.cli.embed import main
main()
"""
    words = ["cropi-embed", "--model", str(place / "P0"), str(place / "p.jsonl"), "-o", again["output"]]
    command = [sys.executable, "-c", f"import sys; sys.argv = {words!r}\n{program}"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode != 0
    assert not (place / "again.safetensors").exists()
    assert json.loads((place / "again.safetensors.part.json").read_text())["committed"]["rows"] == 24
    with open(place / "again.safetensors.part", "ab") as stream:
        stream.write(b"torn")
    run(place, **again)
    assert (place / "again.safetensors").read_bytes() == (place / "f.safetensors").read_bytes()
    manifest = json.loads((place / "again.safetensors.manifest.json").read_text())
    assert manifest["ledger"]["tokens_scored"] == sum(len(f"{number}+1=") for number in range(50))


PROMPTS = [[5, 7, 9], [11] * 30, [3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [8, 9]]
QUICK = ("llama", "gpt2", "mistral", "mamba", "phi3 longrope", "mixtral")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(families.FAMILIES)],
)
def test_prompts_together_are_as_each_alone(name: str) -> None:
    """Longer than windows, chunks and the lengths at which rotary frequencies change; padding is no part of any feature."""
    policy = families.policy(name)
    pristine = copy.deepcopy(policy.model)
    found = hidden_states(policy, PROMPTS, 16384)
    for row, prompt in zip(found, PROMPTS, strict=True):
        with torch.no_grad():
            states = last_hidden_states(copy.deepcopy(pristine), torch.tensor([prompt]))[0]
        expected = torch.cat([states.mean(0), states[-1]])
        np.testing.assert_allclose(row, expected, atol=2e-4 * float(expected.abs().max()))


def test_what_does_not_fit_is_refused(place: Path) -> None:
    write_prompts(place / "p.jsonl", ["1" * 300])
    with pytest.raises(InputError, match="300 tokens"):
        run(place)
    assert not (place / "f.safetensors").exists()


def test_values_beyond_float16_become_its_largest(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    values = np.array([[1e6, -1e6, 2.0]])
    path.write_bytes(header(["a"], 3, {"policy": "P", "pooling": "x"}) + as_rows(values))
    np.testing.assert_array_equal(Features([path]).rows(["a"]), [[65504.0, -65504.0, 2.0]])


@pytest.mark.parametrize("names", [["a\nb", "ä", '"', "😀"], ["x"]])
def test_any_id_can_have_features(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "f.safetensors"
    values = np.arange(2.0 * len(names)).reshape(-1, 2)
    path.write_bytes(header(names, 2, {"policy": "P", "pooling": "x"}) + as_rows(values))
    found = Features([path])
    assert list(found.places) == names
    np.testing.assert_array_equal(found.rows(names[::-1]), values[::-1])
