"""TRL on one of our files, in a process of its own: python trl_side.py FILE POLICY. Prints what the reward function was given."""

from __future__ import annotations

import json
import sys
from typing import Any

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


def main(file: str, policy: str) -> None:
    kind = "parquet" if file.endswith(".parquet") else "json"
    rows = load_dataset(kind, data_files=file, split="train")
    seen: dict[str, Any] = {}

    def reward(completions: list[Any], answer: list[str], level: list[str], **columns: Any) -> list[float]:
        for place, identity in enumerate(columns["id"]):
            seen[identity] = {
                "answer": answer[place],
                "level": level[place],
                "prompt": columns["prompts"][place],
                "completion": completions[place],
                "columns": sorted(columns),
            }
        return [float(place % 2) for place in range(len(completions))]

    settings = GRPOConfig(
        "out",
        per_device_train_batch_size=2 * len(rows),
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = GRPOTrainer(policy, reward, settings, rows)
    trainer.train()
    print(json.dumps({"steps": trainer.state.global_step, "seen": seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
