"""cropi-train's options as verl's: overrides of `ppo_trainer`, the configuration of `verl.trainer.main_ppo` (verl 0.9, its trainer v1).

Every option is in one of the tables below: it becomes a setting of verl's, reaches it by other ways, is none of its business, or is
refused. What differs and cannot be helped:

* verl's group deviation gets 1e-6 where ours gets 1e-4.
* A cosine schedule with warm-up begins with the rate 0 and is one step late until the warm-up is over.
* It refills groups of equal rewards until the batch is full, however many rounds that takes.
* Its weights are bfloat16 where it computes, ours autocast; it stops at no collapse.
* It keeps as many checkpoints as it is told while it runs; the last one alone is brought back.
* Groups of equal rewards go through its forward pass, and get a gradient of KL and entropy; a token's KL is at most 10.
* Its mini-batches are of responses that are alike in length, not of whole prompts; its prompts come in an order of its own.
* A response that its engine lost is left out, with a line in the log; verifiers see responses without the tokenizer's special tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi_tools.options import described
from cropi_tools.runtime.errors import InputError, UsageError
from cropi_tools.training.inputs import reference_folder
from cropi_tools.training.options import TrainOptions

REWARD_FILE = "reward.py"
TRAIN_FILE = "train.parquet"
CHECKPOINTS = "checkpoints"
NEVER = 1e9  # a bound of the ratio, or of a gradient's norm, that nothing reaches

_NAME = re.compile(r"\+{0,2}[\w@/-]+(?:\.[\w@/-]+)*")
_KEY = re.compile(r"\w+")
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(?<!null)(?<!true)(?<!false)")  # text that Hydra takes for nothing else
_AGGREGATION = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
# verl's advantage estimator, and whether it divides by the deviation
_ADVANTAGE = {"group": ("grpo", True), "centered": ("grpo", False), "leave-one-out": ("rloo", False)}
# what says how many processes share a mini-batch, with verl's defaults
_PROCESSES = {"trainer.n_gpus_per_node": 8, "trainer.nnodes": 1}
_SHARED_ROW = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
_FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


_ACTOR, _OPTIMIZER, _ROLLOUT = (
    "actor_rollout_ref.actor",
    "actor_rollout_ref.actor.optim",
    "actor_rollout_ref.rollout",
)
TRANSLATED: Mapping[str, str] = {
    "model": "actor_rollout_ref.model.path",
    "steps": "trainer.total_training_steps",
    "batch": "data.train_batch_size",
    "minibatch": f"{_ACTOR}.ppo_mini_batch_size",
    "samples": f"{_ROLLOUT}.n",
    "max_tokens": "data.max_response_length",
    "temperature": f"{_ROLLOUT}.temperature",
    "dynamic_sampling": "algorithm.filter_groups.enable",
    "aggregation": f"{_ACTOR}.loss_agg_mode",
    "advantage": "algorithm.adv_estimator",
    "clip": f"{_ACTOR}.clip_ratio_high",
    "kl": f"{_ACTOR}.kl_loss_coef",
    "entropy": f"{_ACTOR}.entropy_coeff",
    "importance_cap": "algorithm.rollout_correction.rollout_is_threshold",
    "learning_rate": f"{_OPTIMIZER}.lr",
    "schedule": f"{_OPTIMIZER}.lr_scheduler_type",
    "warmup": f"{_OPTIMIZER}.lr_warmup_steps",
    "betas": f"{_OPTIMIZER}.betas",
    "weight_decay": f"{_OPTIMIZER}.weight_decay",
    "max_gradient_norm": f"{_OPTIMIZER}.clip_grad",
    "eval_every": "trainer.test_freq",
    "eval_samples": f"{_ROLLOUT}.val_kwargs.n",
    "eval_temperature": f"{_ROLLOUT}.val_kwargs.temperature",
    "save_every": "trainer.save_freq",
    "checkpoints": "trainer.max_actor_ckpt_to_keep",
    "seed": "data.seed",
    "engine_memory": f"{_ROLLOUT}.gpu_memory_utilization",
    "dtype": f"{_ROLLOUT}.dtype",
    "tokens_per_pass": f"{_ACTOR}.ppo_max_token_len_per_gpu",
    "checkpoint_activations": "actor_rollout_ref.model.enable_gradient_checkpointing",
}
"""Options that become settings of verl's, each with one that it decides."""

HANDED_OVER: Mapping[str, str] = {
    "prompts": "rows of the training file",
    "evaluations": "rows of the evaluation files",
    "verifier": "in the reward file",
    "allow_verifier": "in the reward file",
    "verify_seconds": "in the reward file",
    "partial_credit": "in the reward file",
    "verl_python": "runs verl",
    "verl_option": "the last overrides, as they are",
}
"""Options that reach verl in other ways."""

IRRELEVANT: Mapping[str, str] = {
    "output": "verl works in a folder of its own, whose result is brought back",
    "preset": "its values are other options'",
    "engine": "it is verl",
    "date": "prompts that depend on it are refused",
    "state": "it leaves none in the policy",
    "as_json": "of an estimate, which there is none of",
    "dry_run": "prints the command in place of running it",
    "force": "of the output alone",
    "quiet": "of messages alone",
}
"""Options that have no part in what verl does, with the reason."""


def _foreign_reference(options: TrainOptions) -> bool:
    folder = reference_folder(options)
    return folder is not None and Path(folder).resolve() != Path(options.model).resolve()


REFUSED: Mapping[str, tuple[Callable[[TrainOptions], bool], str]] = {
    "mask_truncated": (lambda asked: asked.mask_truncated, "it has no such mask; give --no-mask-truncated"),
    "schedule": (lambda asked: asked.schedule == "linear", "it has constant and cosine; take one of them"),
    "reference": (_foreign_reference, "its reference is the policy it starts from; give --reference stage"),
    "carry": (lambda asked: asked.carry == "full", "it starts with no optimizer state; give --carry weights"),
    "lora": (lambda asked: asked.lora > 0, "its adapters cannot be brought back as a policy; take another --engine"),
    "against": (lambda asked: bool(asked.against), "its passes are not watched; leave it out"),
    "save_dtype": (
        lambda asked: asked.save_dtype != "float32",
        "its checkpoint is brought back as it is; leave it out",
    ),
    "collapse": (lambda asked: bool(asked.collapse), "it watches for no collapse; leave it out"),
    "track": (
        lambda asked: bool(asked.track),
        "it has trackers of its own; give --verl-option trainer.logger=[console,file,wandb]",
    ),
    "device": (
        lambda asked: asked.device != "auto",
        "its processes find their devices; leave it out, or give --verl-option trainer.device=cpu",
    ),
}
"""Options that verl cannot follow: when that is so, and what to do."""


def evaluation_file(name: str) -> str:
    """The data file of an evaluation set; no set's name makes it the training file's."""
    return f"evaluation.{name}.parquet"


def refuse_what_verl_cannot(options: TrainOptions) -> None:
    """UsageError for an option that verl cannot be told."""
    for field, (is_so, why) in REFUSED.items():
        if is_so(options):
            raise UsageError(f"--engine verl cannot follow {described(TrainOptions)[field].flag}: {why}")


def refuse_uneven_batches(options: TrainOptions, prompts: int) -> None:
    """UsageError for numbers of prompts and responses that verl would cut or fill up."""
    batch, minibatch, processes = options.batch, _minibatch(options), _processes(options.verl_option)
    responses = minibatch * options.samples
    wrong = {
        f"--batch {batch}: verl drops an incomplete batch, and there are {prompts} prompts; lower it": prompts < batch,
        f"--minibatch {minibatch}: verl fills an incomplete one with empty responses; give one that divides --batch {batch}": batch
        % minibatch
        > 0,
        f"--minibatch {minibatch} with -n {options.samples}: verl shares {responses} responses evenly among {processes} processes; give a "
        "multiple, or other --verl-option trainer.n_gpus_per_node, trainer.nnodes": responses % processes > 0,
    }
    for said, is_so in wrong.items():
        if is_so:
            raise UsageError(f"{said} (--engine verl)")


def _minibatch(options: TrainOptions) -> int:
    return min(options.minibatch or options.batch, options.batch)


def _processes(extra: Sequence[str]) -> int:
    """How many processes share a mini-batch, after the user's own overrides."""
    known = {**_PROCESSES, _SHARED_ROW: 1}
    for text in extra:
        name, _, value = text.lstrip("+").partition("=")
        if name in known and value.isdigit():
            known[name] = int(value)
    return max(known["trainer.n_gpus_per_node"] * known["trainer.nnodes"] // max(known[_SHARED_ROW], 1), 1)


def overrides(
    options: TrainOptions,
    folder: Path,
    prompts: int,
    longest_prompt: int,
    evaluations: Sequence[Path],
    more: Sequence[str] = (),
) -> list[str]:
    """The Hydra overrides.

    folder: where data, reward function and checkpoints are. prompts, longest_prompt: how many, and tokens of the longest. evaluations: files.
    more: overrides before the user's own, which come last and win.
    """
    actor, rollout, data = _ACTOR, _ROLLOUT, "data"
    samples, batch, steps = options.samples, options.batch, options.steps
    estimator, normalized = _ADVANTAGE[options.advantage]
    low, high = options.clip
    tokens = longest_prompt + options.max_tokens
    values: dict[str, Any] = {
        f"{data}.train_files": [str(folder / TRAIN_FILE)],
        # verl wants a validation set; without one it is given the training file and never asked
        f"{data}.val_files": [str(path) for path in evaluations] or [str(folder / TRAIN_FILE)],
        f"{data}.train_batch_size": batch,
        f"{data}.max_prompt_length": longest_prompt,
        f"{data}.max_response_length": options.max_tokens,
        f"{data}.seed": options.seed,
        f"{data}.shuffle": True,
        "actor_rollout_ref.model.path": str(Path(options.model).absolute()),
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.model.enable_gradient_checkpointing": options.checkpoint_activations,
        f"{actor}.strategy": "fsdp2",
        f"{actor}.ppo_mini_batch_size": _minibatch(options),
        f"{actor}.ppo_epochs": 1,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": max(options.tokens_per_pass, tokens),
        f"{actor}.clip_ratio": low,
        f"{actor}.clip_ratio_low": low,
        f"{actor}.clip_ratio_high": high,
        f"{actor}.clip_ratio_c": NEVER,  # its second clip, of bad responses, which ours has not
        f"{actor}.loss_agg_mode": _AGGREGATION[options.aggregation],
        f"{actor}.use_kl_loss": options.kl > 0,
        f"{actor}.kl_loss_coef": options.kl,
        f"{actor}.kl_loss_type": "low_var_kl",  # k3
        f"{actor}.entropy_coeff": options.entropy,
        f"{actor}.calculate_entropy": True,  # logged, bonus or not: a collapse shows there first
        f"{actor}.optim.clip_grad": options.max_gradient_norm
        or NEVER,  # its engine reads this one, not actor.grad_clip
        f"{actor}.optim.lr": options.learning_rate,
        **_schedule(options, f"{actor}.optim"),
        f"{actor}.optim.weight_decay": options.weight_decay,
        f"{actor}.optim.betas": list(options.betas),
        f"{actor}.optim.total_training_steps": steps,
        f"{actor}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{rollout}.name": "vllm",
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.gpu_memory_utilization": options.engine_memory,
        f"{rollout}.n": samples,
        f"{rollout}.temperature": options.temperature,
        f"{rollout}.top_p": 1.0,
        f"{rollout}.top_k": -1,
        f"{rollout}.seed": options.seed,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.val_kwargs.n": options.eval_samples,
        f"{rollout}.val_kwargs.temperature": options.eval_temperature,
        f"{rollout}.val_kwargs.top_p": 1.0,
        f"{rollout}.val_kwargs.top_k": -1,
        f"{rollout}.val_kwargs.do_sample": options.eval_temperature > 0,
        "algorithm.adv_estimator": estimator,
        "algorithm.norm_adv_by_std_in_grpo": normalized,
        "algorithm.use_kl_in_reward": False,
        "algorithm.filter_groups.enable": options.dynamic_sampling > 0,
        "algorithm.filter_groups.metric": "reward",
        "reward.custom_reward_function.path": str(folder / REWARD_FILE),
        "reward.custom_reward_function.name": "compute_score",
        "trainer.total_training_steps": steps,
        # an epoch has whole batches only; training ends at whichever of the two comes first
        "trainer.total_epochs": -(-steps // (prompts // batch)),
        "trainer.save_freq": min(options.save_every, steps),
        "trainer.max_actor_ckpt_to_keep": options.checkpoints,
        "trainer.test_freq": options.eval_every if evaluations else -1,
        "trainer.val_before_train": bool(evaluations),
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": str(folder / CHECKPOINTS),
        "trainer.project_name": "cropi-tools",
        "trainer.experiment_name": "policy",
        "trainer.logger": ["console", "file"],
    }
    if options.aggregation == "constant":
        values[f"{actor}.loss_scale_factor"] = options.max_tokens
    if options.importance_cap > 0:
        values["algorithm.rollout_correction.rollout_is"] = "token"
        values["algorithm.rollout_correction.rollout_is_threshold"] = options.importance_cap
    else:
        # ratios to what the engine reported, as ours without a cap
        values["algorithm.rollout_correction.bypass_mode"] = True
    if options.dtype == "float32":
        values[f"+{actor}.fsdp_config.mixed_precision"] = _FLOAT32
        values["+actor_rollout_ref.ref.fsdp_config.mixed_precision"] = _FLOAT32
        values[f"{rollout}.dtype"] = "float32"
        values["+actor_rollout_ref.model.override_config.attn_implementation"] = (
            "sdpa"  # flash attention has no float32
        )
    return [override(name, value) for name, value in values.items()] + [*more, *options.verl_option]


def _schedule(options: TrainOptions, optimizer: str) -> dict[str, Any]:
    """verl counts warm-up steps from 0 in its constant schedule, from 1 if told in its cosine one, which without a cycle is constant."""
    warmup, constant = options.warmup, options.schedule == "constant"
    values: dict[str, Any] = {
        f"{optimizer}.lr_warmup_steps": warmup,
        f"{optimizer}.lr_scheduler_type": options.schedule,
    }
    if constant and warmup:
        values |= {
            f"{optimizer}.lr_scheduler_type": "cosine",
            f"{optimizer}.num_cycles": 0.0,
            f"{optimizer}.zero_indexed_step": False,
        }
    return values


def rate_of(options: TrainOptions, step: int) -> float:
    """verl's learning rate in a step (from 1). With each step it logs the rate of the next."""
    warmup, rate = options.warmup, options.learning_rate
    if options.schedule == "constant":
        return rate * min(step / warmup, 1.0) if warmup else rate
    done = step - 1
    if done < warmup:
        return rate * done / warmup
    return rate * (1 + math.cos(math.pi * (done - warmup) / max(options.steps - warmup, 1))) / 2


def override(name: str, value: Any) -> str:
    """One override in Hydra's grammar. InputError: a name or a text that it would read as something else; both may come from records."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be a setting of verl's: its name may have letters, digits, dots and underscores"
        )
    return f"{name}={_hydra(value)}"


def _hydra(value: Any) -> str:
    """A value in Hydra's grammar, of which JSON is nearly a part."""
    if isinstance(value, list):
        return "[" + ",".join(_hydra(one) for one in value) + "]"
    if isinstance(value, Mapping):
        for name in value:
            if not _KEY.fullmatch(str(name)):
                raise InputError(
                    f"{name!r} cannot be a key of verl's settings: it may have letters, digits and underscores"
                )
        return "{" + ",".join(f"{name}:{_hydra(one)}" for name, one in value.items()) + "}"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value):
            return value
        if "${" in value or not value.replace("\t", " ").isprintable():
            raise InputError(
                f"{value!r} cannot be handed to verl: its configuration would resolve `${{`, and takes no line breaks; change that text"
            )
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)
