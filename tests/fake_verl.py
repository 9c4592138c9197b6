#!/usr/bin/env python3
"""Plays the Python of an environment with verl: takes the command lines that `--engine verl` gives it and leaves what verl leaves.

FAKE_VERL says what goes wrong: `missing` (no verl there), `fail`, `hang` (until TERM or INT, after one checkpoint), `nothing` (no
checkpoint), `early` (ends a step too soon), `verifier` (a reward fails, and it goes on as if nothing were), `stubborn` (hears no signal).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    mode = os.environ.get("FAKE_VERL", "")
    if sys.argv[1] == "-c":
        if mode == "missing":
            print("ModuleNotFoundError: No module named 'verl'", file=sys.stderr)
        return int(mode == "missing")
    assert sys.argv[1:3] == ["-m", "verl.trainer.main_ppo"], sys.argv
    given = dict(text.split("=", 1) for text in sys.argv[3:])
    plain = {name: re.sub(r"^'(.*)'$", r"\1", value) for name, value in given.items()}
    checkpoints = Path(plain["trainer.default_local_dir"])
    latest = checkpoints / "latest_checkpointed_iteration.txt"
    begun = int(latest.read_text()) if latest.exists() else 0
    print(f"begins after step {begun}", flush=True)
    if mode == "fail":
        print("ray.exceptions.OutOfMemoryError: worker died", file=sys.stderr)
        return 3
    if mode == "nothing":
        return 0
    if mode == "verifier":
        reward(plain["reward.custom_reward_function.path"])
        wait()
    if mode == "stubborn":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        wait()
    steps, every = int(given["trainer.total_training_steps"]), int(given["trainer.save_freq"])
    # verl begins its log anew
    with open(plain["+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH"], "w") as log:

        def write(step: int, data: dict[str, float | None]) -> None:
            log.write(json.dumps({"step": step, "data": data}) + "\n")
            log.flush()

        if given["trainer.val_before_train"] == "true":
            write(begun, {"val-core/test/acc/mean@1": begun / 100})
        for step in range(begun + 1, steps + (mode != "early")):
            if step % every == 0 or step == steps:
                save(checkpoints, step, Path(plain["actor_rollout_ref.model.path"]))
            data: dict[str, float | None] = {
                "critic/score/mean": step / 10,
                "actor/loss": 0.5,
                "actor/kl_loss": None,  # what is no number
                "actor/entropy_loss": 1.5,
                "response_length/mean": 4.0,
                "timing_s/gen": 1.0,
                "timing_s/step": 3.0,
            }
            if step % int(given["trainer.test_freq"]) == 0 or step == steps:
                data |= {"val-core/test/acc/mean@1": step / 100, "timing_s/testing": 0.5}
            write(step, data)
            if step == every and mode == "hang" and not begun:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda number, _: sys.exit(128 + number))
                wait()
    return 0


def save(checkpoints: Path, step: int, policy: Path) -> None:
    """Weights that are the policy's, and a configuration that is verl's own."""
    saved = checkpoints / f"global_step_{step}" / "actor" / "huggingface"
    saved.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(policy / "model.safetensors", saved / "model.safetensors")
    (saved / "config.json").write_text('{"dtype": "bfloat16"}')
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))


def reward(path: str) -> None:
    """Ask for one, as verl does: a failure is a line in the log."""
    spec = importlib.util.spec_from_file_location("custom_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.compute_score("s", "text", "7", {"index": "p1"})
    except Exception as error:
        print(f"Error in _run_prompt: {error}", flush=True)


def wait() -> None:
    print("waiting", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    sys.exit(main())
