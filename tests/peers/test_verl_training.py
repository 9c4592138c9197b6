"""What we tell verl is what verl understands: its real configuration, its reward loading, its losses, by its own code."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from trl_loss import HIGH, LENGTHS, LIMIT, LOW, REWARDS, ROWS, batch

from cropi_tools.engines.protocol import Sampling
from cropi_tools.objective import group_advantages, token_coefficients
from cropi_tools.policy.tokens import load_tokens
from cropi_tools.prompts.exports import to_verl
from cropi_tools.training.loss import TokenInputs, token_loss
from cropi_tools.training.presets import LOSSES, PRESETS
from cropi_tools.training.settings import LossSettings, TrainSettings, learning_rate
from cropi_tools.verl_backend.config import NEVER, override, overrides, rate_of
from cropi_tools.verl_backend.data import prepare

pytestmark = pytest.mark.peers

OPTIONS: dict[str, Any] = {
    "steps": 50,
    "batch": 128,
    "minibatch": 0,
    "samples": 8,
    "max_tokens": 1024,
    "temperature": 0.9,
    "verify_seconds": 5.0,
    "partial_credit": False,
    "dynamic_sampling": 0,
    "aggregation": "token",
    "advantage": "group",
    "clip": (0.2, 0.28),
    "kl": 0.0,
    "entropy": 0.0,
    "mask_truncated": False,
    "importance_cap": 0.0,
    "learning_rate": 1e-6,
    "schedule": "constant",
    "warmup": 3,
    "betas": (0.9, 0.95),
    "weight_decay": 0.02,
    "max_gradient_norm": 0.5,
    "lora": 0,
    "carry": "weights",
    "eval_every": 10,
    "eval_samples": 2,
    "eval_temperature": 0.6,
    "save_every": 20,
    "keep": 3,
    "seed": 7,
    "checkpoint_activations": True,
    "tokens_per_pass": 4096,
}
# what is changed in OPTIONS and in every preset's values
SWEEP: list[dict[str, Any]] = [
    {},
    *(
        {"aggregation": a, "advantage": b}
        for a, b in itertools.product(("token", "sequence", "constant"), ("group", "centered", "leave-one-out"))
    ),
    {"kl": 0.01, "entropy": 0.001},
    {"importance_cap": 2.0},
    {"dynamic_sampling": 4, "minibatch": 32},
    {"minibatch": 0, "dtype": "float32", "engine_memory": 0.3},
    {"schedule": "cosine", "warmup": 0, "max_gradient_norm": 0.0, "eval_temperature": 0.0},
]
ACTOR, ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}


def of_preset(name: str) -> dict[str, Any]:
    """A preset's values as options, but for the mask, which verl has not."""
    recipe = dict(PRESETS[name])
    low, _, high = recipe.pop("clip").partition(",")
    recipe |= {"clip": (float(low), float(high or low)), "betas": tuple(map(float, recipe["betas"].split(",")))}
    return {**recipe, **LOSSES[recipe.pop("loss")], "mask_truncated": False}


def asked(folder: Path, sets: tuple[str, ...] = ("a", "b"), **changed: Any) -> list[str]:
    files = [folder / f"{name}.parquet" for name in sets]
    extra = ["trainer.nnodes=2", override("+data.apply_chat_template_kwargs.style", {"tone": "it's: so, dry"})]
    return overrides({**OPTIONS, **changed}, "/models/It's a model", folder, 5000, 700, files, extra)


def test_verl_takes_every_override(verl_config: Callable[..., Any], tmp_path: Path) -> None:
    """Hydra refuses a key that is not there, verl's validation what does not fit; what comes out is what was meant."""
    recipes = [{}, *(of_preset(name) for name in sorted(PRESETS))]
    wishes = [{**recipe, **change} for recipe, change in itertools.product(recipes, SWEEP)]
    given = [asked(tmp_path, **wish) for wish in wishes]
    wrong = [
        [*given[0], "actor_rollout_ref.actor.clip_ratio_lower=1"],
        [*given[0], "actor_rollout_ref.actor.loss_agg_mode=mean"],
    ]
    (tmp_path / "all.json").write_text(json.dumps([*given, *wrong, asked(tmp_path, ())]))
    *found, unknown, unfit, without = verl_config("compose", tmp_path / "all.json")
    assert unknown.startswith("Config")
    assert "clip_ratio_lower" in unknown
    assert isinstance(unfit, str)
    assert without["trainer.test_freq"] == -1
    assert without["trainer.val_before_train"] is False
    for wish, values in zip(wishes, found, strict=True):
        assert isinstance(values, dict), values
        meant = expected({**OPTIONS, **wish}, tmp_path)
        assert {key: values[key] for key in meant} == meant


def expected(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What verl must read where, for these options."""
    found = {
        "actor_rollout_ref.model.path": "/models/It's a model",
        "data.train_batch_size": options["batch"],
        "data.val_files": [str(folder / f"{name}.parquet") for name in ("a", "b")],
        "data.max_prompt_length": 700,
        "data.max_response_length": options["max_tokens"],
        "data.seed": 7,
        "data.apply_chat_template_kwargs.style": {"tone": "it's: so, dry"},
        ACTOR + "strategy": "fsdp2",
        ACTOR + "ppo_mini_batch_size": options["minibatch"] or options["batch"],
        ACTOR + "clip_ratio_low": options["clip"][0],
        ACTOR + "clip_ratio_high": options["clip"][1],
        ACTOR + "clip_ratio_c": NEVER,
        ACTOR + "use_kl_loss": options["kl"] > 0,
        ACTOR + "kl_loss_coef": options["kl"],
        ACTOR + "entropy_coeff": options["entropy"],
        ACTOR + "optim.clip_grad": options["max_gradient_norm"] or NEVER,
        ACTOR + "optim.lr": options["learning_rate"],
        ACTOR + "optim.betas": list(options["betas"]),
        ACTOR + "optim.weight_decay": options["weight_decay"],
        ACTOR + "optim.lr_warmup_steps": options["warmup"],
        ACTOR + "loss_agg_mode": MODES[options["aggregation"]],
        ROLLOUT + "n": options["samples"],
        ROLLOUT + "temperature": options["temperature"],
        ROLLOUT + "val_kwargs.n": 2,
        ROLLOUT + "val_kwargs.do_sample": options["eval_temperature"] > 0,
        "algorithm.adv_estimator": "rloo" if options["advantage"] == "leave-one-out" else "grpo",
        "algorithm.norm_adv_by_std_in_grpo": options["advantage"] == "group",
        "algorithm.filter_groups.enable": options["dynamic_sampling"] > 0,
        "trainer.total_training_steps": 50,
        "trainer.save_freq": 20,
        "trainer.test_freq": 10,
        "trainer.max_actor_ckpt_to_keep": 3,
        "trainer.nnodes": 2,
    }
    if options["aggregation"] == "constant":
        found[ACTOR + "loss_scale_factor"] = options["max_tokens"]
    if options["importance_cap"]:
        found["algorithm.rollout_correction.rollout_is"] = "token"
        found["algorithm.rollout_correction.rollout_is_threshold"] = 2.0
    else:
        found["algorithm.rollout_correction.bypass_mode"] = True
    if options.get("dtype") == "float32":
        found[ROLLOUT + "dtype"] = "float32"
        found[ROLLOUT + "gpu_memory_utilization"] = 0.3
        found[ACTOR + "fsdp_config.mixed_precision"] = dict.fromkeys(
            ("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32"
        )
    return found


def test_the_learning_rate_is_ours(verl_config: Callable[..., Any], tmp_path: Path) -> None:
    """By verl's own scheduler: ours, but for a warm-up before a cosine, which begins at 0; and what we write in metrics.jsonl."""
    cases = [
        {"steps": 12, "schedule": schedule, "warmup": warmup, "learning_rate": 1e-3}
        for schedule, warmup in itertools.product(("constant", "cosine"), (0, 1, 3, 12))
    ]
    (tmp_path / "all.json").write_text(json.dumps([asked(tmp_path, **case) for case in cases]))
    for case, rates in zip(cases, verl_config("rates", tmp_path / "all.json"), strict=True):
        options = {**OPTIONS, **case}
        assert rates == pytest.approx([rate_of(options, step) for step in range(1, 13)], rel=1e-9), case
        own = [learning_rate(settings(options), step) for step in range(1, 13)]
        late = case["warmup"] if case["schedule"] == "cosine" else 0
        assert rates[late:] == pytest.approx(own[late:], rel=1e-9, abs=1e-15), case


def settings(options: dict[str, Any]) -> TrainSettings:
    sampling, loss = Sampling(8, 1.0), LossSettings(1.0, (0.2, 0.2), 0.0, 0.0, "token")
    told = {name: options[name] for name in ("steps", "learning_rate", "schedule", "warmup")}
    rest = {"batch": 4, "samples": 2, "betas": (0.9, 0.99), "weight_decay": 0.0, "max_gradient_norm": 1.0, "seed": 0}
    return TrainSettings(
        **told,
        **rest,
        sampling=sampling,
        loss=loss,
        evaluate_every=1,
        evaluation_samples=1,
        evaluation_sampling=sampling,
        save_every=1,
    )


def test_the_reward_file_gives_what_our_verifiers_give(
    verl_config: Callable[..., Any], tmp_path: Path, policy_folder: Path
) -> None:
    """A record's own verifier counts where none is chosen; sources are not verl's to know."""
    records = [
        {"id": "a", "prompt": "?", "answer": "\\frac{1}{2}", "source": "unknown to verl"},
        {"id": "b", "prompt": "?", "answer": "7", "source": "s", "verifier": "exact"},
    ]
    prepare(tmp_path / "work", records, {"t": records}, load_tokens(str(policy_folder)).tokenizer, None, 5.0)
    texts = [("a", "it is \\boxed{0.5}"), ("a", "it is \\boxed{0.6}"), ("b", "7"), ("b", "it is \\boxed{7}")]
    rows = [{**to_verl(next(r for r in records if r["id"] == name)), "text": text} for name, text in texts]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = verl_config("reward", tmp_path / "work" / "reward.py", tmp_path / "rows.json")
    assert found == [{"score": score, "acc": score} for score in (1.0, 0.0, 1.0, 0.0)]


def test_loss_and_gradient_equal_verls(verl_config: Callable[..., Any], tmp_path: Path) -> None:
    """Three aggregations, with and without divergence, entropy bonus and truncated importance weights, in both number formats."""
    one = batch(torch.float64)
    own_old = (0.5 * one.behavior + 0.5 * one.logprobs()).detach()
    cases: list[dict[str, Any]] = []
    for aggregation, kl, entropy, cap, dtype in itertools.product(
        MODES, (0.0, 0.3), (0.0, 0.05), (0.0, 1.2), (torch.float32, torch.float64)
    ):
        cases.append(
            {
                "aggregation": aggregation,
                "mode": MODES[aggregation],
                "kl": kl,
                "entropy": entropy,
                "cap": cap,
                "dtype": dtype,
                "length": LIMIT,
                "old": own_old if cap else one.behavior,
            }
        )
    told = {
        "cases": cases,
        "logits": one.logits.detach(),
        "tokens": one.tokens,
        "mask": one.mask,
        "behavior": one.behavior,
        "reference": one.reference,
        "advantages": one.advantages,
        "rewards": torch.tensor(REWARDS, dtype=torch.float64),
        "groups": torch.tensor([0] * 4 + [1] * 4),
    }
    torch.save(told, tmp_path / "tensors")
    assert verl_config("losses", tmp_path / "tensors") == len(cases)
    answer = torch.load(tmp_path / "tensors.out")
    spread = torch.tensor(LENGTHS)
    inside = one.mask.bool()
    for case, theirs in zip(cases, answer["losses"], strict=True):
        mine = batch(case["dtype"])
        settings = LossSettings(
            1.0,
            (LOW, HIGH),
            case["kl"],
            case["entropy"],
            case["aggregation"],
            fixed_length=LIMIT,
            importance_cap=case["cap"],
        )
        total = {"sequence": ROWS, "token": sum(LENGTHS), "constant": ROWS * LIMIT}[case["aggregation"]]
        coefficients = torch.tensor(token_coefficients(LENGTHS, case["aggregation"], total), dtype=case["dtype"])
        given = TokenInputs(
            mine.behavior[inside],
            mine.advantages.repeat_interleave(spread),
            coefficients.repeat_interleave(spread),
            own_old[inside].to(case["dtype"]) if case["cap"] else None,
            mine.reference[inside] if case["kl"] else None,
        )
        loss, _ = token_loss(mine.logprobs()[inside], mine.entropy()[inside], given, LENGTHS, settings)
        (gradient,) = torch.autograd.grad(loss, mine.logits)
        tolerance = 1e-6 if case["dtype"] == torch.float32 else 1e-7  # verl adds 1e-8 to a response's length
        assert float((gradient - theirs["gradient"]).norm() / theirs["gradient"].norm()) < tolerance, case
        assert float(loss.detach()) == pytest.approx(float(theirs["loss"]), rel=1e-6, abs=2e-7), case
    for name, theirs in answer["advantages"].items():
        groups = [group_advantages(REWARDS[start : start + 4], name) or [] for start in (0, 4)]
        mine = torch.tensor([value for group in groups for value in group], dtype=torch.float64)
        # the deviation gets 1e-4 here and 1e-6 there
        assert torch.allclose(mine, theirs, rtol=3e-4 if name == "group" else 1e-12, atol=1e-12), name


def test_a_prompt_is_the_same_row_for_both(tmp_path: Path, policy_folder: Path) -> None:
    """Evaluation rows are told apart by the set's name; the source itself is kept."""
    from pyarrow import parquet

    records = tiny_policy.prompts(3)
    prepare(tmp_path / "w", records, {"test": records}, load_tokens(str(policy_folder)).tokenizer, "exact", 5.0)
    train, test = (
        parquet.read_table(tmp_path / "w" / f"{name}.parquet").to_pylist() for name in ("train", "evaluation.test")
    )
    assert {row["data_source"] for row in test} == {"test"}
    assert [row["extra_info"]["source"] for row in test] == [row["data_source"] for row in train]
