"""What verl leaves, as what cropi-train leaves: the policy of its last checkpoint, and its metrics under our names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cropi_tools import runtime
from cropi_tools.data import fields
from cropi_tools.data.fields import check_fields, is_float
from cropi_tools.data.jsonl import Record, decoded, dump_line
from cropi_tools.data.manifest import write_json
from cropi_tools.data.policies import tokenizer_files
from cropi_tools.policy.checkpoint import check_weights
from cropi_tools.policy.precision import LIMIT, lost_updates, warning
from cropi_tools.runtime.errors import CropiError, InputError
from cropi_tools.training.options import TrainOptions
from cropi_tools.verl_backend.config import CHECKPOINTS, rate_of

METRICS, EARLIER = "metrics.verl.jsonl", "metrics.earlier.jsonl"

# verl's names of what metrics.jsonl holds; of several the first that is there
_FIGURES = {
    "loss": ("actor/loss",),
    "reward": ("critic/score/mean",),
    "entropy": ("actor/entropy", "actor/entropy_loss"),
    "kl": ("actor/kl_loss",),
    "behavior_kl": ("rollout_corr/k3_kl",),
    "clip_fraction": ("actor/pg_clipfrac",),
    "capped_fraction": ("rollout_corr/rollout_is_ratio_fraction_high",),
    "response_tokens": ("response_length/mean",),
    "truncated_fraction": ("response_length/clip_ratio",),
    "gradient_norm": ("actor/grad_norm",),
}
# what verl averages as it averages the loss, ours over tokens
_AS_THE_LOSS = ("entropy", "kl")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def last_step(folder: Path) -> int | None:
    """The step of verl's last checkpoint in its work folder; None when there is none."""
    try:
        return int((folder / CHECKPOINTS / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def bring_back(step: int, folder: Path, model: str, target: Path) -> None:
    """Make a policy folder of the checkpoint of `step`: its weights, and configuration and tokenizer of the policy `model` it began with.

    verl's own configuration says bfloat16 of weights in float32, and has what the run was told beside. Says so when they are in 16 bits, which
    cannot hold what was trained. CropiError: there are no weights, or they are not whole.
    """
    saved = folder / CHECKPOINTS / f"global_step_{step}" / "actor" / "huggingface"
    weights = sorted(saved.glob("*.safetensors"))
    if not weights:
        raise CropiError(f"{saved}: holds no weights; verl's checkpoint.save_contents must have hf_model")
    settings = Path(model) / "generation_config.json"
    kept = [*tokenizer_files(model), *([settings] if settings.exists() else [])]
    for path in [*weights, *saved.glob("*.safetensors.index.json"), *kept]:
        shutil.copyfile(path, target / path.name)
    configuration = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    configuration.pop("torch_dtype", None)
    with safe_open(weights[0], framework="numpy") as tensors:
        stored = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
    write_json(target / "config.json", {**configuration, "dtype": _DTYPES.get(stored, "float32")})
    check_weights(str(target))
    lost = lost_updates(target, model, torch.float32)
    if lost is not None and lost.share > LIMIT:
        runtime.warn(warning(f"verl's checkpoint of step {step}", lost))


def keep_metrics(folder: Path) -> None:
    """Before verl starts: its file logger starts its file again, so what an earlier try logged is moved."""
    if (folder / METRICS).exists():
        with open(folder / EARLIER, "ab") as kept:
            kept.write((folder / METRICS).read_bytes() + b"\n")
        (folder / METRICS).unlink()


def write_figures(
    folder: Path, target: Path, options: TrainOptions, evaluations: Mapping[str, Sequence[Record]]
) -> dict[str, int]:
    """Write metrics.jsonl, evaluations.jsonl and timings.jsonl from what verl's file logger kept; returns tokens_generated and tokens_trained.

    verl writes a step's checkpoint before its line: where it was killed between the two, the line is missing.
    """
    steps = _logged(folder)
    metrics: list[Record] = []
    accuracies: list[Record] = []
    timings: list[Record] = []
    for step, data in sorted(steps.items()):
        if "critic/score/mean" in data:
            rate = {"learning_rate": rate_of(options, step)}
            metrics.append({"step": step, **_figures(data, options), **rate, **_sampled(data, options)})
            sampling, whole = data.get("timing_s/gen", 0.0), data.get("timing_s/step", 0.0)
            times = {"seconds_sampling": sampling, "seconds_update": max(whole - sampling, 0.0)}
            timings.append({"step": step, **times, "seconds_evaluation": data.get("timing_s/testing", 0.0)})
        for name, records in evaluations.items():
            accuracy = next((data[key] for key in sorted(data) if key.startswith(f"val-core/{name}/acc/mean@")), None)
            if accuracy is not None:
                size = {"prompts": len(records), "samples": options.eval_samples}
                accuracies.append({"step": step, "set": name, "accuracy": accuracy, **size})
    for name, lines in (("metrics", metrics), ("evaluations", accuracies), ("timings", timings)):
        (target / f"{name}.jsonl").write_text("".join(dump_line(line) + "\n" for line in lines), encoding="utf-8")
    return {name: sum(line[name] for line in metrics) for name in ("tokens_generated", "tokens_trained")}


def _logged(folder: Path) -> dict[int, dict[str, Any]]:
    """verl's figures by step. A run that went on repeats steps after the checkpoint, where the later line counts, and evaluates at the
    checkpoint's step again, which adds to the line that is there. A figure that is no number is null there, and left out."""
    steps: dict[int, dict[str, Any]] = {}
    for line in _whole_lines(folder):
        known = {name: value for name, value in line["data"].items() if is_float(value)}
        steps.setdefault(line["step"], {}).update(known)
    return steps


def _whole_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of the log; one that a kill cut short is left out. InputError: a whole one is none of verl's."""
    for path in (folder / EARLIER, folder / METRICS):
        for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
            try:
                line = decoded(text.decode())
            except ValueError:
                continue
            if not isinstance(line, dict) or not fields.VERL_LOG.keys() <= line.keys():
                raise InputError(
                    f"{path}:{number}: expected an object with 'step' and 'data', as verl's file logger writes"
                )
            check_fields(line, fields.VERL_LOG, f"{path}:{number}")
            yield line


def _figures(data: Mapping[str, Any], options: TrainOptions) -> dict[str, float]:
    found = {}
    for name, keys in _FIGURES.items():
        value = next((data[key] for key in keys if key in data), None)
        if value is not None:
            found[name] = value
    if options.aggregation == "constant":
        longer = options.max_tokens / max(found.get("response_tokens", 0.0), 1.0)
        found |= {name: found[name] * longer for name in _AS_THE_LOSS if name in found}
    return found


def _sampled(data: Mapping[str, Any], options: TrainOptions) -> dict[str, float]:
    """What a step sampled. All of its batch goes through verl's update; groups of equal rewards, where it refills them, were sampled beside
    it and are taken to be as long."""
    batch, refilled = options.batch, data.get("training/filter_groups/evicted_samples", 0)
    group = data.get("response_length/mean", 0.0) * options.samples
    tokens = {"tokens_generated": round(group * (batch + refilled)), "tokens_trained": round(group * batch)}
    return {"zero_variance_fraction": refilled / (batch + refilled), **tokens} if options.dynamic_sampling else tokens
