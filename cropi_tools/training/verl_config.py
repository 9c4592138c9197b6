"""cropi-train's options as verl's: overrides of `ppo_trainer`, the configuration of `verl.trainer.main_ppo` (verl 0.9, its trainer v1).

What has no equivalent there is refused by name. What differs and cannot be helped:

* verl's group deviation gets 1e-6 where ours gets 1e-4.
* With warm-up its first step has the rate 0, ours the first share of the rate.
* It refills groups of equal rewards until the batch is full, however many rounds that takes.
* Its weights are bfloat16 where it computes, ours autocast; it stops at no collapse.
* Groups of equal rewards go through its forward pass, and get a gradient of KL and entropy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi_tools.data.errors import UsageError

REWARD_FILE = "reward.py"
TRAIN_FILE = "train.parquet"
CHECKPOINTS = "checkpoints"
NEVER = 1e9  # a bound of the ratio that no ratio reaches

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(?<!null)(?<!true)(?<!false)")  # text that Hydra takes for nothing else
_AGGREGATION = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
# verl's advantage estimator, and whether it divides by the deviation
_ADVANTAGE = {"group": ("grpo", True), "centered": ("grpo", False), "leave-one-out": ("rloo", False)}


def refuse_what_verl_has_not(options: Mapping[str, Any], model: str, reference: str | None, prompts: int) -> None:
    """UsageError for an option that verl cannot be told."""
    wrong = {
        "--mask-truncated: verl has no such mask; leave it out": options["mask_truncated"],
        "--schedule linear: verl has constant and cosine; take one of them": options["schedule"] == "linear",
        f"--reference {reference}: verl's reference is the policy it starts from; give --reference stage": reference
        not in (None, model),
        "--carry full: verl starts with no optimizer state; give --carry weights": options["carry"] == "full",
        "--lora: verl's adapters cannot be brought back as a policy; train with another --engine": options["lora"] > 0,
        f"--batch {options['batch']}: verl drops an incomplete batch, and there are {prompts} prompts; lower it": prompts
        < options["batch"],
    }
    for said, is_so in wrong.items():
        if is_so:
            raise UsageError(f"{said} (--engine verl)")


def overrides(
    options: Mapping[str, Any],
    model: str,
    folder: Path,
    prompts: int,
    longest_prompt: int,
    evaluations: Sequence[Path],
    extra: Sequence[str] = (),
) -> list[str]:
    """The Hydra overrides.

    folder: where data, reward function and checkpoints are. prompts, longest_prompt: how many, and tokens of the longest. evaluations: files.
    extra: the user's own, which come last and win.
    """
    actor, rollout, data = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "data"
    samples, batch, steps = options["samples"], options["batch"], options["steps"]
    estimator, normalised = _ADVANTAGE[options["advantage"]]
    low, high = options["clip"]
    tokens = longest_prompt + options["max_tokens"]
    values: dict[str, Any] = {
        f"{data}.train_files": [str(folder / TRAIN_FILE)],
        # verl wants a validation set; without one it is given the training file and never asked
        f"{data}.val_files": [str(path) for path in evaluations] or [str(folder / TRAIN_FILE)],
        f"{data}.train_batch_size": batch,
        f"{data}.max_prompt_length": longest_prompt,
        f"{data}.max_response_length": options["max_tokens"],
        f"{data}.seed": options["seed"],
        f"{data}.shuffle": True,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.model.enable_gradient_checkpointing": options.get("checkpoint_activations", False),
        f"{actor}.ppo_mini_batch_size": options["minibatch"] or batch,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": max(options.get("tokens_per_pass", 16384), tokens),
        f"{actor}.clip_ratio": low,
        f"{actor}.clip_ratio_low": low,
        f"{actor}.clip_ratio_high": high,
        f"{actor}.clip_ratio_c": NEVER,  # its second clip, of bad responses, which ours has not
        f"{actor}.loss_agg_mode": _AGGREGATION[options["aggregation"]],
        f"{actor}.use_kl_loss": options["kl"] > 0,
        f"{actor}.kl_loss_coef": options["kl"],
        f"{actor}.kl_loss_type": "low_var_kl",  # k3
        f"{actor}.entropy_coeff": options["entropy"],
        f"{actor}.grad_clip": options["max_gradient_norm"] or NEVER,
        f"{actor}.optim.lr": options["learning_rate"],
        f"{actor}.optim.lr_scheduler_type": options["schedule"],
        f"{actor}.optim.lr_warmup_steps": options["warmup"],
        f"{actor}.optim.weight_decay": options["weight_decay"],
        f"{actor}.optim.betas": list(options["betas"]),
        f"{actor}.optim.total_training_steps": steps,
        f"{actor}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{rollout}.name": "vllm",
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.n": samples,
        f"{rollout}.temperature": options["temperature"],
        f"{rollout}.top_p": 1.0,
        f"{rollout}.top_k": -1,
        f"{rollout}.seed": options["seed"],
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.val_kwargs.n": options["eval_samples"],
        f"{rollout}.val_kwargs.temperature": options["eval_temperature"],
        f"{rollout}.val_kwargs.do_sample": options["eval_temperature"] > 0,
        "algorithm.adv_estimator": estimator,
        "algorithm.norm_adv_by_std_in_grpo": normalised,
        "algorithm.use_kl_in_reward": False,
        "algorithm.filter_groups.enable": options["dynamic_sampling"] > 0,
        "algorithm.filter_groups.metric": "reward",
        "reward.custom_reward_function.path": str(folder / REWARD_FILE),
        "reward.custom_reward_function.name": "compute_score",
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": -(-steps * batch // prompts) + 1,
        "trainer.save_freq": min(options["save_every"], steps),
        "trainer.max_actor_ckpt_to_keep": options["keep"],
        "trainer.test_freq": options["eval_every"] if evaluations else -1,
        "trainer.val_before_train": bool(evaluations),
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": str(folder / CHECKPOINTS),
        "trainer.project_name": "cropi-tools",
        "trainer.experiment_name": "policy",
        "trainer.logger": ["console", "file"],
    }
    if options["aggregation"] == "constant":
        values[f"{actor}.loss_scale_factor"] = options["max_tokens"]
    if options["importance_cap"] > 0:
        values["algorithm.rollout_correction.rollout_is"] = "token"
        values["algorithm.rollout_correction.rollout_is_threshold"] = options["importance_cap"]
    else:
        # ratios to what the engine reported, as ours without a cap
        values["algorithm.rollout_correction.bypass_mode"] = True
    return [f"{name}={_hydra(value)}" for name, value in values.items()] + list(extra)


def _hydra(value: Any) -> str:
    """A value in Hydra's grammar, of which JSON is nearly a part."""
    if isinstance(value, list):
        return "[" + ",".join(_hydra(one) for one in value) + "]"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value):
            return value
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)
