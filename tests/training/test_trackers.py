"""TensorBoard and Weights & Biases: what they are told, and that a run does not hang on them."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_runs import SETTINGS, metrics, same_run, train

from cropi_tools import runtime
from cropi_tools.runtime.errors import CropiError, UsageError
from cropi_tools.training.logs import Logs
from cropi_tools.training.trackers import Tracker, check_trackers, open_trackers

Figure = tuple[str, float, int]
Curves = dict[str, list[tuple[int, float]]]
Shown = Callable[[], Curves]


class Library:
    """What the stand-ins for the two libraries were told. sent: what a kill would not take."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.sent: list[Figure] = []
        self.closed: list[int] = []
        self.fail_at: int | None = None
        self.service: dict[str, dict[str, float]] = {}

    def take(self, figures: list[Figure]) -> None:
        if any(step == self.fail_at for _, _, step in figures):
            raise OSError("no space left\n(at length)")
        self.sent += figures


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    kept = Library()

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            kept.opened.append({"folder": folder, "purge_step": purge_step})
            self.waiting: list[Figure] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.waiting.append((name, value, step))

        def flush(self) -> None:
            kept.take(self.waiting)
            self.waiting = []

        def close(self) -> None:
            kept.closed.append(0)

    class Run:
        """The service keeps a run's last values by its id and gives them to who goes on in it."""

        def __init__(self, id: str) -> None:
            self.summary = kept.service.setdefault(id, {})

        def define_metric(self, *given: Any, **named: Any) -> None:
            pass

        def log(self, found: dict[str, float]) -> None:
            kept.take([(name, value, int(found["step"])) for name, value in found.items()])
            self.summary.update(found)

        def finish(self, exit_code: int) -> None:
            kept.closed.append(exit_code)

    def init(**given: Any) -> Run:
        assert Path(given["dir"]).is_dir()
        kept.opened.append(given)
        return Run(given["id"])

    board, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    wandb.init, wandb.Settings = init, lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return kept


def without_steps(figures: list[Figure]) -> list[Figure]:
    """The figures without the step as a figure."""
    return [figure for figure in figures if figure[0].rpartition("/")[2] != "step"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_shows_figures_and_evaluations(name: str, library: Library, tmp_path: Path) -> None:
    logs = Logs(tmp_path, {}, open_trackers([name, name], tmp_path / "P1", {"batch": 4}, None))
    logs.write("metrics.jsonl", {"step": 1, "loss": 0.5, "kl": 0.0, "note": "text", "whether": True})
    logs.write("evaluations.jsonl", {"step": 1, "set": "test", "accuracy": 0.25, "prompts": 3})
    logs.close()
    assert without_steps(library.sent) == [
        ("metrics/loss", 0.5, 1),
        ("metrics/kl", 0.0, 1),
        ("evaluations/test/accuracy", 0.25, 1),
        ("evaluations/test/prompts", 3.0, 1),
    ]
    assert library.closed == [0]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_times_are_shown_once(name: str, library: Library, tmp_path: Path) -> None:
    """A step that was evaluated has two records of times, and each has 0 for what the other tells."""
    (tracker,) = open_trackers([name], tmp_path / "P1", {}, None)
    tracker.write("timings", {"step": 2, "seconds_sampling": 3.0, "seconds_update": 1.0, "seconds_evaluation": 0.0})
    tracker.write("timings", {"step": 2, "seconds_sampling": 0.0, "seconds_update": 0.0, "seconds_evaluation": 9.0})
    assert without_steps(library.sent) == [
        ("timings/seconds_sampling", 3.0, 2),
        ("timings/seconds_update", 1.0, 2),
        ("timings/seconds_evaluation", 9.0, 2),
    ]


def test_a_new_run_is_opened_with_its_options(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    open_trackers(["wandb"], tmp_path / "P1", {"batch": 4}, None)
    monkeypatch.setenv("WANDB_PROJECT", "curricula")
    monkeypatch.setattr(runtime, "_quiet", True)
    open_trackers(["wandb"], tmp_path / "P2", {}, None)
    first, second = library.opened
    assert (first["project"], second["project"]) == ("cropi-tools", "curricula")
    assert first["config"] == {"batch": 4}
    assert first["name"] == str(tmp_path / "P1")
    assert first["id"] != second["id"]
    assert (first["settings"], second["settings"]) == ({"silent": False}, {"silent": True})


def test_a_resumed_run_goes_on_in_the_same_place_and_a_new_one_does_not(library: Library, tmp_path: Path) -> None:
    for step in (None, 0, 7, None):
        open_trackers(["tensorboard", "wandb"], tmp_path / "P1", {}, step)
    boards, runs = library.opened[::2], library.opened[1::2]
    assert [found["purge_step"] for found in boards] == [0, 1, 8, 0]
    assert {found["folder"] for found in boards} == {str(tmp_path / "P1.tensorboard")}
    first, *resumed, anew = [found["id"] for found in runs]
    assert resumed == [first, first]
    assert anew != first
    assert {found["resume"] for found in runs} == {"allow"}


def test_steps_that_are_made_again_are_not_sent_again(library: Library, tmp_path: Path) -> None:
    """Steps 3 and 4 were shown and not saved. The evaluation of step 2, put off by a signal, was not shown."""
    for committed, steps in ((None, (1, 2, 3, 4)), (2, (3, 4, 5))):
        (tracker,) = open_trackers(["wandb"], tmp_path / "P1", {}, committed)
        if committed:
            tracker.write("evaluations", {"step": 2, "set": "test", "accuracy": 0.5})
        for step in steps:
            tracker.write("metrics", {"step": step, "loss": 0.5})
    assert [step for name, _, step in library.sent if name == "metrics/loss"] == [1, 2, 3, 4, 5]
    assert [step for name, _, step in library.sent if name == "evaluations/test/accuracy"] == [2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_fails_is_left_out_and_training_goes_on(
    name: str, library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library.fail_at = 2
    logs = Logs(tmp_path, {}, open_trackers([name], tmp_path / "P1", {}, None))
    for step in (1, 2, 3):
        logs.write("metrics.jsonl", {"step": step, "loss": 0.5})
    logs.close()
    assert {step for _, _, step in library.sent} == {1}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    warned = capsys.readouterr().err.splitlines()
    assert warned == [f"warning: {name} failed (OSError: no space left); going on without it"]


def test_a_run_that_broke_off_is_not_shown_as_finished(library: Library, tmp_path: Path) -> None:
    with pytest.raises(CropiError), Logs(tmp_path, {}, open_trackers(["wandb"], tmp_path / "P1", {}, None)):
        raise CropiError("the engine failed")
    assert library.closed == [1]


def test_a_tracker_that_is_not_there_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="expected tensorboard or wandb"):
        check_trackers(["mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(CropiError, match=f"pip install {name}"):
            check_trackers([name])


def test_one_that_does_not_open_is_told_in_a_line(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**given: Any) -> None:
        raise ValueError("no API key.\nFind one in your browser here")

    monkeypatch.setattr(sys.modules["wandb"], "init", refused)
    with pytest.raises(CropiError) as told:
        open_trackers(["wandb"], tmp_path / "P1", {}, None)
    assert str(told.value) == "--track wandb: cannot be opened (ValueError: no API key.)"


def test_a_run_is_the_same_whoever_watches(library: Library, policy_folder: Path, tmp_path: Path) -> None:
    short = replace(SETTINGS, steps=2)
    train(policy_folder, tmp_path / "plain", short)
    train(policy_folder, tmp_path / "P1", short, trackers=("tensorboard",))
    same_run(tmp_path / "P1", tmp_path / "plain")
    losses = [value for name, value, _ in library.sent if name == "metrics/loss"]
    assert losses == [record["loss"] for record in metrics(tmp_path / "P1")]


class TestTensorBoardItself:
    """Written by one process after another, read back by TensorBoard."""

    @pytest.fixture
    def shown(self, tmp_path: Path) -> Shown:
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

        def read() -> Curves:
            found = events.EventAccumulator(str(tmp_path / "P1.tensorboard"), size_guidance={"scalars": 0})
            found.Reload()
            return {
                name: [(point.step, point.value) for point in found.Scalars(name)]
                for name in found.Tags()["scalars"]
                if found.Scalars(name)
            }

        return read

    def track(self, path: Path, committed: int | None, work: Callable[[Tracker], None]) -> None:
        """In a process that is killed at the end of the work."""
        child = os.fork()
        if child == 0:
            work(open_trackers(["tensorboard"], path, {}, committed)[0])
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    def test_a_kill_takes_nothing_and_no_step_is_doubled(self, tmp_path: Path, shown: Shown) -> None:
        def steps(first: int, last: int, evaluated: bool = False) -> Callable[[Tracker], None]:
            def work(tracker: Tracker) -> None:
                if evaluated:
                    tracker.write("evaluations", {"step": 0, "set": "test", "accuracy": 0.25})
                for step in range(first, last + 1):
                    tracker.write("metrics", {"step": step, "loss": step / 2})

            return work

        def expected(last: int) -> Curves:
            losses = [(step, step / 2) for step in range(1, last + 1)]
            return {"evaluations/test/accuracy": [(0, 0.25)], "metrics/loss": losses}

        self.track(tmp_path / "P1", None, steps(1, 3, True))
        assert shown() == expected(3)
        self.track(tmp_path / "P1", 0, steps(1, 5))  # killed before the first checkpoint of weights
        assert shown() == expected(5)
        self.track(tmp_path / "P1", 2, steps(3, 6))
        assert shown() == expected(6)
        self.track(tmp_path / "P1", None, steps(1, 2, True))  # another run under the same name
        assert shown() == expected(2)

    def test_a_full_disk_costs_the_figures_and_not_the_run(self, tmp_path: Path, shown: Shown) -> None:
        said = tmp_path / "said"

        def work(tracker: Tracker) -> None:
            import resource
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            sys.stderr = open(said, "w")
            for step in range(1, 100):
                tracker.write("metrics", {"step": step, "loss": 0.5})
            tracker.close()
            sys.stderr.flush()

        self.track(tmp_path / "P1", None, work)
        warned = [line for line in said.read_text().splitlines() if line.startswith("warning: ")]
        assert len(warned) == 1
        assert "tensorboard failed (OSError: [Errno 27] File too large" in warned[0]
        assert 5 < len(shown()["metrics/loss"]) < 99
