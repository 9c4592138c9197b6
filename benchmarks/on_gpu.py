"""What waits for a GPU, but for vLLM and several GPUs: the tests that need one, and benchmarks without figures yet. Called by on_gpu.sh.

Each part is a command in processes of its own with a time limit of its own; whatever becomes of it, the others still run. A part has
failed if its command ends with an error, passes its limit, or prints no result; its last line stands in the JSON then. A goal that is
missed is a figure, not a failure. The JSON is written anew after each part, so that a run that is cut off leaves what it has. Exit status:
0, or 1 if a part failed.

* tests: `pytest -m gpu tests/gpu`, counted.
* kernels: gpu_sketch.py, Triton's kernels and torch's against a device copy.
* gradients of the shapes of SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-1.5B: gradient.py, random weights in bfloat16, sketch and products:
  their share of the backward pass, and the most memory held. Of the first also with responses so short that several prompts share a pass.
* grpo: grpo_step.py, a step of cropi-train against one of TRL's trainer.
* decoding: decoding.py, the loop and the logits processor against plain `generate`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from goals import processor

ROOT = Path(__file__).parent.parent
WHOLE = 465.0  # seconds of all parts together
LINES_KEPT = 40  # of what a part that failed has printed
PACKAGES = ("torch", "triton", "transformers", "trl", "numpy")


class Part(NamedTuple):
    """A command: the words after the interpreter, and after these the ones of a GPU or of the small form (None: not in it); seconds at most."""

    name: str
    command: str
    on_gpu: str
    small: str | None
    limit: float


GRADIENTS = "benchmarks/gradient.py --json"
ON_GPU = "--device cuda --dtype bfloat16 --rounds 3"
PARTS = (
    Part("tests", "-m pytest -m gpu tests/gpu -q -p no:cacheprovider", "-n 4", "", 150),
    Part("kernels", "benchmarks/gpu_sketch.py --json", "", "--device cpu --size 100000 --dims 512 --rounds 2", 90),
    Part("gradients-135m", GRADIENTS, f"--shape 135m {ON_GPU}", None, 45),
    Part("gradients-135m-short", GRADIENTS, f"--shape 135m --tokens 16 {ON_GPU}", "--tokens 8 --rounds 1", 80),
    Part("gradients-0.5b", GRADIENTS, f"--shape 0.5b {ON_GPU}", None, 60),
    Part("gradients-1.5b", GRADIENTS, f"--shape 1.5b {ON_GPU}", None, 80),
    Part(
        "grpo",
        "benchmarks/grpo_step.py --json --rounds 1",
        "--device cuda --steps 3 --tokens 128",
        "--small --steps 1",
        150,
    ),
    Part("decoding", "benchmarks/decoding.py --json", "--device cuda", "--small", 60),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="on_gpu.sh", description="What waits for a GPU, into one JSON.")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU: shows that all of it runs")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --small shows on a CPU that the script runs")
    sys.exit(1 if run(PARTS, options.small, options.output) else 0)


def run(parts: Sequence[Part], small: bool, output: Path, whole: float = WHOLE) -> list[str]:
    """Run the parts one after another, all within `whole` seconds. Returns the names of those that failed."""
    begun = time.monotonic()
    report: dict[str, Any] = {**facts(small), "finished": False, "seconds": 0.0, "failed": [], "parts": []}
    write(report, output)  # which shows at once that it can be written
    for part in parts:
        last = part.small if small else part.on_gpu
        if last is None:
            continue
        words = [*part.command.split(), *last.split()]
        print(f"{part.name}: {' '.join(words)}", file=sys.stderr)
        limit = min(part.limit, whole - (time.monotonic() - begun))
        found = {"name": part.name, **result(words, limit, some_must_pass=not small)}
        print(f"  {found['status']} in {found['seconds']:.0f} s {found.get('error', '')}", file=sys.stderr)
        report["parts"].append(found)
        if found["status"] != "ok":
            report["failed"].append(part.name)
        report["seconds"] = round(time.monotonic() - begun, 1)
        write(report, output)
    report["finished"] = True
    write(report, output)
    return report["failed"]


def facts(small: bool) -> dict[str, Any]:
    """When, where, and of what."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "small": small,
        "device": processor() if small else torch.cuda.get_device_name(),
        "versions": {
            "python": sys.version.split()[0],
            "cuda": torch.version.cuda,
            **{name: version_of(name) for name in PACKAGES},
        },
        "revision": revision(),
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def revision() -> str | None:
    """Of this repository, with what says that files were changed; None where git does not know."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def result(words: list[str], limit: float, some_must_pass: bool) -> dict[str, Any]:
    """Run one command; its status and seconds, and either its figures or its last line. some_must_pass: of the tests, if it runs tests."""
    if limit <= 0:
        return {"command": words, "status": "failed", "seconds": 0.0, "error": "no time was left"}
    with tempfile.TemporaryDirectory() as scratch:
        counts = Path(scratch) / "tests.xml"
        of_tests = "pytest" in words
        more = [f"--junitxml={counts}"] if of_tests else []
        start = time.monotonic()
        code, out, err = call([sys.executable, *words, *more], Path(scratch), limit)
        found: dict[str, Any] = {"command": words, "status": "ok", "seconds": round(time.monotonic() - start, 1)}
        figures: Any = tests(counts) if of_tests else goals(out)
        if figures:
            found["tests" if of_tests else "goals"] = figures
        lines = last_lines(out if of_tests or not err.strip() else err)
        error = None
        if code is None:
            error = f"stopped after {limit:.0f} s; {lines[-1]}"
        elif code or not figures:
            error = f"exit {code}: {lines[-1]}"
        elif of_tests and some_must_pass and not figures["passed"]:
            error = f"no test ran: {lines[-1]}"
        return found if error is None else {**found, "status": "failed", "error": error, "last_lines": lines}


def call(command: list[str], scratch: Path, limit: float) -> tuple[int | None, str, str]:
    """The exit code of a command and what it printed, to either side. None: after so many seconds it was ended, with all that it had started."""
    told = scratch / "out", scratch / "err"
    with told[0].open("wb") as out, told[1].open("wb") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        code = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where this script is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, *(path.read_text(errors="replace") for path in told)


def goals(text: str) -> list[dict[str, Any]]:
    """The objects that `goals.print_json` printed."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "goal" in record:
                found.append(record)
    return found


def tests(counts: Path) -> dict[str, Any]:
    """How many tests came to what, and why tests were skipped or failed; empty where pytest told nothing."""
    if not counts.exists():
        return {}
    names = {"failure": "failed", "error": "errors", "skipped": "skipped"}
    found: dict[str, Any] = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "reasons": []}
    for case in ElementTree.parse(counts).iter("testcase"):
        outcomes = [(names[one.tag], one.get("message", "")) for one in case if one.tag in names]
        for outcome, message in outcomes or [("passed", "")]:
            found[outcome] += 1
            reason = message.partition("\n")[0]
            told = reason if outcome == "skipped" else f"{case.get('name')}: {reason}"
            if message and told not in found["reasons"]:
                found["reasons"].append(told)
    return found


def last_lines(text: str) -> list[str]:
    """The end of what a command said: whoever reads the JSON may have no GPU to try again."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-LINES_KEPT:] or ["it printed nothing"]


def write(report: dict[str, Any], output: Path) -> None:
    """Whole, or as it was before."""
    beside = output.with_name(output.name + ".part")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(output)


if __name__ == "__main__":
    main()
