"""The script that does what waits for a GPU: its small form on a CPU, and what becomes of parts that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GOAL = {"name": "fast", "value": 2.0, "goal": 1.0, "met": True, "peer": "a peer", "device": "a device"}
SCRIPTS = {
    "good": f"import sys; print('said'); sys.stderr.write('100%'); print('''{json.dumps(GOAL)}''')",
    "raises": "import sys; print(1); raise ValueError('no such thing')",
    "silent": "",
    "hangs": """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("began", flush=True)
time.sleep(600)
""",
}
TESTS = """<testsuites><testsuite><testcase name="right"/>
<testcase name="wrong"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase name="one"><skipped message="needs a CUDA device"/></testcase>
<testcase name="other"><skipped message="needs a CUDA device"/></testcase></testsuite></testsuites>"""


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import on_gpu

    return on_gpu


@pytest.fixture
def parts(on_gpu: ModuleType, tmp_path: Path) -> list[Any]:
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    return [
        on_gpu.Part(name, f"{tmp_path / name}.py", str(tmp_path / "pid"), str(tmp_path / "pid"), limit)
        for name, limit in (("raises", 20), ("hangs", 1), ("silent", 20), ("good", 20))
    ]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for a process in /proc")
def test_a_part_that_fails_is_told_and_stops_no_other(on_gpu: ModuleType, parts: list[Any], tmp_path: Path) -> None:
    assert on_gpu.run(parts, True, tmp_path / "found.json") == ["raises", "hangs", "silent"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["finished"], found["failed"]) == (True, ["raises", "hangs", "silent"])
    raised, hung, silent, good = found["parts"]
    assert raised["error"] == "exit 1: ValueError: no such thing"
    assert hung["error"] == "stopped after 1 s; began"
    assert not alive(int((tmp_path / "pid").read_text()))
    assert silent["error"] == "exit 0: it printed nothing"
    assert (good["status"], good["goals"]) == ("ok", [GOAL])
    assert "error" not in good


def test_no_part_begins_after_the_whole_time(on_gpu: ModuleType, parts: list[Any], tmp_path: Path) -> None:
    assert on_gpu.run(parts, True, tmp_path / "found.json", whole=0.0) == ["raises", "hangs", "silent", "good"]
    assert {part["error"] for part in json.loads((tmp_path / "found.json").read_text())["parts"]} == {
        "no time was left"
    }


def test_the_exit_status_says_whether_a_part_failed(
    on_gpu: ModuleType, parts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--small", "-o", str(tmp_path / "found.json")])
    for some, code in ((parts[-1:], 0), (parts[::3], 1)):
        monkeypatch.setattr(on_gpu, "PARTS", some)
        with pytest.raises(SystemExit) as ended:
            on_gpu.main()
        assert ended.value.code == code


def test_tests_are_counted(on_gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(TESTS)
    assert on_gpu.tests(tmp_path / "tests.xml") == {
        "passed": 1,
        "failed": 1,
        "errors": 0,
        "skipped": 2,
        "reasons": ["wrong: assert 1 == 2", "needs a CUDA device"],
    }
    assert on_gpu.tests(tmp_path / "none.xml") == {}


def test_all_parts_together_take_less_than_eight_minutes(on_gpu: ModuleType) -> None:
    assert on_gpu.WHOLE < 480
    assert max(part.limit for part in on_gpu.PARTS) < on_gpu.WHOLE


@pytest.mark.slow
def test_the_small_form_runs_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "benchmarks" / "on_gpu.sh", "--small", "-o", tmp_path / "small.json"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "small.json").read_text())
    assert (found["small"], found["finished"], found["failed"]) == (True, True, [])
    assert found["device"]
    assert {"date", "revision", "seconds"} < set(found)
    assert found["versions"]["torch"]
    assert {"cuda", "triton"} < set(found["versions"])
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == ["tests", "kernels", "gradients-135m-short", "grpo", "decoding"]
    assert all(part["status"] == "ok" and part["seconds"] > 0 for part in parts.values())
    counted = parts.pop("tests")["tests"]
    assert counted["skipped"] or counted["passed"]
    assert not counted["failed"]
    for part in parts.values():
        assert all({"name", "value", "goal", "met", "device"} < set(goal) for goal in part["goals"])
    assert {goal["name"] for goal in parts["grpo"]["goals"]} == {"grpo-step-full-work", "grpo-step-memory"}
    assert "cropi-grad" in parts["gradients-135m-short"]["goals"][0]["seconds"]
    assert parts["kernels"]["goals"][0]["bytes_per_second"]["torch float32 512"] > 0
