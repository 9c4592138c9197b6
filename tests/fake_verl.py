#!/usr/bin/env python3
"""Plays the Python of an environment with verl: takes the command lines that `--engine verl` gives it and leaves what verl leaves.

FAKE_VERL says what goes wrong: `missing` (no verl there), `fail`, `hang` (until TERM, after one checkpoint), `nothing` (no checkpoint).
"""

from __future__ import annotations

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
    steps, every = int(given["trainer.total_training_steps"]), int(given["trainer.save_freq"])
    # verl begins its log anew
    with open(plain["+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH"], "w") as log:
        for step in range(begun + 1, steps + 1):
            data = {
                "critic/score/mean": step / 10,
                "actor/loss": 0.5,
                "actor/entropy_loss": 1.5,
                "response_length/mean": 4.0,
                "timing_s/gen": 1.0,
                "timing_s/step": 3.0,
            }
            if step % int(given["trainer.test_freq"]) == 0:
                data["val-core/test/acc/mean@1"] = step / 100
            log.write(json.dumps({"step": step, "data": data}) + "\n")
            log.flush()
            if step % every == 0 or step == steps:
                saved = checkpoints / f"global_step_{step}" / "actor" / "huggingface"
                saved.mkdir(parents=True)
                for name in ("config.json", "model.safetensors"):
                    shutil.copyfile(Path(plain["actor_rollout_ref.model.path"]) / name, saved / name)
                latest.write_text(str(step))
                if mode == "hang" and not begun:
                    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
                    print("waiting", flush=True)
                    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
