"""What the tests ask of verl's configuration and losses, in a process of its own; the answer is the last line printed, as JSON.

python verl_config.py compose FILE     FILE: a JSON list of lists of overrides; for each the composed values, or the error
python verl_config.py rates FILE      FILE: the same; for each the learning rates of all steps, by the scheduler of verl's engine
python verl_config.py reward FILE ROWS the rewards that a reward file gives, as verl loads it
python verl_config.py losses FILE      FILE: tensors by torch.save; verl's losses and gradients of them, beside it as FILE.out
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf


def compose(file: str) -> list[Any]:
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    found: list[Any] = []
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        for given in json.loads(Path(file).read_text()):
            try:
                config = compose("ppo_trainer", overrides=given)
                validate_config(config, config.actor_rollout_ref.actor.use_kl_loss, use_critic=False)
                for part in (config.actor_rollout_ref.rollout, config.algorithm, config.actor_rollout_ref.model.mtp):
                    omega_conf_to_dataclass(part)
                keys = [text.partition("=")[0].lstrip("+") for text in given]
                found.append({key: _plain(OmegaConf.select(config, key)) for key in keys})
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if not isinstance(value, (str, int, float, bool, type(None))) else value


def rates(file: str) -> list[list[float]]:
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    found = []
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        for given in json.loads(Path(file).read_text()):
            settings = omega_conf_to_dataclass(compose("ppo_trainer", overrides=given).actor_rollout_ref.actor.optim)
            optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
            schedule = FSDPEngine._build_lr_scheduler(SimpleNamespace(optimizer_config=settings, rank=1), optimizer)
            found.append([])
            for _ in range(settings.total_training_steps):
                found[-1].append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
    return found


def reward(file: str, rows: str) -> list[Any]:
    from verl.trainer.ppo.reward import get_custom_reward_fn

    config = OmegaConf.create({"reward": {"custom_reward_function": {"path": file, "name": "compute_score"}}})
    function = get_custom_reward_fn(config)
    return [
        function(
            data_source=row["data_source"],
            solution_str=row["text"],
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row["extra_info"],
        )
        for row in json.loads(Path(rows).read_text())
    ]


def losses(file: str) -> int:
    """verl's own loss in the order of its own worker: the policy's, then the entropy's and the divergence's shares, all aggregated alike, with
    importance weights of its own where there is a cap."""
    from verl.trainer.ppo.core_algos import (
        agg_loss,
        compute_grpo_outcome_advantage,
        compute_policy_loss_vanilla,
        compute_rloo_outcome_advantage,
        kl_penalty,
    )
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    told = torch.load(file)
    results = []
    for case in told["cases"]:
        logits = told["logits"].clone().to(case["dtype"]).requires_grad_()
        table = torch.log_softmax(logits, -1)
        logprobs = table.gather(-1, told["tokens"][..., None]).squeeze(-1)
        mask = told["mask"].to(case["dtype"])
        scale = case["length"] if case["mode"] == "seq-mean-token-sum-norm" else None
        info = {
            "dp_size": 1,
            "batch_num_tokens": mask.sum(),
            "global_batch_size": len(mask),
            "loss_scale_factor": scale,
        }
        config = DictConfig({"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1e9})
        config = _Config(config, info)
        advantages = told["advantages"].to(case["dtype"])[:, None].expand_as(logprobs)
        old, weights = case["old"].to(case["dtype"]), None
        if case["cap"]:
            apart = old - told["behavior"].to(case["dtype"])
            weights, _ = compute_rollout_correction_weights(apart, mask, "token", case["cap"])
        loss, _ = compute_policy_loss_vanilla(old, logprobs, advantages, mask, case["mode"], config, weights)
        entropy = -(table.exp() * table).sum(-1)
        loss = loss - case["entropy"] * agg_loss(entropy, mask, case["mode"], **info)
        divergence = kl_penalty(logprobs, told["reference"].to(case["dtype"]), "low_var_kl")
        loss = loss + case["kl"] * agg_loss(divergence, mask, case["mode"], **info)
        loss.backward()
        results.append({"loss": loss.detach(), "gradient": logits.grad})
    rewards = told["rewards"]
    scores = torch.zeros_like(told["mask"], dtype=torch.float64)
    scores[:, 0] = rewards
    index = told["groups"].numpy()
    advantages = {}
    for name, normal in (("group", True), ("centered", False)):
        found, _ = compute_grpo_outcome_advantage(scores, told["mask"].double(), index, norm_adv_by_std_in_grpo=normal)
        advantages[name] = found[:, 0]
    advantages["leave-one-out"] = compute_rloo_outcome_advantage(scores, told["mask"].double(), index)[0][:, 0]
    torch.save({"losses": results, "advantages": advantages}, file + ".out")
    return len(results)


class _Config:
    """verl's actor settings as its loss reads them: by attribute, and `get`."""

    def __init__(self, values: Any, info: dict[str, Any]) -> None:
        self._values, self.global_batch_info = values, info

    def __getattr__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str, default: Any) -> Any:
        return self._values.get(name, default)


if __name__ == "__main__":
    print(
        json.dumps({"compose": compose, "rates": rates, "reward": reward, "losses": losses}[sys.argv[1]](*sys.argv[2:]))
    )
