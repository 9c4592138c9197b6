"""What the tests ask of verl, in a process of its own; the answer is the last line printed, as JSON.

python verl_side.py load FILE POLICY             the rows as verl's own data set gives them, and the prompt's tokens
python verl_side.py score SOURCE ANSWER GOLD     verl's own reward, or the name of the error
python verl_side.py dump FILE POLICY FOLDER      rollout dumps by both of verl's trainers, into FOLDER/ray and FOLDER/v1
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer


def dataset(file: str, policy: str) -> Any:
    from verl.utils.dataset.rl_dataset import RLHFDataset

    config = OmegaConf.create({"max_prompt_length": 200, "filter_overlong_prompts_workers": 1, "cache_dir": "cache"})
    return RLHFDataset(file, AutoTokenizer.from_pretrained(policy), config)


def load(file: str, policy: str) -> list[dict[str, Any]]:
    from torch.utils.data import DataLoader
    from verl.utils.dataset.rl_dataset import collate_fn

    rows = dataset(file, policy)
    (batch,) = DataLoader(rows, batch_size=len(rows), collate_fn=collate_fn)
    keys = ("data_source", "reward_model", "extra_info", "index", "raw_prompt")
    found = [{key: batch[key][place] for key in keys} for place in range(len(rows))]
    for row in found:
        row["token_ids"] = rows.tokenizer.apply_chat_template(
            row["raw_prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return found


def score(source: str, answer: str, gold: str) -> Any:
    from verl.utils.reward_score import default_compute_score

    try:
        return default_compute_score(source, answer, gold, extra_info={})
    except NotImplementedError as error:
        return type(error).__name__


def dump(file: str, policy: str, folder: str) -> list[dict[str, Any]]:
    """Two responses a prompt, the batch in an order of its own, as verl's balancing leaves it; what was asked and sampled."""
    from tensordict import TensorDict
    from verl.protocol import DataProto
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    rows = load(file, policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    longest = max(len(row["token_ids"]) for row in rows)
    order = [*range(0, 2 * len(rows), 2), *range(2 * len(rows) - 1, 0, -2)]
    prompts, responses, scores, golds, sampled = [], [], [], [], []
    for place in order:
        row = rows[place // 2]
        ids = row["token_ids"]
        response = tokenizer(f"{place} apples")["input_ids"] + [tokenizer.eos_token_id]
        prompts.append([tokenizer.pad_token_id] * (longest - len(ids)) + ids)
        responses.append(response + [tokenizer.pad_token_id] * (12 - len(response)))
        scores.append([0.0] * 11 + [float(place % 2)])
        golds.append(row["reward_model"])
        sampled.append({"id": row["index"], "prompt_token_ids": ids, "response": response, "score": place % 2})
    tensors = {
        "prompts": torch.tensor(prompts),
        "responses": torch.tensor(responses),
        "token_level_scores": torch.tensor(scores),
    }
    batch = DataProto(TensorDict(tensors, batch_size=len(order)), {"reward_model": np.array(golds, dtype=object)})
    trainer = object.__new__(RayPPOTrainer)
    trainer.tokenizer, trainer.global_steps = tokenizer, 3
    trainer._init_dump_executor()
    trainer._log_rollout_data(batch, {"acc": np.ones(len(order))}, {}, f"{folder}/ray")
    trainer._shutdown_dump_executor()
    inputs, outputs = (
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in tensors[name]] for name in ("prompts", "responses")
    )
    PPOTrainer._write_generations(
        inputs,
        outputs,
        [gold["ground_truth"] for gold in golds],
        tensors["token_level_scores"].sum(-1).tolist(),
        {"uid": [f"u_{place // 2}_{place % 2}" for place in order]},
        f"{folder}/v1",
        3,
    )
    return sampled


if __name__ == "__main__":
    print(
        json.dumps(
            {"load": load, "score": score, "dump": dump}[sys.argv[1]](*sys.argv[2:]), default=lambda v: v.tolist()
        )
    )
