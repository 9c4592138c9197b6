"""`cropi-train --engine verl`: beyond one machine, verl trains (on Ray), from our data and options, to a policy folder of ours.

It runs in an environment of its own, which has verl and what our verifiers need. Work is in the part's `verl/` folder, with verl's own
checkpoints, from which the same command goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cropi_tools
from cropi_tools import runtime
from cropi_tools.data.errors import CropiError, InputError
from cropi_tools.data.exports import settings_needed, to_verl, write_table
from cropi_tools.data.jsonl import Record, dump_line
from cropi_tools.data.manifest import write_json
from cropi_tools.data.output import Output
from cropi_tools.data.policies import TRAINING_OPTIONS, tokenizer_digest, tokenizer_files
from cropi_tools.policy.prompts import prompt_token_ids
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.training.verl_config import CHECKPOINTS, REWARD_FILE, TRAIN_FILE, overrides, refuse_what_verl_has_not

WORK, LOG, METRICS = "verl", "verl.log", "metrics.verl.jsonl"
LAST_LINES = 15  # of verl's output, in an error
_REWARD = '''"""The reward of a response, by cropi-tools' verifiers; verl loads this file."""

import json
from functools import lru_cache

from cropi_tools.rewards import VerifierPool
from cropi_tools.rollouts.grading import graded


@lru_cache(maxsize=None)
def _pool():
    # a process of its own a worker: a verifier that hangs is killed and costs its own time
    return VerifierPool({verifier!r}, workers=1, seconds={seconds!r})


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **others):
    row = dict(extra_info or {{}})
    record = {{
        "id": row.get("index"),
        "prompt": "",
        "answer": ground_truth,
        "source": row.get("source", data_source),
        "extra": json.loads(row.get("extra") or "{{}}"),
        "samples": [{{"text": solution_str}}],
    }}
    if row.get("verifier"):
        record["verifier"] = row["verifier"]
    (sample,) = graded(_pool(), [record])[0]["samples"]
    return {{"score": sample["reward"], "acc": float(sample["outcome"] == "correct")}}
'''
# verl's names of what metrics.jsonl holds
_FIGURES = {
    "loss": "actor/pg_loss",
    "reward": "critic/score/mean",
    "entropy": "actor/entropy",
    "kl": "actor/kl_loss",
    "clip_fraction": "actor/pg_clipfrac",
    "gradient_norm": "actor/grad_norm",
    "learning_rate": "actor/lr",
    "response_tokens": "response_length/mean",
    "truncated_fraction": "response_length/clip_ratio",
}


class VerlJob(NamedTuple):
    """What verl is to train. options: the resolved ones. python: of the environment that has verl. extra: Hydra overrides of the user's."""

    options: Mapping[str, Any]
    model: str
    reference: str | None
    verifier: str
    prompts: Sequence[Record]
    evaluations: Mapping[str, Sequence[Record]]
    python: str
    extra: Sequence[str]


def command(job: VerlJob, folder: Path) -> list[str]:
    """The whole command line, with its data in `folder`. UsageError: an option that verl has not."""
    refuse_what_verl_has_not(job.options, job.model, job.reference, len(job.prompts))
    tokenizer = load_tokens(job.model).tokenizer
    if tokenizer.chat_template is None:
        raise InputError(
            f"{job.model}: has no chat template, which verl puts around every prompt; take a policy that has one"
        )
    everything = [*job.prompts, *(record for records in job.evaluations.values() for record in records)]
    longest = max(len(prompt_token_ids(tokenizer, record)) for record in everything)
    sets = [folder.absolute() / f"{name}.parquet" for name in job.evaluations]
    given = overrides(
        job.options, str(Path(job.model).absolute()), folder.absolute(), len(job.prompts), longest, sets, _extra(job)
    )
    # it is run in the work folder; a link of an environment must stay the link it is
    python = str(Path(job.python).absolute()) if os.sep in job.python else job.python
    return [python, "-m", "verl.trainer.main_ppo", *given]


def _extra(job: VerlJob) -> list[str]:
    """What the prompts' own settings of the chat template ask for, then the user's overrides."""
    needed = settings_needed(list(job.prompts), "verl")
    return [*(needed.partition(": ")[2].split() if needed else []), *job.extra]


def train(job: VerlJob, output: Output) -> None:
    """Run verl into an opened output. InputError: its environment lacks something. CropiError: it failed. Interrupted: a signal came."""
    work = output.part / WORK
    line = command(job, work)
    check_environment(job.python)
    prepare(job, work)
    write_json(output.part / TRAINING_OPTIONS, {**job.options, "verifier": job.verifier})
    output.commit({"engine": "verl"})  # from here on there is something to go on from
    run(line, work)
    step = bring_back(job, work, output.part)
    tokens = write_figures(work / METRICS, output.part, job)
    shutil.rmtree(work)
    facts = {"tokenizer": tokenizer_digest(job.model), "steps": step, "command": shlex.join(line)}
    output.finish(rows=step, ledger={"tokens_generated": tokens, "device": "verl"}, facts=facts)
    runtime.notify(f"{output.path}: trained by verl for {step} steps on {len(job.prompts)} prompts")


def environment() -> dict[str, str]:
    """Of verl's processes: this package is on their path, whether it is installed there or not."""
    root = str(Path(cropi_tools.__file__).parent.parent)
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *([before] if before else [])])}


def check_environment(python: str) -> None:
    """InputError unless the environment can import verl and grade a response."""
    program = "import verl; from cropi_tools.rollouts.grading import graded; import math_verify"
    try:
        done = subprocess.run([python, "-c", program], env=environment(), capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"--verl-python {python}: cannot be run ({error.strerror})") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise InputError(
            f"--verl-python {python}: that environment lacks something ({said}); it needs verl and math-verify"
        )


def prepare(job: VerlJob, folder: Path) -> None:
    """Write data and reward function; the same every time."""
    folder.mkdir(exist_ok=True)
    _write_rows(job.prompts, folder / TRAIN_FILE)
    for name, records in job.evaluations.items():
        _write_rows(records, folder / f"{name}.parquet", name)
    verifier = job.verifier
    path, colon, function = verifier.rpartition(":")
    if colon and path.endswith(".py"):
        verifier = f"{Path(path).absolute()}:{function}"
    text = _REWARD.format(verifier=verifier, seconds=job.options["verify_seconds"])
    (folder / REWARD_FILE).write_text(text)


def _write_rows(records: Sequence[Record], path: Path, name: str | None = None) -> None:
    """verl's rows. It tells its validation by source: an evaluation set's name stands in its place, the source moves to `extra_info`."""
    rows = [to_verl(record) for record in records]
    for row in rows:
        row["extra_info"]["source"] = row["data_source"]
        row["data_source"] = name or row["data_source"]
    write_table(rows, path)


def run(line: Sequence[str], folder: Path) -> None:
    """Run verl to its end, in a process group of its own; its output goes to the log, and to stderr unless --quiet."""
    with open(folder / LOG, "ab") as log:
        process = subprocess.Popen(
            line,
            cwd=folder,
            env={**environment(), "VERL_FILE_LOGGER_PATH": str((folder / METRICS).absolute())},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        told = False
        try:
            with open(folder / LOG, "rb") as written:
                written.seek(0, os.SEEK_END)
                while process.poll() is None:
                    if runtime.stop_requested() and not told:
                        told = True
                        os.killpg(process.pid, signal.SIGTERM)
                    _pass_on(written.read())
                    time.sleep(0.1)
                _pass_on(written.read())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    runtime.stop_if_requested()
    if process.returncode:
        with open(folder / LOG, encoding="utf-8", errors="replace") as lines:
            last = "".join(deque(lines, LAST_LINES)).rstrip()
        raise CropiError(
            f"verl ended with exit code {process.returncode}; its output is in {folder / LOG}, the last lines:\n{last}"
        )


def _pass_on(text: bytes) -> None:
    if text and not runtime.is_quiet():
        sys.stderr.buffer.write(text)
        sys.stderr.flush()


def bring_back(job: VerlJob, folder: Path, target: Path) -> int:
    """Copy the last checkpoint's weights and configuration, and the tokenizer of the policy that training started from; returns its step."""
    checkpoints = folder / CHECKPOINTS
    try:
        step = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        raise CropiError(f"{checkpoints}: verl ended well and left no checkpoint; look into {folder / LOG}") from None
    saved = checkpoints / f"global_step_{step}" / "actor" / "huggingface"
    weights = sorted(saved.glob("*.safetensors*"))
    if not weights or not (saved / "config.json").exists():
        raise CropiError(f"{saved}: holds no weights; verl's checkpoint.save_contents must have hf_model")
    settings = Path(job.model) / "generation_config.json"
    kept = [*tokenizer_files(job.model), *([settings] if settings.exists() else [])]
    for path in [*weights, saved / "config.json", *kept]:
        shutil.copyfile(path, target / path.name)
    return step


def write_figures(path: Path, target: Path, job: VerlJob) -> int:
    """Write metrics.jsonl, evaluations.jsonl and timings.jsonl from what verl's file logger kept; returns the tokens generated."""
    sets, responses = job.evaluations, job.options["batch"] * job.options["samples"]
    # a resumed run repeats steps after the last checkpoint: the later record counts
    steps = (
        {line["step"]: line["data"] for line in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    )
    metrics, evaluations, timings = [], [], []
    tokens = 0
    for step, data in sorted(steps.items()):
        found = {name: data[key] for name, key in _FIGURES.items() if key in data}
        if "reward" in found:
            generated = round(found.get("response_tokens", 0.0) * responses)
            tokens += generated
            metrics.append({"step": step, **found, "tokens_generated": generated})
            sampling, whole = data.get("timing_s/gen", 0.0), data.get("timing_s/step", 0.0)
            times = {
                "seconds_sampling": sampling,
                "seconds_update": max(whole - sampling, 0.0),
                "seconds_evaluation": 0.0,
            }
            timings.append({"step": step, **times})
        for name in sets:
            accuracy = next((data[key] for key in sorted(data) if key.startswith(f"val-core/{name}/acc/mean@")), None)
            if accuracy is not None:
                evaluations.append({"step": step, "set": name, "accuracy": accuracy, "prompts": len(sets[name])})
    for name, records in (("metrics", metrics), ("evaluations", evaluations), ("timings", timings)):
        (target / f"{name}.jsonl").write_text("".join(dump_line(record) + "\n" for record in records))
    return tokens
