"""More shards than prompts: what one command writes, the next one reads, as long as the shards together hold something."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_policy

from cropi_tools.data.external_rollouts import text_rollouts
from cropi_tools.data.records import read_prompts, read_rollouts, read_scores
from cropi_tools.runtime.errors import InputError

PARITY = f"{Path(__file__).parent.parent / 'parity.py'}:reward"
RECORDS: dict[Any, dict[str, Any]] = {
    read_prompts: {"id": "a", "prompt": "q", "answer": "1", "source": "s"},
    read_rollouts: {"id": "a", "source": "s", "prompt_token_ids": [1], "samples": [{"token_ids": [1], "reward": 1}]},
    read_scores: {"id": "a", "source": "s", "scores": None, "pass_rate": 0.5, "status": "ok"},
    text_rollouts: {"id": "a", "prompt": "q", "answer": "1", "responses": ["1"], "rewards": [1]},
}


@pytest.mark.parametrize("read", RECORDS, ids=lambda read: read.__name__)
def test_every_reader_takes_them(read: Any, tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text("")
    (tmp_path / "2.jsonl").write_text(json.dumps(RECORDS[read]) + "\n")
    empty, full = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    for files in ([empty, full], [full, empty], [empty, full, empty]):
        assert len(list(read(files))) == 1
    with pytest.raises(InputError, match=r"1\.jsonl: holds no record"):
        list(read([empty]))
    with pytest.raises(InputError, match=r"1\.jsonl, .*1\.jsonl: hold no record"):
        list(read([empty, empty]))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a command that fails leaves files to its process's end
def test_a_chain_of_three_shards_of_two_prompts(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that reads rollouts, stores or scores, with the first shard empty; a library's warning fails the test."""
    tiny_policy.write_jsonl(tmp_path / "p.jsonl", tiny_policy.prompts(2))
    tiny_policy.write_jsonl(tmp_path / "v.jsonl", tiny_policy.prompts(2, start=50))
    sampling = ("--model", policy_folder, "-n", 6, "--max-tokens", 6, "--verifier", PARITY, "--device", "cpu")
    three = (1, 2, 3)

    monkeypatch.chdir(tmp_path)

    def call(name: str, *words: object, code: int = 0) -> str:
        """A command, in this process."""
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        command = importlib.import_module(f"cropi_tools.cli.{name.removeprefix('cropi-')}")
        with pytest.raises(SystemExit) as ended:
            command.main()
        said = capsys.readouterr().err
        assert ended.value.code == code, (name, words, said)
        return said

    for name in ("p", "v"):
        for i in three:
            call("cropi-rollout", f"{name}.jsonl", *sampling, "--shard", f"{i}/3", "-o", f"{name}{i}.jsonl")
    assert (tmp_path / "p1.jsonl").read_text() == (tmp_path / "v1.jsonl").read_text() == ""
    p, v = ([f"{name}{i}.jsonl" for i in three] for name in ("p", "v"))
    grad = ("cropi-grad", "--model", policy_folder, "--device", "cpu")
    call(*grad, *v, "--mean", "--halves", "-o", "mean.safetensors")
    against = ("--against", "t=mean.safetensors", "--halves")
    for i in three:
        call(*grad, *p, "--shard", f"{i}/3", *against, "--dim", 1024, "-o", f"p{i}.zarr")
        call(*grad, *v, "--shard", f"{i}/3", "--dim", 1024, "-o", f"v{i}.zarr")
        call("cropi-score", f"p{i}.zarr", "-o", f"s{i}.jsonl")
    call(*grad, *p, "--shard", "1/3", *against, "--method", "jvp", "-o", "j1.zarr")
    stores, scores = [f"p{i}.zarr" for i in three], [f"s{i}.jsonl" for i in three]
    valid = [word for i in three for word in ("--valid", f"t=v{i}.zarr")]
    for words in ([], valid, [*valid, "--each"], [word for store in stores for word in ("--norms", store)]):
        assert "2 of 2 prompts have a score" in call("cropi-score", *stores, *words, "--force", "-o", "s.jsonl")
    call("cropi-score", *stores, "--reliability")
    assert "none of its prompts has a gradient" in call("cropi-score", *stores, "--valid", "t=v1.zarr", code=1)
    pools = [word for file in p for word in ("--prompts", file)]
    assert "1 of 2 prompts selected" in call("cropi-select", *pools, *scores, "--ratio", 0.5, "-o", "chosen.jsonl")
    assert "s1.jsonl: holds no record" in call("cropi-select", *pools, "s1.jsonl", "--ratio", 0.5, code=1)
    call("cropi-project", "p1.zarr", "--dim", 512, "-o", "small.zarr")
    call("cropi-project", "p1.zarr", "--check")
    call("cropi-verify", *p, "--verifier", "exact", "-o", "again.jsonl")
    assert "p1.jsonl: holds no record" in call("cropi-verify", "p1.jsonl", "-o", "x.jsonl", code=1)
    refresh = [word for file in p for word in ("--refresh", file)]
    index = [word for store in stores for word in ("--index", store)]
    call("cropi-rollout", *sampling, *refresh, "--where", "all", "-o", "anew.jsonl")
    call("cropi-rollout", *sampling, *refresh, "--where", "low-ess=1", *index, "-o", "drifted.jsonl")
    call("cropi-train", *p, *sampling, "--steps", 1, "--batch", 2, "-o", "P1")
