"""How a run ends when something breaks: one clear error, the last good checkpoint kept, and the same command resumes."""

from __future__ import annotations

import errno
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import PARITY, SETTINGS, metrics, same_run, train

from cropi_tools.policy.loading import load_policy
from cropi_tools.runtime.errors import CropiError, InputError
from cropi_tools.training import checkpoints, update
from cropi_tools.training.run import check_lengths
from cropi_tools.training.update import Updater

VERIFIERS = PARITY.rpartition(":")[0]
EVERY = replace(SETTINGS, save_every=2, eval_every=9)


def test_a_failed_engine_ends_the_run_and_the_same_command_goes_on(policy_folder: Path, tmp_path: Path) -> None:
    train(policy_folder, tmp_path / "whole", EVERY)
    with pytest.raises(CropiError) as failed:
        train(policy_folder, tmp_path / "P1", EVERY, fail_at=4)
    told = str(failed.value)
    assert "the engine failed at step 4 (RuntimeError: EngineCore encountered an issue" in told
    assert "checkpoint-000002, is good, the same command resumes from there" in told
    trace = (tmp_path / "P1.part" / "failure.txt").read_text()
    assert "Traceback" in trace
    load_policy(str(tmp_path / "P1.part" / "checkpoint-000002"), "cpu")
    train(policy_folder, tmp_path / "P1", EVERY)
    same_run(tmp_path / "P1", tmp_path / "whole")


def test_a_reward_that_is_no_number_names_its_prompt(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompt 'p\d+'.*return a finite number"):
        train(policy_folder, tmp_path / "P1", EVERY, verifier=f"{VERIFIERS}:not_a_number")


def test_some_crashes_of_a_verifier_are_counted_and_cost_their_reward(policy_folder: Path, tmp_path: Path) -> None:
    train(policy_folder, tmp_path / "P1", EVERY, verifier=f"{VERIFIERS}:sometimes_dies")
    lost = [record["unverified_fraction"] for record in metrics(tmp_path / "P1")]
    assert 0 < max(lost) < 1


class TestOutOfMemory:
    """A micro-batch above a number of tokens does not fit, as on a GPU that is nearly full."""

    @pytest.fixture(params=["cuda", "cpu"])
    def small(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        plain, tried = update.response_logprobs, []
        errors = {
            "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        }

        def fitting(model: Any, batch: Any, *given: Any) -> Any:
            tried.append(batch.input_ids.numel())
            if batch.input_ids.numel() > self.limit:
                raise errors[request.param]
            return plain(model, batch, *given)

        monkeypatch.setattr(update, "response_logprobs", fitting)
        return tried

    limit = 60

    def test_the_micro_batch_is_halved_and_the_run_goes_on(
        self, small: list[int], policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(policy_folder, tmp_path / "P1", replace(EVERY, tokens_per_pass=512))
        said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
        assert said[0] == "warning: out of memory: going on with 256 tokens in a pass"
        assert len(said) == len(set(said)) < 5, "it is remembered from step to step"
        assert max(small) > self.limit
        assert len(metrics(tmp_path / "P1")) == 6

    def test_a_single_response_that_does_not_fit_ends_the_run(
        self, small: list[int], policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TestOutOfMemory, "limit", 3)
        with pytest.raises(CropiError, match=r"single response in a pass, of \d+ tokens .*--max-tokens"):
            train(policy_folder, tmp_path / "P1", EVERY)

    def test_other_errors_are_not_taken_for_it(
        self, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*given: Any) -> Any:
            raise RuntimeError("shapes do not match")

        monkeypatch.setattr(update, "response_logprobs", broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            train(policy_folder, tmp_path / "P1", EVERY)


def test_halved_gradients_are_whole(policy_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was added before memory ran out is not added twice."""
    plain, failed = Updater._pass, []

    def once(self: Updater, part: Any) -> dict[str, float]:
        found = plain(self, part)
        if not failed and self.tokens_per_pass == 40:
            failed.append(True)
            raise torch.OutOfMemoryError("after the backward pass")
        return found

    train(policy_folder, tmp_path / "whole", replace(EVERY, steps=1, tokens_per_pass=20))
    monkeypatch.setattr(Updater, "_pass", once)
    train(policy_folder, tmp_path / "P1", replace(EVERY, steps=1, tokens_per_pass=40))
    assert failed
    found, expected = (metrics(tmp_path / name) for name in ("P1", "whole"))
    assert found == expected


def test_a_full_disk_keeps_the_last_checkpoint(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = checkpoints.save_file

    def full(tensors: Any, path: Path) -> None:
        if "checkpoint-000004" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(tensors, path)

    train(policy_folder, tmp_path / "whole", EVERY)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(CropiError, match=r"checkpoint-000004: cannot be written \(.*No space left.*make room"):
            train(policy_folder, tmp_path / "P1", EVERY)
    left = sorted(folder.name for folder in (tmp_path / "P1.part").glob("checkpoint-*"))
    assert left == ["checkpoint-000002"], "the room of what could not be written is given back"
    train(policy_folder, tmp_path / "P1", EVERY)
    same_run(tmp_path / "P1", tmp_path / "whole")


def test_files_that_may_not_grow_end_the_run(policy_folder: Path, tmp_path: Path) -> None:
    """The same by the kernel: no file may be larger than the weights."""
    size = (policy_folder / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
    try:
        with pytest.raises(
            CropiError, match=r"checkpoint-000002: cannot be written .*no step was saved yet.*make room"
        ):
            train(policy_folder, tmp_path / "P1", EVERY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_prompt_that_leaves_no_room_for_a_response_is_named(policy_folder: Path) -> None:
    policy = load_policy(str(policy_folder), "cpu")
    records = [{"id": "short", "prompt": "1+2="}, {"id": "long", "prompt": "1" * 200}]
    check_lengths(policy, records, 56)
    with pytest.raises(
        InputError, match="prompt 'long': its 200 tokens and --max-tokens 57 are more than the 256 positions"
    ):
        check_lengths(policy, records, 57)


@pytest.mark.parametrize("kind", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    (tmp_path / "checkpoint-000001" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint-000001" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoint-000001" / "state" / "state.json").write_bytes(b"{}")

    def refuse(*names: object) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(os, "link", refuse)
    checkpoints.promote(tmp_path, tmp_path / "checkpoint-000001")
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "state" / "state.json").read_bytes() == b"{}"
