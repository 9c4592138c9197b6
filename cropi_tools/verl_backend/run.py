"""`cropi-train --engine verl`: beyond one machine, verl trains (on Ray), from our data and options, to a policy folder of ours.

It runs in an environment of its own, which has verl and what the verifiers need. Work is in the part's `verl/` folder, with verl's own
checkpoints, from which the same command resumes. With several machines that folder and the policy are on a disk that all of them see.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cropi_tools import runtime
from cropi_tools.data.jsonl import Record
from cropi_tools.data.manifest import write_json
from cropi_tools.data.output import Output
from cropi_tools.data.policies import TRAINING_OPTIONS, tokenizer_digest
from cropi_tools.policy.prompts import check_room, depends_on_date, encoded_prompt
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.prompts.exports import settings_needed
from cropi_tools.rewards.verifiers import verifier_of
from cropi_tools.runtime.console import Relay, show
from cropi_tools.runtime.errors import CropiError, InputError
from cropi_tools.training.inputs import warn_of_shared_questions
from cropi_tools.training.options import TrainOptions
from cropi_tools.training.run import read_records
from cropi_tools.verl_backend.config import evaluation_file, override, overrides, refuse_uneven_batches
from cropi_tools.verl_backend.data import FAILED, copy_package, prepare
from cropi_tools.verl_backend.results import METRICS, bring_back, keep_metrics, last_step, write_figures

WORK, LOG, LOCK = "verl", "verl.log", "running"
LAST_LINES = 15  # of verl's output, in an error
GRACE_SECONDS = 60.0  # between asking verl to end and ending it
_TEMPLATE = "+data.apply_chat_template_kwargs"
_LOGGED = "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH"
_CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import verl
from cropi_tools.verl_backend.reward import VerifierPool
for name in sys.argv[2:]:
    VerifierPool(name, workers=1).load(name)
"""


class VerlJob(NamedTuple):
    """What verl is to train: by which options, on which prompts, evaluated on which."""

    options: TrainOptions
    prompts: Sequence[Record]
    evaluations: Mapping[str, Sequence[Record]]

    @property
    def records(self) -> list[Record]:
        """All prompts, those of evaluation sets too."""
        return [*self.prompts, *(record for records in self.evaluations.values() for record in records)]


def command(job: VerlJob, folder: Path) -> list[str]:
    """The whole command line, with its data in `folder`. UsageError: batches that verl would cut. InputError: prompts that it cannot take."""
    options = job.options
    refuse_uneven_batches(options, len(job.prompts))
    tokens = load_tokens(options.model, options.date)
    if tokens.tokenizer.chat_template is None:
        raise InputError(
            f"{options.model}: has no chat template, which verl puts around every prompt; take a policy that has one"
        )
    if tokens.unlisted:
        runtime.warn(
            f"{options.model}: verl may sample on past {' and '.join(tokens.unlisted)}; add it to eos_token_id in generation_config.json"
        )
    lengths = []
    for record in job.records:
        if not isinstance(record["prompt"], str) and record["prompt"][-1]["role"] == "assistant":
            raise InputError(
                f"prompt '{record['id']}' ends with the beginning of its response, after which verl puts a new turn; leave the prompt out"
            )
        if depends_on_date(tokens.tokenizer, record):
            raise InputError(
                f"prompt '{record['id']}': the chat template of {options.model} asks for the date, and verl would tell it today's; "
                "set it in the prompts where the template has a variable for it (cropi-prompts --chat-template-kwargs date_string='26 Jul 2024')"
            )
        lengths.append(len(encoded_prompt(tokens, record)))
        check_room(tokens, record["id"], lengths[-1], options.max_tokens)
    here = folder.absolute()
    given = overrides(
        options,
        here,
        len(job.prompts),
        max(lengths),
        [here / evaluation_file(name) for name in job.evaluations],
        # of Ray's processes, on whatever machine
        [override(_LOGGED, str(here / METRICS)), *_template_settings(job.records)],
    )
    # it is run in the work folder; a link of an environment must stay the link it is
    python = str(Path(options.verl_python).absolute()) if os.sep in options.verl_python else options.verl_python
    return [python, "-m", "verl.trainer.main_ppo", *given]


def _template_settings(records: Sequence[Record]) -> list[str]:
    """What all prompts' own settings of the chat template are to verl. InputError: they differ."""
    if settings_needed(records, "verl") is None:
        return []
    return [override(f"{_TEMPLATE}.{name}", value) for name, value in records[0]["chat_template_kwargs"].items()]


def train_by_verl(options: TrainOptions, own_verifiers: Mapping[str, str], output: Output) -> None:
    """Have verl make the output, or with --dry-run print the command. own_verifiers: those that records name, with their fingerprints."""
    job = VerlJob(options, *read_records(options))
    if options.dry_run:
        show(shlex.join(command(job, output.part / WORK)))
    elif output.open():
        train(job, own_verifiers, output)
    else:
        runtime.notify(f"{output.path}: up to date")


def train(job: VerlJob, own_verifiers: Mapping[str, str], output: Output) -> None:
    """Run verl into an opened output, from where an earlier try came to.

    InputError: its environment lacks something, or a verifier cannot do its work. CropiError: it failed. Interrupted: a signal came.
    """
    options, work = job.options, output.part / WORK
    line = command(job, work)
    if "ledger" not in output.state:
        warn_of_shared_questions(job.prompts, job.evaluations)
        check_environment(job)
        prepare(work, options, job.prompts, job.evaluations, load_tokens(options.model).tokenizer)
        passes = {name: getattr(options, name) for name in ("tokens_per_pass", "checkpoint_activations")}
        write_json(output.part / TRAINING_OPTIONS, {**options.resolved(own_verifiers), **passes})
        output.commit({"engine": "verl"})  # from here on there is something to resume from
        output.begin_work()
        _finish_training(job, line, work)
        bring_back(options.steps, work, options.model, output.part)
        ledger = write_figures(work, output.part, options, job.evaluations)
        output.commit({"engine": "verl", "ledger": ledger})
    shutil.rmtree(work, ignore_errors=True)
    steps = options.steps
    facts = {"tokenizer": tokenizer_digest(options.model), "steps": steps, "command": shlex.join(line)}
    output.finish(rows=steps, ledger={**output.state["ledger"], "device": "verl"}, facts=facts)
    runtime.notify(f"{output.path}: trained by verl for {steps} steps on {len(job.prompts)} prompts")


def _finish_training(job: VerlJob, line: Sequence[str], work: Path) -> None:
    """Run verl unless its last checkpoint is the last step's; afterwards it is."""
    steps = job.options.steps
    if last_step(work) == steps:
        return
    run(line, work)
    reached = last_step(work)
    if reached != steps:
        came_to = "left no checkpoint" if reached is None else f"its last checkpoint is of step {reached} of {steps}"
        raise CropiError(f"verl ended well, but {came_to}; look into {work / LOG}")


def check_environment(job: VerlJob) -> None:
    """InputError unless the environment has verl and can load every verifier that is asked for."""
    python = job.options.verl_python
    names = sorted({verifier_of(record, job.options.verifier) for record in job.records})
    with tempfile.TemporaryDirectory() as folder:
        copy_package(Path(folder))
        try:
            done = subprocess.run(
                [python, "-c", _CHECK, folder, *names], capture_output=True, encoding="utf-8", errors="replace"
            )
        except OSError as error:
            raise InputError(f"--verl-python {python}: cannot be run ({error.strerror})") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise InputError(
            f"--verl-python {python}: that environment lacks something ({said}); it needs verl and what the verifiers import"
        )


def run(line: Sequence[str], folder: Path) -> None:
    """Run verl to its end, in a process group of its own; its output goes to the log, and to stderr unless --quiet.

    TERM, USR2 and Ctrl-C are passed on to the whole group. InputError: verl of an earlier try still runs, or a verifier failed.
    """
    failed = folder / FAILED
    failed.unlink(missing_ok=True)
    with _alone(folder) as lock, open(folder / LOG, "ab") as log, open(folder / LOG, "rb") as written:
        keep_metrics(folder)
        written.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            line, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock]
        )
        relay = Relay()
        try:
            _follow(process, written, failed, relay)
        except KeyboardInterrupt:
            _end(process, signal.SIGINT)
            raise
        finally:
            # whatever of it is left, in whatever way it ended
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _pass_on(relay, written.read())
            relay.close()
            reached = last_step(folder)
            runtime.keeps(f"{reached} steps" if reached else None)
    runtime.stop_if_requested()
    if failed.exists():
        said = failed.read_text(encoding="utf-8")
        raise InputError(f"{said} (in verl, whose output is in {folder / LOG})")
    if process.returncode:
        with open(folder / LOG, encoding="utf-8", errors="replace") as lines:
            last = "".join(deque(lines, LAST_LINES)).rstrip()
        raise CropiError(
            f"verl ended with exit code {process.returncode}; its output is in {folder / LOG}, the last lines:\n{last}"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """A lock that verl inherits: held as long as it runs, even where the command that started it was killed."""
    with open(folder / LOCK, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: verl of an earlier try still runs there; wait for it or stop it") from None
        yield lock.fileno()


def _follow(process: subprocess.Popen[bytes], written: Any, failed: Path, relay: Relay) -> None:
    """Pass verl's output on until it ends; end it when a signal asks to stop, or when a verifier has failed."""
    while process.poll() is None:
        if runtime.stop_requested() or failed.exists():
            _end(process, signal.SIGTERM)
        _pass_on(relay, written.read())
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    """Ask verl to end, and wait for it as long as it is given."""
    os.killpg(process.pid, number)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _pass_on(relay: Relay, text: bytes) -> None:
    if text and not runtime.is_quiet():
        relay.write(text)
