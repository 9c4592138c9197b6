"""When a run has diverged, what is kept then, and how it is watched."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from training_runs import SETTINGS, metrics, same_run, train

from cropi_tools.data.errors import CropiError, UsageError
from cropi_tools.policy.loading import load_policy
from cropi_tools.training import loop
from cropi_tools.training.logs import LOGS, Logs, live_note
from cropi_tools.training.trackers import check_trackers, open_trackers
from cropi_tools.training.watch import WINDOW, Watch


def figures(**given: float) -> dict[str, float]:
    usual = {"loss": 0.1, "gradient_norm": 1.0, "reward": 0.5, "entropy": 2.0, "response_tokens": 100.0, "kl": 0.001}
    return {**usual, "accuracy": 0.25, "tokens_trained": 10, **given}


def told(watch: Watch, steps: list[dict[str, float]]) -> list[int]:
    """The steps (from 1) at which a reason to stop is given."""
    return [step for step, found in enumerate(steps, 1) if watch.check(found) is not None]


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "reward"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stops_at_once(name: str, value: float) -> None:
    reason = Watch(0.0).check(figures(**{name: value}))
    assert reason is not None
    assert name.replace("_", " ") in reason
    assert "--learning-rate" in reason


@pytest.mark.parametrize(("name", "word"), [("entropy", "entropy"), ("response_tokens", "length")])
def test_a_collapse_stops_once_a_whole_window_is_low(name: str, word: str) -> None:
    start = figures()[name]
    steps = [figures()] * 8 + [figures(**{name: 0.05 * start})] * (WINDOW - 1)
    watch = Watch(0.05)
    assert told(watch, steps) == []
    assert watch.suspicious(), "the steps themselves look bad before the window is full"
    reason = watch.check(figures(**{name: 0.05 * start}))
    assert reason is not None
    assert word in reason
    assert "--collapse 0" in reason


def test_it_is_the_windows_mean_that_counts() -> None:
    steps = [figures()] * 5 + [figures(entropy=0.0), figures(entropy=0.0)] + [figures()] * 9
    assert told(Watch(0.05), steps) == []


def test_a_policy_that_solved_its_prompts_has_not_collapsed() -> None:
    certain = [figures()] * 5 + [figures(entropy=0.001, response_tokens=1.0, reward=0.9)] * 20
    watch = Watch(0.05)
    assert told(watch, certain) == []
    assert not watch.suspicious()
    assert told(Watch(0.05), [{**found, "reward": 0.5} for found in certain]) != []


def test_no_wish_to_stop_is_none() -> None:
    steps = [figures()] * 5 + [figures(entropy=0.0, reward=0.0, response_tokens=0.0)] * 20
    watch = Watch(0.0)
    assert told(watch, steps) == []
    assert not watch.suspicious()


def test_steps_without_an_update_say_nothing_of_entropy() -> None:
    """No group had variance, so no token went through the policy: entropy stands there as 0."""
    steps = [figures()] * 5 + [figures(entropy=0.0, tokens_trained=0)] * 20
    assert told(Watch(0.05), steps) == []


@pytest.mark.parametrize("cut", [3, 6, 9])
def test_it_looks_on_after_a_resume(cut: int) -> None:
    steps = [figures()] * 5 + [figures(entropy=0.01)] * 10
    whole, first = Watch(0.05), Watch(0.05)
    expected = told(whole, steps)
    told(first, steps[:cut])
    second = Watch(0.05, json.loads(json.dumps(first.state())))
    assert [step + cut for step in told(second, steps[cut:])] == [step for step in expected if step > cut]
    assert expected


def test_a_collapsed_run_keeps_its_last_good_checkpoint(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 7 on the entropy is gone. It ends at step 11 with the checkpoint of step 6, the one of step 8 or 10 never takes its place."""
    plain = loop.Updater.step
    calls: list[int] = []

    def collapsing(self: Any, parts: Any, rate: float) -> dict[str, float]:
        calls.append(1)
        found = plain(self, parts, rate)
        return {**found, "entropy": 1e-6, "tokens_trained": 1.0} if len(calls) > 6 else found

    monkeypatch.setattr(loop.Updater, "step", collapsing)
    monkeypatch.setattr(Watch, "_limit", lambda self, name: 0.01 if name == "entropy" else -math.inf)
    never = f"{Path(__file__).parent.parent / 'parity.py'}:never"
    settings = SETTINGS._replace(steps=20, save_every=2, evaluate_every=99, collapse=0.05)
    with pytest.raises(CropiError) as stopped:
        train(policy_folder, tmp_path / "P1", settings, verifier=never)
    said = str(stopped.value)
    assert "stopped at step" in said
    assert "the policy has collapsed: the entropy per token fell from" in said
    assert "checkpoint-000006, is good" in said
    assert [folder.name for folder in (tmp_path / "P1.part").glob("checkpoint-*")] == ["checkpoint-000006"]
    load_policy(str(tmp_path / "P1.part" / "checkpoint-000006"), "cpu")


def test_records_after_the_commit_are_dropped_torn_lines_too(tmp_path: Path) -> None:
    logs = Logs(tmp_path, {})
    logs.write("metrics.jsonl", {"step": 1})
    sizes = logs.sync()
    logs.write("metrics.jsonl", {"step": 2})
    logs.write("timings.jsonl", {"step": 2})
    logs.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "lo')
    again = Logs(tmp_path, sizes)
    again.write("metrics.jsonl", {"step": 2})
    again.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "timings.jsonl").read_text() == ""


def test_processes_that_do_not_write_leave_no_file(tmp_path: Path) -> None:
    logs = Logs(None, {})
    logs.write("metrics.jsonl", {"step": 1})
    assert logs.sync() == {}
    logs.close()
    assert not any((tmp_path / name).exists() for name in LOGS)


def test_the_live_line() -> None:
    assert live_note(figures(), 12345.0) == "reward 0.50  accuracy 0.25  entropy 2.00  KL 0.001  12.3k tokens/s"
    assert live_note(figures(), 12.4).endswith(" 12 tokens/s")


class Recorder:
    """A stand-in for a tracker's library."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.shown: list[tuple[str, float, int]] = []
        self.closed = 0
        self.fail_at: int | None = None


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Fake `torch.utils.tensorboard` and `wandb` that note what they are told."""
    kept = Recorder()

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            kept.opened.append({"folder": folder, "purge_step": purge_step})

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if kept.fail_at == step:
                raise OSError("no space left")
            kept.shown.append((name, value, step))

        def close(self) -> None:
            kept.closed += 1

    class Run:
        def define_metric(self, *given: Any, **named: Any) -> None:
            pass

        def log(self, found: dict[str, float]) -> None:
            kept.shown += [(name, value, int(found["step"])) for name, value in found.items() if name != "step"]

        def finish(self) -> None:
            kept.closed += 1

    def init(**given: Any) -> Run:
        kept.opened.append(given)
        return Run()

    board, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    board.SummaryWriter, wandb.init = SummaryWriter, init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return kept


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_shows_figures_and_evaluations(name: str, libraries: Recorder, tmp_path: Path) -> None:
    trackers = open_trackers([name], tmp_path / "P1", {"batch": 4}, 0)
    logs = Logs(tmp_path, {}, trackers)
    logs.write("metrics.jsonl", {"step": 1, "loss": 0.5, "note": "text"})
    logs.write("evaluations.jsonl", {"step": 1, "set": "test", "accuracy": 0.25, "prompts": 3})
    logs.close()
    assert libraries.shown == [
        ("metrics/loss", 0.5, 1),
        ("evaluations/test/accuracy", 0.25, 1),
        ("evaluations/test/prompts", 3.0, 1),
    ]
    assert libraries.closed == 1


def test_a_resumed_run_goes_on_in_the_same_place(libraries: Recorder, tmp_path: Path) -> None:
    for step in (0, 7):
        open_trackers(["tensorboard", "wandb"], tmp_path / "P1", {}, step)
    boards, runs = libraries.opened[::2], libraries.opened[1::2]
    assert [found["purge_step"] for found in boards] == [None, 8]
    assert boards[0]["folder"] == boards[1]["folder"] == str(tmp_path / "P1.tensorboard")
    assert runs[0]["id"] == runs[1]["id"]
    assert runs[0]["resume"] == "allow"


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(
    libraries: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    libraries.fail_at = 2
    logs = Logs(tmp_path, {}, open_trackers(["tensorboard"], tmp_path / "P1", {}, 0))
    for step in (1, 2, 3):
        logs.write("metrics.jsonl", {"step": step, "loss": 0.5})
    logs.close()
    assert [step for _, _, step in libraries.shown] == [1]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    warned = capsys.readouterr().err.splitlines()
    assert warned == ["warning: tensorboard failed (OSError: no space left); going on without it"]


def test_a_tracker_that_is_not_there_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="expected tensorboard or wandb"):
        check_trackers(["mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(CropiError, match=f"pip install {name}"):
            check_trackers([name])


def test_a_run_is_the_same_whoever_watches(libraries: Recorder, policy_folder: Path, tmp_path: Path) -> None:
    short = SETTINGS._replace(steps=2)
    train(policy_folder, tmp_path / "plain", short)
    train(policy_folder, tmp_path / "P1", short, trackers=("tensorboard",))
    same_run(tmp_path / "P1", tmp_path / "plain")
    losses = [value for name, value, _ in libraries.shown if name == "metrics/loss"]
    assert losses == [record["loss"] for record in metrics(tmp_path / "P1")]
